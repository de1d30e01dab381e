"""A forward pass of our own for the common families: fused projections, packed rows, nothing computed twice.

Llama, Mistral, Qwen 2, 2.5 and 3, Gemma 2 and 3 differ in few places (biases, query and key norms, norms after the blocks,
windows, soft caps); each is read off the model's modules and configuration, never off its name. At start-up its logits are
held against transformers'; where they differ, the model runs through its own modules instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.native.attention import AttentionStep, Scores
from server.engine.native.decoder import Decoder
from server.engine.native.kv_cache import KVShape
from server.engine.native.linear import Linear, Modules, fuse, packing_works
from steering.architecture import decoder_layers, text_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
Norm = Callable[[Tensor], Tensor]


class FusedDecoder(Decoder):
    """The decoder of a model of one of the `FAMILIES`.

    Args:
        model: gives its weights up, all but the embeddings; its own forward works no more.
        max_len: positions for which rotary tables are made.
    """

    def __init__(self, model: PreTrainedModel, max_len: int) -> None:
        config, base = text_config(model), model.base_model
        self.num_layers = config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.dtype, self.device = model.dtype, model.device
        self._embed = base.embed_tokens
        tables = _RotaryTables(base.rotary_emb, max_len, self.dtype, self.device)
        packed = packing_works(self.dtype, self.device)
        self._layers = [_Layer(layer, config, tables, packed) for layer in decoder_layers(model)]
        self._norm = _norm(base.norm)
        head = model.get_output_embeddings()
        if head.weight is self._embed.weight:  # tied: the embeddings stay
            head = nn.Linear(*head.weight.shape[::-1], bias=False, device="meta")
            head.weight = nn.Parameter(self._embed.weight.detach(), requires_grad=False)
        self._head = fuse([head], packed=packed)
        self._softcap = getattr(config, "final_logit_softcapping", None)

    def kv_shapes(self) -> list[KVShape]:
        return [KVShape(layer.num_kv_heads, layer.head_dim, layer.head_dim) for layer in self._layers]

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._embed(token_ids)

    def run(self, states: Tensor, layers: range, step: AttentionStep) -> Tensor:
        for number in layers:
            states = self._layers[number](states, step)
        return states

    def logits(self, states: Tensor) -> Tensor:
        logits = self._head(self._norm(states))
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


class _RotaryTables:
    """cos and sin of every position, (max_len, 1, head_dim), by layer type; the sine's first half carries the rotation's sign."""

    def __init__(self, module: nn.Module, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        self._module, self._dtype = module, dtype
        self._positions = torch.arange(max_len, device=device)[None]
        self._tables: dict[str | None, tuple[Tensor, Tensor]] = {}

    def of(self, layer_type: str) -> tuple[Tensor, Tensor]:
        """The tables of layers of this type; families with one kind of rotation share one."""
        kind = layer_type if hasattr(self._module, f"{layer_type}_inv_freq") else None
        if kind not in self._tables:
            like = torch.empty(0, dtype=self._dtype, device=self._positions.device)
            cos, sin = self._module(like, self._positions, *([kind] if kind else []))
            half = sin.shape[-1] // 2
            sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            self._tables[kind] = cos[0][:, None], sin[0][:, None]
        return self._tables[kind]


class _Layer:
    """norm → attention → (norm) → + → norm → MLP → (norm) → +."""

    def __init__(self, layer: nn.Module, config, tables: _RotaryTables, packed: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.number = attention.layer_idx
        self.head_dim = attention.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self._scores = Scores(
            attention.scaling,
            getattr(
                attention, "sliding_window", getattr(config, "sliding_window", None)
            ),  # Mistral: in its configuration
            getattr(attention, "attn_logit_softcapping", None),
        )
        self._cos, self._sin = tables.of((getattr(config, "layer_types", None) or {self.number: ""})[self.number])
        self._qkv = fuse([attention.q_proj, attention.k_proj, attention.v_proj], packed=packed)
        self._output = fuse([attention.o_proj], packed=packed)
        self._query_norm = _norm(getattr(attention, "q_norm", None))
        self._key_norm = _norm(getattr(attention, "k_norm", None))
        self._gate_up = fuse([mlp.gate_proj, mlp.up_proj], packed=packed)
        self._activation = mlp.act_fn
        self._down = fuse([mlp.down_proj], packed=packed)
        self._before_attention = _norm(layer.input_layernorm)
        sandwiched = hasattr(layer, "pre_feedforward_layernorm")
        self._after_attention = _norm(layer.post_attention_layernorm) if sandwiched else None
        self._before_mlp = _norm(layer.pre_feedforward_layernorm if sandwiched else layer.post_attention_layernorm)
        self._after_mlp = _norm(layer.post_feedforward_layernorm) if sandwiched else None

    def __call__(self, states: Tensor, step: AttentionStep) -> Tensor:
        """(T, d) → (T, d)."""
        mixed = self._attend(self._before_attention(states), step)
        states = _add(states, self._output, mixed, self._after_attention)
        gate, up = self._gate_up(self._before_mlp(states)).chunk(2, dim=-1)
        return _add(states, self._down, self._activation(gate) * up, self._after_mlp)

    def _attend(self, states: Tensor, step: AttentionStep) -> Tensor:
        heads = self._qkv(states).view(len(states), -1, self.head_dim)  # (T, heads + 2 KV heads, head_dim)
        turned, value = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self._query_norm is not None:
            query, key = turned.split([self.num_heads, self.num_kv_heads], dim=1)
            turned = torch.cat([self._query_norm(query), self._key_norm(key)], dim=1)
        turned = _rotate(turned, self._cos[step.positions], self._sin[step.positions])
        query, key = turned.split([self.num_heads, self.num_kv_heads], dim=1)
        out = step.attend(self.number, query, key, value, self._scores)
        return out.reshape(len(states), -1)


def _add(residual: Tensor, linear: Linear | Modules, states: Tensor, norm: Norm | None) -> Tensor:
    """residual + linear(states), normed first where the family does so."""
    return linear.add_to(residual, states) if norm is None else residual + norm(linear(states))


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (T, heads, head_dim) by (T, 1, head_dim) tables."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def _norm(module: nn.Module | None) -> Norm | None:
    """RMS norm with a module's weight; Gemma's weights are kept less one, and applied in float32."""
    if module is None:
        return None
    eps = getattr(module, "variance_epsilon", None) or module.eps
    weight = module.weight.detach()
    if "Gemma" in type(module).__name__:
        shifted = 1.0 + weight.float()
        return lambda x: F.rms_norm(x.float(), shifted.shape, shifted, eps).to(x.dtype)
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)
