"""Grammars in the native engine: against transformers' logits, beside rows that have none, over preemptions and failures."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from llguidance import LLMatcher

from server.engine.base import GenerationError, TokenEvent
from server.engine.native.sequence import SequenceGroup
from server.grammar.matcher import CompiledGrammar
from server.grammar.schema import schema_texts
from server.grammar.vocabulary import build_tokenizer
from server.prompting.vocabulary import Vocabulary
from steering.decision import ProfileActivation
from tests.engine import answers, asked, carry_out, reference_model, tiny_core
from tests.tiny import VOCAB_SIZE, tiny_profile, tiny_tokenizer

PROMPT = [5, 9, 2, 14, 33, 7, 21]
OTHERS = [[40, 41, 42], [8, 3, 77, 12, 90, 61, 4, 55, 23, 19, 11, 2], [100, 7]]
EOS = 3
LETTERS = "start: /[a-z ]{200}/"  # longer than any answer here
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 6}, "b": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
rows_and_pages = pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])


@functools.cache
def vocabulary():
    return Vocabulary(tiny_tokenizer())


@functools.cache
def compiled(grammar):
    return CompiledGrammar(build_tokenizer(vocabulary(), {EOS}, VOCAB_SIZE), grammar)


def lark(text):
    return compiled(LLMatcher.grammar_from_lark(text))


def schema():
    return compiled(LLMatcher.grammar_from_json_schema(schema_texts(SCHEMA, strict=True)[0]))


def text(token_ids):
    return b"".join(map(vocabulary().text_bytes, token_ids)).decode()


class Watched:
    """A grammar of which each state keeps what it was told; it gives up where it is told to."""

    def __init__(self, inner, fails_in=None, after=2):
        self.inner, self.fails_in, self.after, self.states = inner, fails_in, after, []

    def begin(self):
        self.states.append(WatchedState(self))
        return self.states[-1]


class WatchedState:
    def __init__(self, grammar):
        self.grammar, self.state, self.accepted, self.num_masks = grammar, grammar.inner.begin(), [], 0

    def _fail(self, where):
        if self.grammar.fails_in == where and len(self.accepted) == self.grammar.after:
            raise GenerationError("no further", "grammar_failed")

    def mask(self):
        self._fail("mask")
        self.num_masks += 1
        return self.state.mask()

    def accept(self, token_id):
        self._fail("accept")
        self.accepted.append(token_id)
        self.state.accept(token_id)

    @property
    def finished(self):
        return self.state.finished


@rows_and_pages
def test_greedy_is_the_likeliest_of_the_allowed_by_transformers_logits(paged):
    spellable = [
        i for i in range(VOCAB_SIZE)
        if (raw := vocabulary().text_bytes(i)) and all(byte in b"abcdefghijklmnopqrstuvwxyz " for byte in raw)
    ]  # fmt: skip
    assert 27 <= len(spellable) < 100
    wanted = []
    for _ in range(12):
        with torch.no_grad():
            logits = reference_model()(torch.tensor([PROMPT + wanted])).logits[0, -1]
        wanted.append(max(spellable, key=lambda i: float(logits[i])))
    found = answers(tiny_core(paged=paged), [asked("g", PROMPT, max_tokens=12, grammar=lark(LETTERS))])["g"]
    assert found.tokens() == wanted
    assert found.completions[0][-1].finish_reason == "length"
    plain = answers(tiny_core(paged=paged), [asked("g", PROMPT, max_tokens=12)])["g"]
    assert plain.tokens() != wanted, "the grammar does something"


@rows_and_pages
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_plain_rows_beside_a_grammar_are_unchanged_bit_for_bit(paged, temperature):
    def run(grammar):
        requests = [
            asked(str(i), p, max_tokens=10, temperature=temperature, seed=i, grammar=grammar if i % 2 else None)
            for i, p in enumerate([PROMPT, *OTHERS])
        ]
        return answers(tiny_core(paged=paged), requests)

    beside, alone = run(lark(LETTERS)), run(None)
    for i in range(4):
        assert (beside[str(i)].numbers == alone[str(i)].numbers) == (i % 2 == 0)


@rows_and_pages
def test_each_of_n_completions_goes_its_own_way(paged):
    grammar = Watched(schema())
    found = answers(
        tiny_core(paged=paged), [asked("n", PROMPT, n=3, max_tokens=50, temperature=1.0, seed=1, grammar=grammar)]
    )["n"]
    assert len({text(found.tokens(i)) for i in range(3)}) == 3
    for index, state in enumerate(grammar.states):
        assert set(json.loads(text(found.tokens(index)))) == {"a", "b"}
        assert found.completions[index][-1].finish_reason == "stop"
        assert state.accepted == found.tokens(index), "moved on once for each token"
        assert state.num_masks == len(state.accepted), "no mask is computed in vain"


def test_it_ends_without_an_end_token_whatever_the_request_says_of_ends():
    options = [
        {},
        {"stop_token_ids": frozenset({EOS})},
        {"stop_token_ids": frozenset({EOS}), "min_tokens": 45},
        {"logit_bias": {i: -100.0 for i in range(VOCAB_SIZE) if b"}" in vocabulary().text_bytes(i)}},
    ]
    requests = [asked(str(i), PROMPT, max_tokens=50, grammar=schema(), **o) for i, o in enumerate(options)]
    for answer in answers(tiny_core(), requests).values():
        assert text(answer.tokens())[-1] == "}" and EOS not in answer.tokens()
        assert answer.completions[0][-1].finish_reason == "stop"


@pytest.mark.parametrize("ends", [frozenset({EOS}), frozenset()], ids=["end token", "no end token"])
def test_where_it_may_go_on_only_the_end_token_ends_it(ends):
    biased = {"logit_bias": {EOS: 100.0}, "stop_token_ids": ends}
    [answer] = answers(tiny_core(), [asked("r", PROMPT, grammar=lark("start: /[a-c]{2,}/"), **biased)]).values()
    assert len(answer.tokens()) <= 3 and answer.tokens()[-1] == EOS and set(text(answer.tokens())) <= set("abc")
    assert answer.completions[0][-1].finish_reason == "stop"


def test_the_last_token_that_fits_may_finish_it():
    [whole] = answers(tiny_core(), [asked("r", PROMPT, max_tokens=50, grammar=schema())]).values()
    length = len(whole.tokens())
    for most, reason in ((length, "stop"), (length - 1, "length")):
        [found] = answers(tiny_core(), [asked("r", PROMPT, max_tokens=most, grammar=schema())]).values()
        assert found.tokens() == whole.tokens()[:most]
        assert found.completions[0][-1].finish_reason == reason


@rows_and_pages
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preempted_in_mid_sentence_it_goes_on_where_it_was(paged, temperature):
    def run(preempt):
        grammar = Watched(schema())
        core = tiny_core(paged=paged)

        def after_step(step):
            for group in core.scheduler.groups:
                if preempt and step in (2, 5, 6) and group.request.request_id == "g":
                    core.scheduler._preempt(group.sequences[1])

        options = {"temperature": temperature, "seed": 3}
        requests = [
            asked("g", PROMPT, n=2, max_tokens=50, grammar=grammar, **options),
            asked("plain", OTHERS[0], max_tokens=30, **options),
        ]
        found = carry_out(core, [(0, request) for request in requests], after_step)
        assert core.stats().num_preemptions == (3 if preempt else 0)
        assert [state.accepted for state in grammar.states] == [found["g"].tokens(i) for i in range(2)]
        return {name: [answer.tokens(i) for i in range(len(answer.completions))] for name, answer in found.items()}

    assert run(True) == run(False)


@rows_and_pages
@pytest.mark.parametrize("where", ["mask", "accept"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_grammar_that_gives_up_ends_its_request_alone(paged, where, after):
    core = tiny_core(paged=paged)
    good = [asked("plain", OTHERS[0], max_tokens=10), asked("sound", OTHERS[1], max_tokens=10, grammar=lark(LETTERS))]
    bad = asked("bad", PROMPT, n=2, grammar=Watched(lark(LETTERS), where, after))
    results = core.run([good[0], bad, good[1]])
    *events, failure = results["bad"]
    assert isinstance(failure, GenerationError) and (str(failure), failure.code) == ("no further", "grammar_failed")
    assert all(isinstance(event, TokenEvent) for event in events) and len(events) == 2 * after
    wanted = answers(tiny_core(paged=paged), good)
    for request in good:
        assert [e.token_id for e in results[request.request_id]] == wanted[request.request_id].tokens()
    stats = core.stats()
    assert (stats.num_running, stats.kv_cache_usage) == (0, 0)


def test_scoring_takes_no_notice_of_a_grammar():
    core = tiny_core()
    core.add(SequenceGroup.of(asked("r", PROMPT, grammar=schema()), lambda _: None, score_only=True))
    [(_, decision)] = core.step()
    assert not decision.applied and not core.has_work


@pytest.mark.parametrize("strength", [3.0, 40.0, -40.0])
def test_a_steered_row_keeps_to_the_grammar(strength):
    profile = tiny_profile(reference_model(), name="p", strength=3.0)
    opened = ProfileActivation("p", strength, gate="open")
    requests = [
        asked(str(seed), PROMPT, *activations, max_tokens=50, temperature=1.0, seed=seed, grammar=schema())
        for seed, activations in enumerate([(opened,), ()] * 4)
    ]
    for answer in answers(tiny_core([profile]), requests).values():
        assert set(json.loads(text(answer.tokens()))) == {"a", "b"}
