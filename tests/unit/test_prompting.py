"""Detokenizer, stop strings, vocabulary, and the stream that joins them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.conversation import Conversation
from server.errors import InvalidRequestError
from server.prompting.detokenizer import IncrementalDetokenizer, TextStream
from server.prompting.prompter import Prompter, load_prompter
from server.prompting.stop_strings import StopMatcher
from server.prompting.vocabulary import Vocabulary, byte_of_char
from steering.errors import ModelError
from tests.checkpoint import CORPUS, build_tokenizer

TOKENIZER = build_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
BYTES = {b: next(i for c, i in TOKENIZER.get_vocab().items() if c == char) for char, b in byte_of_char().items()}


class Letters:
    """A vocabulary whose token ids are code points."""

    def text_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return [*pieces, text[at:]]


# -- bytes ---------------------------------------------------------------------------------------------------------------


def test_the_byte_alphabet_is_the_tokenizers_librarys():
    assert set(byte_of_char()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_of_char().values()) == list(range(256))
    for byte in range(128):
        [(piece, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))
        assert byte_of_char()[piece] == byte


@pytest.mark.parametrize("text", [*CORPUS, "👩‍👩‍👧 family", "\x00\x1f\x7f", "a\r\n\tb", "𝔘𝔫𝔦"])
def test_streamed_text_is_decoded_text(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(VOCABULARY)
    pieces = [detokenizer.push(i) for i in ids] + [detokenizer.flush()]
    assert "".join(pieces) == text == TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte():
    detokenizer = IncrementalDetokenizer(VOCABULARY)
    assert [detokenizer.push(BYTES[b]) for b in "🙂é".encode()] == ["", "", "", "🙂", "", "é"]


@given(st.binary(max_size=40))
def test_any_bytes_stream_as_they_decode(raw):
    ids = [BYTES[b] for b in raw]
    detokenizer = IncrementalDetokenizer(VOCABULARY)
    streamed = "".join([detokenizer.push(i) for i in ids] + [detokenizer.flush()])
    assert streamed == raw.decode("utf-8", "replace") == TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


def test_special_tokens_have_bytes_but_no_text():
    assert VOCABULARY.text_bytes(TOKENIZER.eos_token_id) == b""
    assert VOCABULARY.raw_bytes(TOKENIZER.eos_token_id) == b"<|im_end|>"
    assert VOCABULARY.text_bytes(10**6) == b""


def _pieces(decoder) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "<0xF0>": 3, "<0x9F>": 4, "<0x99>": 5, "<0x82>": 6, "!": 7}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_pieces_with_byte_fallback():
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = _pieces(decoder)
    detokenizer = IncrementalDetokenizer(Vocabulary(tokenizer))
    ids = [1, 2, 3, 4, 5, 6, 7]
    assert "".join(map(detokenizer.push, ids)) == " Hello world🙂!" == tokenizer.decode(ids)


def test_other_decoders_are_refused():
    with pytest.raises(ModelError, match="WordPiece"):
        Vocabulary(_pieces(decoders.WordPiece()))


# -- stop strings --------------------------------------------------------------------------------------------------------


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the text ends where a stop string is first complete; the longest that ends there counts."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - len(max(ending, key=len))], True
    return text, False


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


@given(st.text("abc", max_size=30), STOPS, st.lists(st.integers(0, 5), max_size=20))
def test_stop_strings_do_not_depend_on_the_cuts(text, stops, sizes):
    matcher, shown, matched = StopMatcher(stops), "", False
    for piece in cut(text, sizes):
        result = matcher.push(piece)
        shown += result.text
        if result.matched is not None:
            assert result.matched in stops
            matched = True
            break
    else:
        shown += matcher.flush()
    assert (shown, matched) == reference(text, stops)


@given(st.text("abc", max_size=30), STOPS)
def test_no_more_is_held_back_than_could_become_a_stop_string(text, stops):
    matcher, shown = StopMatcher(stops), ""
    for i, letter in enumerate(text):
        result = matcher.push(letter)
        shown += result.text
        if result.matched is not None:
            return
        held = text[len(shown) : i + 1]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_partial_matches_are_held_and_released():
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece).text for piece in ("a", "E", "N", "x", "EN")] == ["a", "", "", "ENx", ""]
    assert matcher.flush() == "EN"


# -- the stream ----------------------------------------------------------------------------------------------------------


def run(text: str, stops=(), min_tokens=0):
    stream = TextStream(Letters(), stops, min_tokens)
    pieces = []
    for i, letter in enumerate(text):
        pieces.append(stream.push(ord(letter), f"{i}{letter}", last=i == len(text) - 1))
        if pieces[-1].stopped:
            break
    return "".join(p.text for p in pieces), [note for p in pieces for note in p.notes], pieces


def test_notes_come_out_with_their_text():
    text, notes, pieces = run("abENxy", ["END"])
    assert text == "abENxy"
    assert notes == [(0, "0a"), (1, "1b"), (2, "2E"), (3, "3N"), (4, "4x"), (5, "5y")]
    assert [len(p.notes) for p in pieces] == [1, 1, 0, 0, 3, 1]


def test_notes_behind_a_stop_string_never_do():
    text, notes, pieces = run("abENDx", ["END"])
    assert (text, [n for _, n in notes], pieces[-1].stopped) == ("ab", ["0a", "1b"], True)


def test_stop_strings_count_from_min_tokens_on():
    assert run("xx--xx", ["x"], min_tokens=4)[0] == "xx--"


def test_hidden_tokens_show_no_text_and_end_the_text():
    stream = TextStream(VOCABULARY)
    first = stream.push(BYTES[0xF0], "a")
    last = stream.push(TOKENIZER.eos_token_id, "b", hidden=True, last=True)
    assert (first.text, last.text) == ("", "\ufffd")
    assert [n for p in (first, last) for _, n in p.notes] == ["a", "b"]


# -- loading -------------------------------------------------------------------------------------------------------------


def test_a_missing_tokenizer_is_told_by_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: no such file. Copy the model's tokenizer"):
        load_prompter(str(tmp_path))


def test_a_missing_model_folder_is_told(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_prompter(str(tmp_path / "nowhere"))


def test_a_broken_tokenizer_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_prompter(str(tmp_path))


def test_a_missing_template_file_is_told(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": [2, 7]}')
    assert load_prompter(str(tmp_path)).eos_token_ids == {2, 7}
    with pytest.raises(ModelError, match=r"none\.jinja: the chat template cannot be read"):
        load_prompter(str(tmp_path), tmp_path / "none.jinja")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ messages[5].role }}", "list object has no element 5"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ],
)
async def test_templates_run_in_a_sandbox_and_their_failures_are_told(template, said):
    prompter = Prompter(build_tokenizer(), frozenset({2}), template)
    with pytest.raises(InvalidRequestError) as refusal:
        await prompter.chat(Conversation(({"role": "user", "content": "x"},)))
    assert refusal.value.message == f"messages: the model's chat template refuses them: {said}."
    prompter.close()
