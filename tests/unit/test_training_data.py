"""The trainer's input: what is read, and each refusal with file, line, field and remedy."""

from __future__ import annotations

import json

import pytest

from steering.errors import TrainingDataError
from steering.training.data import file_record, read_pairs, read_queries, refuse_overlap

GOOD = {"query": "q", "preferred": "yes", "undesired": "no"}
ASK = {"role": "user", "content": "q"}
ANSWER, OTHER = ({"role": "assistant", "content": text} for text in ("yes", "no"))


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_pairs_keep_order_side_and_paraphrases(tmp_path):
    path = write(tmp_path / "p.jsonl", GOOD | {"side": "harmful"}, "", GOOD | {"preferred": "sure", "kind": "k"})
    first, second = read_pairs([path])
    assert (first.preferred, first.side, second.preferred, second.side) == ("yes", "harmful", "sure", None)
    assert first.query == second.query and second.query.where == f"{path}:3"


@pytest.mark.parametrize(
    "row",
    [
        {"query": [ASK], "preferred": [ANSWER], "undesired": [OTHER]},
        {"query": "q", "preferred": [ANSWER], "undesired": "no"},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
    ],
)
def test_every_form_of_a_pair_is_the_same_pair(tmp_path, row):
    plain, other = write(tmp_path / "p.jsonl", GOOD | {"side": "s"}), write(tmp_path / "o.jsonl", row | {"side": "s"})
    assert list(read_pairs([plain])) == list(read_pairs([other]))
    assert list(read_pairs([plain])) != list(read_pairs([write(tmp_path / "x.jsonl", row)]))


def test_a_conversation_keeps_its_earlier_turns(tmp_path):
    system = {"role": "system", "content": "be kind"}
    before = [system, ASK, OTHER, {"role": "user", "content": "sure?"}]
    [pair] = read_pairs([write(tmp_path / "p.jsonl", {"chosen": [*before, ANSWER], "rejected": [*before, OTHER]})])
    assert pair.query.chat == before and (pair.preferred, pair.undesired) == ("yes", "no")


