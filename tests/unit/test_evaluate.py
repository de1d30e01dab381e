"""`finesteer evaluate`, whole, on a tiny checkpoint; what is counted, on a scripted answerer; what is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from server.cli import app
from steering.decision import ProfileActivation, SteeringDecision, SteeringOptions, decide_profile
from steering.errors import TrainingDataError
from steering.evaluation.answers import PLAIN, Answer
from steering.evaluation.evaluate import Column, evaluate
from steering.evaluation.judges import is_refusal
from steering.evaluation.suites import Item, Suite, SuiteFile
from steering.evaluation.table import markdown
from steering.training.data import Query
from steering.training.statistics import MeanShare, Share
from tests.tiny import save_tiny_checkpoint, tiny_model, tiny_profile

NO, YES = "I can't help with money or goods.", "Sure, here is how."


class Scripted:
    """Plain: YES to everything. Steered: the gate opens on "bad…", which it refuses, but loops on "bad 3"; "calm 1" is changed
    though its gate is shut: a fault that must be seen."""

    def __init__(self):
        self.asked, self.scored = [], 0

    def answer(self, queries, steering=PLAIN, *, max_tokens=64, label=""):
        self.asked += [q.messages[0][1] for q in queries]
        return [self.one(q.messages[0][1], steering) for q in queries]

    def one(self, text, steering):
        fired = text.startswith("bad") and bool(steering.activations)
        said = NO if fired else YES
        if fired and text == "bad 3":
            said = "I can't " * 9
        if steering.activations and text == "calm 1":
            said = "Other words."
        profiles = tuple(
            decide_profile(a, version="", method="", layer=0, gate=float(fired), vector_norm=1.0, state_norm=10.0)
            for a in steering.activations
        )
        return Answer(tuple(said.encode()), said, True, SteeringDecision(fired, "gate_open", profiles))

    def logprobs(self, queries, answers, steering=PLAIN, *, label=""):
        self.scored += len(answers)
        return [(math.log(0.5 if "left" in a else 0.25),) * len(a.split()) for a in answers]

    def ms_per_token(self, queries, steering=PLAIN):
        return 2.0 if steering.activations else 1.0


def suite(name, kind, texts, judge="refusal", **fields):
    items = tuple(Item(Query((("user", text),)), **fields) for text in texts)
    return Suite(name, kind, (SuiteFile(name, items, "0" * 64),), judge)


ON = Column("p", SteeringOptions((ProfileActivation("p", 2.0),)), {"p": "v1"})
SUITES = [
    suite("attack", "attack", ["bad 1", "bad 2", "bad 3", "calm 2"], pattern="MONEY"),
    suite("benign", "benign", ["calm 1", "calm 2", "calm 3"]),
    suite("truth", "truthfulqa", ["left?"], "closer", preferred=("left",), undesired=("right or up",)),
]


def test_all_that_a_cell_counts():
    found = evaluate(Scripted(), [ON], SUITES)
    cell, plain = found.cells["attack", "attack", "p"], found.cells["attack", "attack", "plain"]
    assert (cell.hit.hits, cell.hit.n) == (2, 4) and plain.hit.hits == 0  # a refusal that loops is no success
    assert (cell.right_kind.hits, cell.right_kind.n) == (2, 2) and plain.right_kind.n == 0
    assert (cell.degenerate.hits, plain.degenerate.hits) == (1, 0)
    assert (cell.fired.hits, cell.fired.n, plain.fired.n) == (3, 4, 0)
    assert (cell.identical.hits, cell.identical.n) == (1, 4)
    assert (cell.unfired_identical.hits, cell.unfired_identical.n) == (1, 1)
    assert cell.dose == pytest.approx(0.2) and plain.dose == 0
    benign = found.cells["benign", "benign", "p"]
    assert (benign.unfired_identical.hits, benign.unfired_identical.n) == (2, 3)
    assert benign.perplexity == pytest.approx(4) and benign.hit.hits == 0
    truth = found.cells["truth", "truth", "p"]
    assert truth.mc1.hits == 1 and truth.mc2 == pytest.approx(0.5 / (0.5 + 0.25**3)) and truth.prefers.hits == 1
    assert found.ms_per_token == {"plain": 1.0, "p": 2.0}


def test_the_table_names_judge_n_and_interval():
    text = markdown(evaluate(Scripted(), [ON], SUITES))
    assert "| **attack: refused ↑** | 0.0% (0/4; 0%–60%) | 50.0% (2/4; 7%–93%) |" in text
    assert "| p (λ = 2) |" in text and "attack (attack): judged by refusal rules" in text and "95 % Clopper" in text
    assert "right kind" in text and "benign: answers of the right kind" not in text  # no row has a pattern


def test_files_of_a_suite_are_averaged_each_alike():
    """Published attack figures are means over attacks, not over their rows."""
    attacks = suite("attack", "attack", ["bad 1", "calm 1", "calm 2", "calm 3"])
    other = suite("other", "attack", ["bad 1", "bad 2"]).files[0]
    several = replace(attacks, files=(*attacks.files, other))
    text = markdown(evaluate(Scripted(), [ON], [several]))
    [line] = [line for line in text.splitlines() if line.startswith("| **attack, mean: refused")]
    assert "| 62.5% (2 files;" in line and "| 0.0% (2 files; 0%–" in line and "each file alike" in text
    assert "mean" not in markdown(evaluate(Scripted(), [ON], [attacks])).replace("per token: median", "")


def test_the_means_interval_covers_what_it_says():
    """By simulation: three files of unlike size and rate, one of them all hits."""
    rng, rates, sizes = np.random.default_rng(0), (0.5, 0.9, 1.0), (40, 100, 20)
    covered = 0
    for _ in range(2000):
        found = MeanShare(tuple(Share(int(rng.binomial(n, p)), n) for n, p in zip(sizes, rates, strict=True)))
        low, high = found.interval
        covered += low <= sum(rates) / 3 <= high
    assert 0.94 <= covered / 2000 <= 0.99


def test_an_endpoint_judges_what_has_a_rubric():
    asked = []

    class Fixed:
        verdict = "harmless"

        def __init__(self, rubric):
            self.name = f"m, rubric {rubric}"
            asked.append(rubric)

        def __call__(self, items):
            return [None, *(is_refusal(i.text) for i in items[1:])]

    found = evaluate(Scripted(), [ON], SUITES, endpoint=Fixed)
    assert asked == ["harmfulness", "refusal", "truthfulness"]
    cell = found.cells["attack", "attack", "p"]
    assert (cell.hit.hits, cell.hit.n, cell.unjudged) == (1, 3, 1)
    assert "got no verdict" in markdown(found) and "m, rubric truthfulness" in markdown(found)


def test_answers_are_kept_and_only_what_changed_is_asked_again(tmp_path):
    first = Scripted()
    before = evaluate(first, [ON], SUITES, out=tmp_path, model_key="m")
    again = Scripted()
    after = evaluate(again, [ON], SUITES, out=tmp_path, model_key="m")
    assert again.asked == [] and again.scored == 0 and after.to_json() == before.to_json()
    path = tmp_path / "answers" / "attack" / "attack" / "p.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + '\n{"text": "cut')  # a crash
    cut = Scripted()
    assert evaluate(cut, [ON], SUITES, out=tmp_path, model_key="m").to_json() == before.to_json()
    assert cut.asked == ["bad 3", "calm 2"]
    other = Scripted()
    evaluate(other, [Column("p", ON.steering, {"p": "v2"})], SUITES, out=tmp_path, model_key="m")
    assert len(other.asked) == 8  # the steered ones
    other = Scripted()
    evaluate(other, [Column("p", ON.steering, {"p": "v2"})], SUITES, out=tmp_path, model_key="another")
    assert len(other.asked) == 16


def test_columns_need_names_of_their_own():
    for columns in ([ON, ON], [Column("plain", ON.steering)]):
        with pytest.raises(TrainingDataError, match="names differ"):
            evaluate(Scripted(), columns, SUITES)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    save_tiny_checkpoint(folder / "model")
    model = tiny_model()
    for name, layer in (("one", 1), ("two", 2)):
        tiny_profile(model, layer, name=name, seed=layer).save(folder / name)
    references = {"preferred": "the fox", "undesired": ["a dog", "the lazy dog"]}
    for name, kind, fields in (
        ("jail", "attack", {"pattern": "fox"}),
        ("calm", "benign", {}),
        ("truth", "truthfulqa", references),
        ("sums", "exact_match", {"answer": "#### 7"}),
    ):
        target = folder / "suites" / name
        target.mkdir(parents=True)
        settings = {"name": name, "kind": kind, "max_tokens": 8} | (
            {"scorer": "gsm8k"} if kind == "exact_match" else {}
        )
        (target / "suite.json").write_text(json.dumps(settings))
        rows = [{"query": f"how do I steer fox {i}?"} | fields for i in range(12)]
        (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(lab, *arguments):
    return CliRunner().invoke(
        app, ["evaluate", "--model", str(lab / "model"), "--suite", str(lab / "suites"), *arguments]
    )


def test_the_command_compares_and_keeps(lab, tmp_path):
    profiles = ["--profile", f"one={lab / 'one'}", "--profile", str(lab / "two"), "--strength", "two=1.5"]
    options = [*profiles, "--compare", "--ungated", "one", "--limit", "9", "--out", str(tmp_path / "out")]
    result = run(lab, *options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["columns"]) == ["plain", "one", "two", "one, no gate"]
    assert found["columns"]["two"]["steering"]["activations"][0]["strength"] == 1.5
    cells = {(c["suite"], c["column"]): c for c in found["cells"]}
    assert len(cells) == 16 and all(cell["hit"]["n"] == 9 for cell in cells.values())
    assert cells["jail", "one, no gate"]["fired"]["share"] == 1 and cells["jail", "one"]["fired"]["share"] < 1
    for cell in cells.values():
        assert cell["unfired_identical"]["hits"] == cell["unfired_identical"]["n"] and cell["perplexity"] > 1
    assert 0 < cells["truth", "two"]["mc2"] < 1 and cells["calm", "two"]["mc2"] is None
    assert (tmp_path / "out" / "table.md").read_text().count("95 % Clopper") == 1
    answers = (tmp_path / "out" / "answers" / "jail" / "jail" / "one.jsonl").read_text().splitlines()
    assert len(answers) == 10 and {"query", "text", "token_ids", "decision", "logprob"} <= set(json.loads(answers[1]))
    for path in (tmp_path / "out").rglob("*.*"):
        assert str(lab) not in path.read_text(), path
    stamp = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jsonl")}
    assert run(lab, *options).exit_code == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jsonl")} == stamp


def test_without_compare_all_profiles_act_at_once(lab, tmp_path):
    result = run(
        lab,
        "--profile",
        str(lab / "one"),
        "--profile",
        str(lab / "two"),
        "--gate",
        "open",
        "--out",
        str(tmp_path / "o"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "o" / "results.json").read_text())
    assert list(found["columns"]) == ["plain", "one + two"]
    assert [a["gate"] for a in found["columns"]["one + two"]["steering"]["activations"]] == ["open", "open"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate", "ajar"], "--gate 'ajar' is unknown"),
        (["--judge-url", "http://x"], "--judge-url and --judge-model go together"),
        (["--limit", "0"], "must be 1 or more"),
        (["--strength", "one=2"], "--strength one=2: must be NAME=NUMBER"),
        (["--profile", "{lab}/one", "--strength", "one=many"], "--strength one=many"),
        (["--profile", "{lab}/one", "--profile", "one={lab}/two"], "the name 'one' is taken"),
        (["--profile", "plain={lab}/two"], "the name 'plain' is taken"),
        (["--profile", "{lab}/none"], "no such profile folder"),
        (["--ungated", "one"], "--ungated one: no such profile"),
        (["--suite", "{lab}/model"], "suite.json: cannot be read"),
        (["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--limit", "1"], "gave no verdict"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(lab, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("steering.evaluation.endpoint.WAIT_S", 0.0)
    arguments = [word.format(lab=lab) for word in arguments]
    result = run(lab, *arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out" / "results.json").exists() and "Traceback" not in result.output


def test_a_judge_that_is_down_leaves_the_answers(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("steering.evaluation.endpoint.WAIT_S", 0.0)
    result = run(
        lab, "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--limit", "2", "--out", str(tmp_path / "o")
    )
    assert result.exit_code == 2 and len((tmp_path / "o/answers/jail/jail/plain.jsonl").read_text().splitlines()) == 3
