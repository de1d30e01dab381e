"""Tokens as the grammar engine sees them: what is forced is spelt as the tokenizer would, and nothing special gets in."""

from __future__ import annotations

import codecs
import json

import pytest
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from server.prompting.vocabulary import Vocabulary
from tests.grammars import allowed, byte_level, compiler_for, pieces, spelt, walk

MARKER = "<tool_call>"
TOKENIZERS = {
    "no marker": byte_level,
    "marker": lambda: byte_level(AddedToken(MARKER, special=False, normalized=False)),
    "special marker": lambda: byte_level(AddedToken(MARKER, special=True, normalized=False)),
    "pieces": pieces,
}
FREE = "start: /(.|\\n)*/"
every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


async def const(compiler, value):
    return await compiler.json_schema({"const": value}, strict=True, what="it", param="p")


@every_tokenizer
@pytest.mark.parametrize("padding", [0, 1, 75])
async def test_forced_text_is_cut_as_the_tokenizer_cuts_it(kind, padding):
    tokenizer = TOKENIZERS[kind]()
    value = {"hello world": "the cat", "quick brown": ["naïve", "日本語 🙂"]}
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    grammar = await const(compiler_for(tokenizer, padding), value)
    for seed in range(5):
        ids = walk(grammar, seed)
        assert json.loads(spelt(tokenizer, ids)) == value
    bare = 'start: "' + text.replace('"', '\\"') + '"'
    ids = walk(await compiler_for(tokenizer, padding).lark(bare, what="it", param="p"), 0)
    ids = [i for i in ids if i != tokenizer.eos_token_id]
    assert spelt(tokenizer, ids) == text
    sentinel = tokenizer.encode("\x02", add_special_tokens=False)
    assert sentinel + ids == tokenizer.encode("\x02" + text, add_special_tokens=False)


@pytest.mark.parametrize("kind", ["no marker", "marker", "special marker"])
async def test_a_marker_is_plain_text_to_lark_whether_the_tokenizer_has_it_or_not(kind):
    tokenizer = TOKENIZERS[kind]()
    grammar = await compiler_for(tokenizer, markers=(MARKER,)).lark(
        f'start: "{MARKER}" /[ab]/ "</tool_call>"', what="it", param="p"
    )
    marker = tokenizer.convert_tokens_to_ids(MARKER)
    if kind == "no marker":
        assert marker is None
    else:
        assert allowed(grammar.begin().mask()) == [marker]
    raw_bytes = Vocabulary(tokenizer).raw_bytes
    walks = [[i for i in walk(grammar, seed) if i != tokenizer.eos_token_id] for seed in range(8)]
    assert {b"".join(map(raw_bytes, ids)).decode() for ids in walks} == {
        f"{MARKER}{letter}</tool_call>" for letter in "ab"
    }


def begins_text(tokenizer, token_id):
    """Whether a token's bytes are the beginning of some UTF-8 text."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(Vocabulary(tokenizer).raw_bytes(token_id))
    except UnicodeDecodeError:
        return False
    return True


@every_tokenizer
@pytest.mark.parametrize("padding", [0, 40])
async def test_special_tokens_and_padding_are_never_allowed_but_the_end_where_one_may_be(kind, padding):
    tokenizer = TOKENIZERS[kind]()
    grammar = await compiler_for(tokenizer, padding).lark(FREE, what="it", param="p")
    found = set(allowed(grammar.begin().mask()))
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    assert found & special == {tokenizer.eos_token_id}
    assert found - special == {i for i in range(len(tokenizer)) if i not in special and begins_text(tokenizer, i)}


async def test_a_marker_that_is_special_is_for_lark_grammars_alone():
    tokenizer = TOKENIZERS["special marker"]()
    marker = tokenizer.convert_tokens_to_ids(MARKER)
    compiler = compiler_for(tokenizer, markers=(MARKER,))
    assert marker in allowed((await compiler.lark(FREE, what="it", param="p")).begin().mask())
    state = (await compiler.json_schema({"type": "string"}, strict=True, what="it", param="p")).begin()
    state.accept(tokenizer.encode('"', add_special_tokens=False)[0])
    found = allowed(state.mask())
    assert len(found) > 200 and marker not in found


async def test_the_text_of_a_special_token_is_spelt_letter_by_letter():
    tokenizer = byte_level()
    value = "x<|im_end|>y"
    ids = walk(await const(compiler_for(tokenizer), value), 1)
    assert json.loads(spelt(tokenizer, ids)) == value
    assert tokenizer.eos_token_id not in ids[:-1]


@pytest.mark.parametrize("value", ["cafe\u0301 nai\u0308ve", "ﬁne ①"])
async def test_text_that_the_tokenizer_would_alter_is_spelt_as_it_stands(value):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    altered = tokenizer.decode(tokenizer.encode(value, add_special_tokens=False))
    assert altered != value
    assert json.loads(spelt(tokenizer, walk(await const(compiler_for(tokenizer), value), 0))) == value


async def test_a_tokenizer_that_truncates_and_pads_is_not_asked_to():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    value = {"hello world": "the cat sat on the mat"}
    found = walk(await const(compiler_for(tokenizer), value), 3)
    assert found == walk(await const(compiler_for(byte_level()), value), 3)
    assert json.loads(spelt(tokenizer, found)) == value
