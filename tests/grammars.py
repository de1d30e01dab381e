"""Small tokenizers of both kinds, and random walks through grammars."""

from __future__ import annotations

import json
import random

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from server.engine.base import Grammar
from server.grammar.compiler import GrammarCompiler
from server.prompting.vocabulary import Vocabulary
from tests.checkpoint import build_tokenizer

JSON_TEXTS = ['{"name": "a b", "age": 12}', '{"hello world":"the cat"}', "the cat and the hello world"]


def byte_level(*added: AddedToken) -> PreTrainedTokenizerFast:
    """The tiny checkpoint's tokenizer with further added tokens."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(added))
    return tokenizer


def pieces() -> PreTrainedTokenizerFast:
    """As Llama 2's: `▁` before each text and for each space, and bytes where no piece fits."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(JSON_TEXTS * 4, trainer)
    spec = json.loads(tokenizer.to_str())  # the trainer makes special tokens of the bytes; real tokenizers do not
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in ("<unk>", "</s>")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="</s>", unk_token="<unk>"
    )


def compiler_for(
    tokenizer: PreTrainedTokenizerFast, padding: int = 0, markers: tuple[str, ...] = ()
) -> GrammarCompiler:
    """A compiler for a model whose vocabulary is `padding` ids wider than the tokenizer."""
    vocabulary = Vocabulary(tokenizer)
    return GrammarCompiler(vocabulary, {tokenizer.eos_token_id}, len(vocabulary) + padding, markers)


def allowed(mask: np.ndarray) -> list[int]:
    """The token ids whose bits are set."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def walk(grammar: Grammar, seed: int, most: int = 400) -> list[int]:
    """Tokens picked at random among those that a grammar allows, until it is finished."""
    state, chosen, pick = grammar.begin(), [], random.Random(seed)
    while not state.finished:
        assert len(chosen) < most, "the grammar finds no end"
        chosen.append(pick.choice(allowed(state.mask())))
        state.accept(chosen[-1])
    return chosen


def spelt(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    """The text of tokens, as an answer shows it."""
    vocabulary = Vocabulary(tokenizer)
    return b"".join(vocabulary.text_bytes(i) for i in token_ids).decode()
