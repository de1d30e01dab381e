"""The random checkpoints that every engine runs, and a steering profile for each: made once, the same at each making."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny import tiny_profile

_SHARED = {
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SHAPES: dict[str, tuple[torch.dtype, dict[str, int]]] = {
    # 4.6 M parameters; a token reads 16 MB of weights
    "llama5m": (
        torch.float32,
        {
            "vocab_size": 2048,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    # 101 M parameters; a token reads 176 MB of weights
    "llama100m": (
        torch.bfloat16,
        {
            "vocab_size": 16384,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
    ),
}
MODELS = tuple(_SHAPES)


def checkpoint(folder: Path, model: str) -> Path:
    """The folder of one of `MODELS`, written first where it is not there yet."""
    return _once(folder / model, lambda target: _write_checkpoint(target, model))


def profile(folder: Path, model: str) -> Path:
    """The folder of a random profile for `checkpoint(folder, model)`, acting at the middle layer."""
    source = checkpoint(folder, model)
    return _once(folder / f"{model}-profile", lambda target: _write_profile(source, target))


def _once(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, written under another name and then renamed, so that a broken run leaves nothing that looks whole."""
    if not target.exists():
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        unfinished.rename(target)
    return target


def _write_checkpoint(target: Path, model: str) -> None:
    dtype, shape = _SHAPES[model]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**_SHARED, **shape)).to(dtype).save_pretrained(target)
    _tokenizer(shape["vocab_size"]).save_pretrained(target)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Bytes, and words without a meaning up to the model's size: text streams as from a real one."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"\u0120w{index}" for index in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _write_profile(source: Path, target: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tiny_profile(model, model.config.num_hidden_layers // 2, strength=1.0).save(target)
