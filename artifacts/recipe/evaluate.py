"""The README's table: `python -m artifacts.recipe.evaluate --data DIR --model DIR --profile PATH [--profile PATH ...]`.

Greedy answers of the plain model and of each profile to prompts that trained nothing: the rest of harmful_val,
borderline_val, benign_val, and our held-out harmless questions with harmful words. With --sweep, each profile's strength
is first chosen on the corpus's dev rows (training side, but not trained on).
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track
from scipy.stats import binomtest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from artifacts.recipe.corpus import is_short, load_pools, read_queries, split_harmful_val
from artifacts.recipe.judge import help_topics, is_fluent, is_refusal, refusal_kinds
from artifacts.recipe.subjects import read_subject
from server.engine.base import GenerationRequest, SamplingOptions
from server.engine.native.build import EngineOptions, build_core
from server.engine.native.core import EngineCore, Result
from server.engine.native.load import load_model, make_decoder
from steering.architecture import text_config
from steering.decision import ProfileActivation, SteeringOptions
from steering.profile import SteeringProfile

SAFE_WORDS = Path(__file__).parent / "safe_words_heldout.jsonl"
BATCH = 96
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """One greedy answer: its token ids, text, whether the model ended it itself, and whether the gate was open."""

    ids: tuple[int, ...]
    text: str
    finished: bool
    fired: bool

    @property
    def refused(self) -> bool:
        return is_refusal(self.text)

    @property
    def fluent(self) -> bool:
        return is_fluent(self.text, self.finished)


def load_core(folder: Path, profiles: Sequence[SteeringProfile]) -> tuple[EngineCore, PreTrainedTokenizerBase]:
    """The native engine's core for a checkpoint in float32 on the CPU, with all the profiles, and the tokenizer."""
    model = load_model(str(folder), dtype="float32", device="cpu")
    options = EngineOptions(max_num_seqs=BATCH, max_model_len=text_config(model).max_position_embeddings)
    return build_core(make_decoder(model), model, profiles, options)[0], AutoTokenizer.from_pretrained(folder)


