"""A checkpoint of `checkpoints` as a GGUF file for llama.cpp, with the `gguf` package's writer."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

_TYPES = {torch.float32: gguf.GGMLQuantizationType.F32, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
_FILE_TYPES = {torch.float32: gguf.LlamaFileType.ALL_F32, torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16}


def gguf_file(checkpoint: Path) -> Path:
    """`checkpoint`.gguf beside the checkpoint, written first where it is not there yet; matrices keep their dtype."""
    target = checkpoint.with_suffix(".gguf")
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        _write(LlamaForCausalLM.from_pretrained(checkpoint), unfinished)
        unfinished.rename(target)
    return target


def _write(model: LlamaForCausalLM, target: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_file_type(_FILE_TYPES[model.dtype])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_vocabulary(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.endswith("q_proj.weight"):
            tensor = _interleave(tensor, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            tensor = _interleave(tensor, config.num_key_value_heads)
        kind = _TYPES[torch.float32 if tensor.ndim == 1 else model.dtype]
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)),
            gguf.quantize(tensor.float().numpy(), kind),
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from transformers' halves to llama.cpp's pairs, as its rotary embedding wants them."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _add_vocabulary(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    """Three special tokens, the 256 bytes that llama.cpp insists on, and fillers: nothing is ever read as text."""
    special, bytes_ = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    fillers = [f"w{index}" for index in range(len(special) + len(bytes_), config.vocab_size)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * len(bytes_) + [gguf.TokenType.NORMAL] * len(fillers)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + bytes_ + fillers)
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
