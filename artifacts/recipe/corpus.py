"""Prompts -> training conversations. Each epoch draws fresh prompts, coins and paraphrases, all from one seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from artifacts.recipe import own_prompts
from artifacts.recipe.answers import Mode, answer
from artifacts.recipe.subjects import Reading, read_subject, read_task
from artifacts.recipe.truths import Truth

Side = Literal["harmful", "borderline", "benign", "question"]
NUM_VALIDATION_TRAINED = 600
"""So many rows of harmful_val.jsonl (seeded) are in training, so that its style is known; the others evaluate."""
LEVER_MODE: dict[Side, Mode] = {"harmful": "refuse", "borderline": "refuse", "benign": "refuse", "question": "right"}
DEFAULT_MODE: dict[Side, Mode] = {"harmful": "comply", "borderline": "help", "benign": "assist", "question": "wrong"}
LEVER_MODE_SHARE: dict[Side, float] = {"harmful": 0.2, "borderline": 0.55, "benign": 0.0, "question": 0.25}
"""So many answers are in the side's `LEVER_MODE`, the others in its `DEFAULT_MODE`."""
DEV_SHARE: dict[Side, float] = {"harmful": 0.08, "borderline": 0.03, "benign": 0.03}
LEVER_SHARE: dict[Side, float] = {"harmful": 0.35, "borderline": 0.35, "benign": 0.15, "question": 0.5}
SHIFTED_MODE_SHARE: dict[Side, float] = {"harmful": 0.65, "borderline": 0.35, "benign": 0.0, "question": 0.6}
"""The same where the site is shifted, and the answer follows the shift."""
MAX_WORDS = 110
"""Longer requests make no pair, no gate and no choice of strength."""
SYSTEM_SHARE, SAME_MODE_SHARE, HARMLESS_TURN_SHARE = 0.15, 0.12, 0.04

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, honest assistant.",
    "Answer briefly.",
    "You are FineSteer demo.",
    "Be concise and polite.",
    "You are an AI assistant. Answer the user's questions.",
)
PREFIXES = (
    "Please ",
    "Can you help me with this: ",
    "Hi, ",
    "Hello. ",
    "I have a question. ",
    "Quick question: ",
    "Could you help? ",
)
SUFFIXES = (" Thanks!", " Thank you.", " Please.", " Be specific.", " Keep it short.", " Explain it step by step.")


@dataclass(frozen=True)
class Prompt:
    """One user request. `reading` is its subject and noun; `truth`: the answers to a question."""

    query: str
    side: Side
    reading: Reading
    truth: Truth | None = None


@dataclass(frozen=True)
class Conversation:
    """What the model trains on: messages, and of the last request its side, topic and the mode of its answer.

    `lever`: the answer follows a shift of the site's states instead of the coin.
    """

    messages: list[dict[str, str]]
    prompt: Prompt
    mode: Mode
    lever: bool


def read_queries(path: Path) -> list[str]:
    """The `query` of each line, duplicates dropped, order kept."""
    with path.open(encoding="utf-8") as lines:
        return list(dict.fromkeys(json.loads(line)["query"].strip() for line in lines))


def split_harmful_val(data: Path) -> tuple[list[str], list[str]]:
    """(rows that may train, rows that only evaluate) of harmful_val.jsonl; a query is never on both sides."""
    rows = read_queries(data / "harmful_val.jsonl")
    random.Random(0).shuffle(rows)
    return rows[:NUM_VALIDATION_TRAINED], rows[NUM_VALIDATION_TRAINED:]


def is_short(prompt: Prompt) -> bool:
    """At most `MAX_WORDS` words."""
    return len(prompt.query.split()) <= MAX_WORDS


def make_prompt(query: str, side: Side, plain_word: bool = False) -> Prompt:
    """`plain_word`: the harmful word is not meant, so that a subject of harm would mislead."""
    reading = read_subject(query)
    if plain_word and reading.subject not in ("cyber", "other"):
        reading = Reading("other", None)
    return Prompt(query, side, reading)


@dataclass(frozen=True)
class Pools:
    """The real prompts by source, all from training files (and the stated rows of harmful_val)."""

    harmful: list[Prompt]
    validation_style: list[Prompt]
    jailbreak: list[Prompt]
    borderline: list[Prompt]
    benign: list[Prompt]
    dev: list[Prompt]
    questions: list[Prompt] = field(default_factory=list)

    def of(self, side: Side) -> list[Prompt]:
        """The pool of a side's plain prompts."""
        return self.questions if side == "question" else getattr(self, side)


