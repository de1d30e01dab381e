"""Where tokens begin in an echoed prompt, for tokenizers of both kinds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from server.answers.echo import echo_of
from server.prompting.vocabulary import Vocabulary
from tests.checkpoint import CORPUS, build_tokenizer

BYTE_LEVEL = build_tokenizer()


def sentence_pieces(*, lower: bool = False) -> PreTrainedTokenizerFast:
    """Words with `▁` before them, bytes for what is unknown, `<s>` before every text."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abehlorw▁"]
    words = ["▁he", "▁wo", "▁hel", "lo", "or", "▁hello"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces + words))}
    merges = [("▁", "h"), ("▁h", "e"), ("▁he", "l"), ("l", "o"), ("▁hel", "lo"), ("▁", "w"), ("▁w", "o"), ("o", "r")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="</s>"))
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def texts_at(echo):
    ends = [*echo.offsets[1:], len(echo.text)]
    return [echo.text[start:end] for start, end in zip(echo.offsets, ends, strict=True)]


@pytest.mark.parametrize("text", [*CORPUS, "<|im_start|>user\nhi<|im_end|>", "  two  spaces ", "\r\n\t"])
def test_text_is_cut_into_its_tokens(text):
    ids = BYTE_LEVEL.encode(text)
    for prompt in (text, tuple(ids)):
        echo = echo_of(prompt, ids, Vocabulary(BYTE_LEVEL))
        assert echo.text == text
        tokens = [BYTE_LEVEL.decode([i]) for i in ids]
        for token, cut in zip(tokens, texts_at(echo), strict=True):
            assert cut == token or "\ufffd" in token


@given(st.text(max_size=30))
def test_offsets_never_fall_and_stay_within_the_text(text):
    ids = BYTE_LEVEL.encode(text)
    echo = echo_of(text, ids, Vocabulary(BYTE_LEVEL))
    assert echo.text == text and len(echo.offsets) == len(ids)
    assert list(echo.offsets) == sorted(echo.offsets)
    assert all(0 <= offset <= len(text) for offset in echo.offsets)


def test_half_a_character_at_the_end_is_shown_as_such():
    ids = BYTE_LEVEL.encode("a🙂")[:-1]
    echo = echo_of(ids, ids, Vocabulary(BYTE_LEVEL))
    assert echo.text == "a\ufffd"


def test_what_a_tokenizer_puts_before_the_text_has_no_length():
    tokenizer = sentence_pieces()
    ids = tokenizer.encode("hello world é")
    echo = echo_of("hello world é", ids, Vocabulary(tokenizer))
    assert echo.text == "hello world é"
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids[:4]] == ["<s>", "▁hello", "▁wo", "r"]
    cut = texts_at(echo)
    assert cut[:4] == ["", "hello", " wo", "r"] and cut[-2:] == ["", "é"], "the last two are halves of a character"


def test_text_that_a_tokenizer_changes_keeps_its_form():
    tokenizer = sentence_pieces(lower=True)
    ids = tokenizer.encode("Hello hello")
    echo = echo_of("Hello hello", ids, Vocabulary(tokenizer))
    assert echo.text == "Hello hello"
    assert list(echo.offsets) == sorted(echo.offsets) and echo.offsets[-1] <= len(echo.text)