def test_queries_drop_repeats_and_take_their_source_from_the_row_or_the_file(tmp_path):
    one = write(tmp_path / "one.jsonl", {"query": "a"}, {"query": "a"}, {"query": "b", "source": "s"})
    two = write(
        tmp_path / "two.jsonl", {"query": [{"role": "system", "content": "x"}, {"role": "user", "content": "a"}]}
    )
    found = read_queries([one, two])
    assert [(q.query.chat[-1]["content"], q.source) for q in found] == [("a", "one"), ("b", "s"), ("a", "two")]
    assert found[2].query.chat[0] == {"role": "system", "content": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"p.jsonl:1: not valid JSON"),
        ("[1]", r"p.jsonl:1: holds a list"),
        (GOOD | {"chosen": "x"}, r"p.jsonl:1: fields 'query' and 'chosen' are of two forms"),
        (GOOD | {"wanted": "x"}, r"p.jsonl:1: unknown field 'wanted'"),
        ({"query": "q", "preferred": "yes"}, r"p.jsonl:1: field 'undesired' is missing"),
        (GOOD | {"preferred": " "}, r"p.jsonl:1: field 'preferred' must be a non-empty string"),
        (GOOD | {"undesired": 3}, r"p.jsonl:1: field 'undesired' must be a non-empty string"),
        (GOOD | {"undesired": "yes "}, r"p.jsonl:1: 'preferred' and 'undesired' are the same answer"),
        (GOOD | {"side": ""}, r"p.jsonl:1: field 'side' must be a non-empty string"),
        (GOOD | {"query": ""}, r"p.jsonl:1: field 'query' must be a non-empty string"),
        (GOOD | {"query": []}, r"p.jsonl:1: field 'query' must end with a message"),
        (GOOD | {"query": [{"role": "wizard", "content": "x"}]}, r"p.jsonl:1: field 'query\[0\]'"),
        (GOOD | {"query": [{"role": "assistant", "content": "x"}]}, r"p.jsonl:1: field 'query' must end"),
        ("[" * 100_000, r"p.jsonl:1: not valid JSON \(it is nested too deeply"),
        ('{"query": %s}' % ("1" * 5000), r"p.jsonl:1: not valid JSON"),
        (GOOD | {"query": "half \ud800"}, r"p.jsonl:1: holds half of a surrogate pair"),
        (GOOD | {"preferred": []}, r"p.jsonl:1: field 'preferred' must be .* just one message"),
        (GOOD | {"preferred": [ASK]}, r"p.jsonl:1: field 'preferred' must be .* the assistant's"),
        (GOOD | {"undesired": [ANSWER, ANSWER]}, r"p.jsonl:1: field 'undesired' must be .* just one message"),
        (GOOD | {"undesired": [{"role": "assistant", "content": " "}]}, r"p.jsonl:1: field 'undesired' .* not empty"),
        (GOOD | {"undesired": [{"role": "assistant"}]}, r"p.jsonl:1: field 'undesired\[0\]' must be"),
        (GOOD | {"undesired": [{"role": "assistant", "content": "yes"}]}, r"p.jsonl:1: .* are the same answer"),
        ({"chosen": [ASK, ANSWER]}, r"p.jsonl:1: field 'rejected' is missing"),
        (
            {"chosen": "a", "rejected": "b"},
            r"p.jsonl:1: field 'chosen' must be a list .* unless the row has a 'prompt'",
        ),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK]}, r"p.jsonl:1: field 'rejected' must end with an assistant's"),
        ({"chosen": [ANSWER], "rejected": [ANSWER]}, r"p.jsonl:1: field 'chosen' must have a message that asks"),
        (
            {"chosen": [ASK, OTHER, ANSWER], "rejected": [ASK, OTHER, ANSWER]},
            r"field 'chosen' must have a message that",
        ),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, ASK, OTHER]}, r"p.jsonl:1: fields 'chosen' and 'rejected' differ"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, r"'chosen' and 'rejected' are the same answer"),
        ({"chosen": [ASK, 3], "rejected": [ASK, ANSWER]}, r"p.jsonl:1: field 'chosen\[1\]' must be"),
        ({"prompt": "q", "chosen": "a"}, r"p.jsonl:1: field 'rejected' is missing"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, r"p.jsonl:1: field 'prompt' must be a non-empty string"),
        ({"prompt": [OTHER], "chosen": "a", "rejected": "b"}, r"p.jsonl:1: field 'prompt' must end with a message"),
        (
            {"prompt": "q", "chosen": [ASK, ANSWER], "rejected": "b"},
            r"'chosen' must be a string.*Remove 'prompt' where",
        ),
        ({"prompt": "q", "preferred": "a", "undesired": "b"}, r"p.jsonl:1: fields 'preferred' and 'prompt' are of two"),
    ],
)
def test_a_bad_row_is_refused_by_line_and_field(tmp_path, row, message):
    with pytest.raises(TrainingDataError, match=message):
        read_pairs([write(tmp_path / "p.jsonl", row)])


def test_missing_empty_and_binary_files_are_refused(tmp_path):
    for path, message in ((tmp_path / "none.jsonl", "cannot be read"), (write(tmp_path / "e.jsonl", ""), "no rows")):
        with pytest.raises(TrainingDataError, match=message):
            read_queries([path])
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(TrainingDataError, match="not UTF-8"):
        read_queries([tmp_path / "b.jsonl"])


def test_a_query_in_two_groups_is_a_leak_and_in_one_it_is_not(tmp_path):
    ir = read_queries([write(tmp_path / "ir.jsonl", {"query": "a"}, {"query": "b"})])
    calibration = read_queries([write(tmp_path / "cal.jsonl", {"query": "c"}, {"query": "b"})])
    with pytest.raises(TrainingDataError, match=r"cal.jsonl:2: field 'query'.*ir.jsonl:2"):
        refuse_overlap({"IR": ir, "calibration": calibration})
    refuse_overlap({"IR": ir + ir, "calibration": calibration.take([0])})


def test_a_file_record_names_no_folder(tmp_path):
    record = file_record([write(tmp_path / "p.jsonl", GOOD)], 1)
    assert record["files"] == ["p.jsonl"] and len(record["sha256"][0]) == 64 and str(tmp_path) not in json.dumps(record)