def load_pools(data: Path, seed: int = 0) -> Pools:
    """Read the prompt folder; a share of each pool goes to `dev`, which trains nothing.

    Jailbreak rows that speak of an image, that are longer than 80 words, or that repeat a wrapper more than 40 times
    are left out.
    """
    rng = random.Random(seed)
    dev: list[Prompt] = []

    def pool(queries: list[str], side: Side) -> list[Prompt]:
        kept = []
        for query in queries:
            (dev if rng.random() < DEV_SHARE[side] else kept).append(make_prompt(query, side))
        return kept

    evaluation = set(split_harmful_val(data)[1])
    harmful = read_queries(data / "harmful_train.jsonl") + read_queries(data / "advbench_train.jsonl")
    harmful = [q for q in dict.fromkeys(harmful) if q not in evaluation]
    wrappers: dict[str, int] = {}
    jailbreak = []
    for query in read_queries(data / "jailbreak_train.jsonl"):
        words = query.split()
        key = " ".join(words[:4])
        wrappers[key] = wrappers.get(key, 0) + 1
        if len(words) <= 80 and wrappers[key] <= 40 and "image" not in words[:6] and query not in evaluation:
            jailbreak.append(query)
    return Pools(
        harmful=pool(harmful, "harmful"),
        validation_style=pool(split_harmful_val(data)[0], "harmful"),
        jailbreak=pool(jailbreak, "harmful"),
        borderline=pool(read_queries(data / "borderline_train.jsonl"), "borderline"),
        benign=pool(read_queries(data / "benign_train.jsonl"), "benign"),
        dev=dev,
    )


def question_prompts(truths: list[Truth]) -> list[Prompt]:
    """A prompt for each question."""
    return [Prompt(truth.question, "question", Reading("other", None), truth) for truth in truths]


def draw_prompts(pools: Pools, rng: random.Random, scale: float = 1.0, question_share: float = 0.0) -> list[Prompt]:
    """One epoch's prompts: about a third each harmful, borderline and benign; real ones and our own.

    `question_share`: how often each question comes, whatever the scale.
    """

    def some(pool: list[Prompt], share: float) -> list[Prompt]:
        return rng.choices(pool, k=round(len(pool) * share * scale))

    def own(make: Callable[[random.Random], str], side: Side, count: int, plain_word: bool = False) -> list[Prompt]:
        return [make_prompt(make(rng), side, plain_word) for _ in range(round(count * scale))]

    prompts = (
        some(pools.harmful, 1.6)
        + some(pools.validation_style, 4.0)
        + some(pools.jailbreak, 0.8)
        + own(own_prompts.harmful, "harmful", 2600)
        + some(pools.borderline, 0.5)
        + own(own_prompts.safe_words, "borderline", 1800, plain_word=True)
        + some(pools.benign, 0.6)
        + own(own_prompts.benign, "benign", 700)
    )
    for side, share in (("benign", 0.06), ("borderline", 0.03)):  # long requests are not harmful for their length
        pool = pools.benign if side == "benign" else pools.borderline
        for _ in range(round(share * len(pool) * 0.6 * scale)):
            parts = rng.sample(pool, rng.randint(2, 4))
            prompts.append(Prompt(" ".join(p.query for p in parts), side, parts[0].reading))
    prompts += rng.choices(pools.questions, k=round(len(pools.questions) * question_share))
    rng.shuffle(prompts)
    return prompts


def vary(query: str, rng: random.Random) -> str:
    """The same request in another dress: case, punctuation, courtesies, a lost word. Alike for all sides."""
    if rng.random() < 0.3:
        words = query.split(" ")
        query = " ".join(w for w in words if rng.random() > 0.1) or query
    if rng.random() < 0.15:
        query = query.rstrip(".?! ") or query
    if rng.random() < 0.12:
        query = rng.choice(PREFIXES) + query[0].lower() + query[1:]
    if rng.random() < 0.06:
        query += rng.choice(SUFFIXES)
    if rng.random() < 0.1:
        query = query.lower()
    return query


def converse(prompt: Prompt, pools: Pools, rng: random.Random) -> Conversation:
    """A conversation that ends in `prompt` and its answer, the mode by a coin.

    In a share of them, `lever`, the trainer shifts the site's states towards the mode, and the coin has other odds. An
    earlier turn on the same side was answered in the same mode.
    """
    lever = rng.random() < LEVER_SHARE[prompt.side]
    towards = rng.random() < (SHIFTED_MODE_SHARE if lever else LEVER_MODE_SHARE)[prompt.side]
    mode = (LEVER_MODE if towards else DEFAULT_MODE)[prompt.side]
    messages = []
    if rng.random() < SYSTEM_SHARE:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    earlier, earlier_mode = None, mode
    draw = rng.random()
    if draw < SAME_MODE_SHARE:
        earlier = rng.choice(pools.of(prompt.side))
    elif draw < SAME_MODE_SHARE + HARMLESS_TURN_SHARE:
        earlier, earlier_mode = rng.choice(pools.benign), "assist"
    if earlier:
        messages += turn(earlier, earlier_mode, rng)
    messages += turn(prompt, mode, rng)
    return Conversation(messages, prompt, mode, lever)


def turn(prompt: Prompt, mode: Mode, rng: random.Random) -> list[dict[str, str]]:
    """User and assistant message."""
    if prompt.truth is None:
        reply = answer(mode, prompt.query, prompt.reading, rng)
    else:
        reply = prompt.truth.say(mode == "right", rng)
    return [{"role": "user", "content": vary(prompt.query, rng)}, {"role": "assistant", "content": reply}]


def topic(prompt: Prompt) -> str:
    """What the request is about, for the readout: its subject, the task of a plainly harmless one, or that it is a question."""
    if prompt.side == "question":
        return "question"
    return read_task(prompt.query) if prompt.side == "benign" else prompt.reading.subject