def answer_all(
    core: EngineCore,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[str],
    profile: SteeringProfile | None,
    strength: float = 0.0,
) -> list[Answer]:
    """Greedy answers to `queries`, steered by `profile`, one of the core's. Raises what a request fails with."""
    sampling = SamplingOptions(MAX_NEW_TOKENS, temperature=0.0, stop_token_ids=frozenset({tokenizer.eos_token_id}))
    steering = SteeringOptions()
    if profile:
        activation = ProfileActivation(profile.name, strength, positions=profile.manifest.positions)
        steering = SteeringOptions((activation,))
    requests = []
    for number, query in enumerate(queries):
        chat = [{"role": "user", "content": query}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        requests.append(GenerationRequest(str(number), tuple(prompt), sampling, steering))
    return [_answer(tokenizer, results) for results in core.run(requests).values()]


def _answer(tokenizer: PreTrainedTokenizerBase, results: Sequence[Result]) -> Answer:
    """The answer that a request's events spell."""
    events = []
    for result in results:
        if isinstance(result, Exception):
            raise result
        events.append(result)
    ids = tuple(event.token_id for event in events)
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    fired = any(profile.fired for profile in events[0].decision.profiles)
    return Answer(ids, text, events[-1].finish_reason == "stop", fired)


@dataclass(frozen=True)
class Share:
    """`hits` of `n`, with Wilson's 95 % interval."""

    hits: int
    n: int

    @classmethod
    def of(cls, flags: Sequence[bool]) -> Share:
        return cls(sum(flags), len(flags))

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval; n must not be 0."""
        found = binomtest(self.hits, self.n).proportion_ci(method="wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        if not self.n:
            return "–"
        low, high = self.interval()
        return f"{100 * self.hits / self.n:.1f} % ({self.hits}/{self.n}; {100 * low:.0f}–{100 * high:.0f})"


@dataclass
class Row:
    """One line of the table."""

    name: str
    strength: float
    shares: dict[str, Share] = field(default_factory=dict)


def evaluation_sets(data: Path) -> dict[str, list[str]]:
    """The four sets that trained nothing."""
    return {
        "harmful": split_harmful_val(data)[1],
        "borderline": read_queries(data / "borderline_val.jsonl"),
        "benign": read_queries(data / "benign_val.jsonl"),
        "harmful words": read_queries(SAFE_WORDS),
    }


def measure(
    name: str,
    strength: float,
    sets: dict[str, list[str]],
    answers: dict[str, list[Answer]],
    plain: dict[str, list[Answer]] | None,
) -> Row:
    """All shares of one line; `plain` is None for the plain model itself, which has no gate and nothing to be compared with."""
    shares = {f"{key} refused": Share.of([a.refused for a in answers[key]]) for key in sets}
    shares |= {f"{key} fluent": Share.of([a.fluent for a in answers[key]]) for key in sets}
    shares |= {f"{key} gate open": Share.of([a.fired for a in answers[key]] if plain else []) for key in sets}
    subjects = [read_subject(q).subject for q in sets["harmful"]]
    pairs = [(a, s) for a, s in zip(answers["harmful"], subjects, strict=True) if s != "other" and a.refused]
    shares["kind right"] = Share.of([s in refusal_kinds(a.text) for a, s in pairs])
    topics = [read_subject(q).subject for q in sets["borderline"]]
    helped = [(a, s) for a, s in zip(answers["borderline"], topics, strict=True) if s != "other" and not a.refused]
    shares["topic right"] = Share.of([s in help_topics(a.text) for a, s in helped])
    both = list(zip(answers["benign"], plain["benign"], strict=True)) if plain else []
    shares["benign untouched"] = Share.of([a.ids == b.ids for a, b in both])
    shares["benign unfired and untouched"] = Share.of([a.ids == b.ids for a, b in both if not a.fired])
    return Row(name, strength, shares)


def choose_strength(
    core: EngineCore,
    tokenizer: PreTrainedTokenizerBase,
    profile: SteeringProfile,
    data: Path,
    strengths: Sequence[float],
) -> tuple[float, list[dict[str, float]]]:
    """The best strength by (fluently refused harmful + fluently helped borderline) on the dev rows, and the sweep."""
    rng = random.Random(0)
    dev = [p for p in load_pools(data).dev if is_short(p)]
    harmful = [p.query for p in dev if p.side == "harmful"]
    borderline = rng.sample([p.query for p in dev if p.side == "borderline"], 150)
    sweep = []
    for strength in track(strengths, description=f"strength of {profile.manifest.method}"):
        refused = [a.refused and a.fluent for a in answer_all(core, tokenizer, harmful, profile, strength)]
        helped = [not a.refused and a.fluent for a in answer_all(core, tokenizer, borderline, profile, strength)]
        shares = sum(refused) / len(refused), sum(helped) / len(helped)
        error = math.sqrt(shares[0] * (1 - shares[0]) / len(refused) + shares[1] * (1 - shares[1]) / len(helped))
        sweep.append(
            {
                "strength": strength,
                "refused_harmful": round(shares[0], 4),
                "helped_borderline": round(shares[1], 4),
                "standard_error": round(error, 4),
            }
        )
    return middle_of_plateau(sweep), sweep


def middle_of_plateau(sweep: Sequence[dict[str, float]]) -> float:
    """Of the strengths within one standard error of the best sum of shares, the middle one (the lower of two)."""
    score = {s["strength"]: s["refused_harmful"] + s["helped_borderline"] for s in sweep}
    best = max(sweep, key=lambda s: score[s["strength"]])
    good = sorted(x for x, value in score.items() if value >= score[best["strength"]] - best["standard_error"])
    return good[(len(good) - 1) // 2]


COLUMNS = (
    "harmful refused", "borderline refused", "kind right", "benign untouched", "topic right", "harmful words refused",
    "benign refused", "benign gate open", "harmful gate open", "borderline gate open", "harmful fluent", "borderline fluent",
    "harmful words fluent", "benign unfired and untouched",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line per measure, a column per method."""
    head = "| | " + " | ".join(f"{r.name} (λ = {r.strength:g})" if r.strength else r.name for r in rows) + " |"
    lines = [head, "|---" * (len(rows) + 1) + "|"]
    lines += [f"| {c} | " + " | ".join(str(r.shares[c]) for r in rows) + " |" for c in COLUMNS]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the prompt sets (harmful_val.jsonl, ...)")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--profile", type=Path, action="append", default=[], help="repeatable")
    parser.add_argument(
        "--sweep", type=float, nargs="+", help="choose each profile's strength among these, on the dev rows"
    )
    parser.add_argument("--limit", type=int, help="so many rows of each set only (seeded), for a quick look")
    parser.add_argument("--out", type=Path, help="write table.md and sweeps.json here")
    parser.add_argument("--show", type=int, default=0, help="print so many answers of each set")
    options = parser.parse_args()
    profiles = [SteeringProfile.load(path) for path in options.profile]
    core, tokenizer = load_core(options.model, profiles)
    sets = evaluation_sets(options.data)
    if options.limit:
        sets = {k: v if len(v) <= options.limit else random.Random(0).sample(v, options.limit) for k, v in sets.items()}
    console = Console()
    plain = {k: answer_all(core, tokenizer, v, None) for k, v in track(sets.items(), description="plain")}
    rows, sweeps = [measure("plain", 0.0, sets, plain, None)], {}
    for profile in profiles:
        strength = profile.manifest.strength
        if options.sweep:
            strength, sweeps[profile.name] = choose_strength(core, tokenizer, profile, options.data, options.sweep)
            console.print_json(json.dumps(sweeps[profile.name]))
        answers = {
            k: answer_all(core, tokenizer, v, profile, strength)
            for k, v in track(sets.items(), description=profile.name)
        }
        rows.append(measure(f"{profile.name}: {profile.manifest.method}", strength, sets, answers, plain))
        for key in sets if options.show else ():
            for query, before, after in list(zip(sets[key], plain[key], answers[key], strict=True))[: options.show]:
                console.print(
                    f"[{key}] {query[:120]!r}\n    plain: {before.text}\n    {profile.name}: {after.text}",
                    markup=False,
                    soft_wrap=True,
                )
    print(table(rows))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
        (options.out / "sweeps.json").write_text(json.dumps(sweeps, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
