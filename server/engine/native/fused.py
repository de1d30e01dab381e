"""A forward pass of our own for the common families: fused projections, packed rows, nothing computed twice.

Llama, Mistral, Qwen 2, 2.5 and 3, Gemma 2 and 3 differ in few places (biases, query and key norms, norms after the blocks,
windows, soft caps); each is read off the model's modules and configuration, never off its name. At start-up its logits are
held against transformers'; where they differ, the model runs through its own modules instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.native.attention import AttentionStep, DecodeStep, PrefillStep, Scores
from server.engine.native.compiled_row import LayerWeights, head_row, layer_row
from server.engine.native.compiled_rows import handle, layer_rows
from server.engine.native.decoder import Decoder
from server.engine.native.kv_cache import KVShape
from server.engine.native.linear import Linear, Modules, PackedLinear, fuse, fused_weight, packing_works
from steering.architecture import decoder_layers, text_config
from steering.errors import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
Norm = Callable[[Tensor], Tensor]


class FusedDecoder(Decoder):
    """The decoder of a model of one of the `FAMILIES`.

    Args:
        model: gives its weights up, all but the embeddings; its own forward works no more.
        max_len: positions for which rotary tables are made.
        compiled: decode by the kernels of `compiled_row` and `compiled_rows`; the former keep a second copy of the weights.
            Raises ModelError where the model has what they do not know.
    """

    def __init__(self, model: PreTrainedModel, max_len: int, *, compiled: bool = False) -> None:
        super().__init__(model)
        config, base = text_config(model), model.base_model
        self._embed = base.embed_tokens
        packed = packing_works(self.dtype, self.device)
        layer_types = getattr(config, "layer_types", None) or [""] * self.num_layers
        rotations = _rotations(base.rotary_emb, layer_types, max_len, self.dtype)
        layers = zip(decoder_layers(model), rotations, strict=True)
        self._layers = [_Layer(layer, config, rotation, packed, compiled) for layer, rotation in layers]
        self._norm = _norm(base.norm)
        self._row_head = _head_weights(model) if compiled else None
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

    def finish(self, states: Tensor, layers: range, step: PrefillStep) -> Tensor:
        """The last layer needs every row's key and value, but computes the rest for the prompts' ends alone."""
        if not layers:
            return states[step.end_rows]
        return self._layers[layers[-1]].finish(self.run(states, layers[:-1], step), step)

    def logits(self, states: Tensor) -> Tensor:
        if self._row_head is not None and len(states) == 1:
            return head_row(states, *self._row_head)
        logits = self._head(self._norm(states.to(self.dtype)))  # a lone row's states are float32
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


class _Rotation:
    """cos and sin of every position, (max_len, 1, head_dim) each; the sine's first half carries the rotation's sign."""

    def __init__(self, module: nn.Module, layer_type: str | None, max_len: int, dtype: torch.dtype) -> None:
        inv_freq = getattr(module, f"{layer_type}_inv_freq" if layer_type else "inv_freq")
        positions = torch.arange(max_len, device=inv_freq.device)
        like = torch.empty(0, dtype=dtype, device=positions.device)
        cos, sin = module(like, positions[None], *([layer_type] if layer_type else []))
        half = sin.shape[-1] // 2
        self._cos = cos[0][:, None]
        self._sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)[:, None]

    def __call__(self, heads: Tensor, step: AttentionStep) -> Tensor:
        """Rotate (T, heads, head_dim) queries and keys to their positions."""
        cos, sin = self.at(step)
        return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)

    def at(self, step: AttentionStep) -> tuple[Tensor, Tensor]:
        """(T, 1, head_dim) cos and sin of a step's positions, looked up once for all layers."""
        if self not in step.memo:
            step.memo[self] = self._cos[step.positions], self._sin[step.positions]
        return step.memo[self]


def _rotations(module: nn.Module, layer_types: Sequence[str], max_len: int, dtype: torch.dtype) -> list[_Rotation]:
    """The rotation of each layer; layers of one kind share one, and most families have one kind."""
    found: dict[str | None, _Rotation] = {}
    rotations = []
    for layer_type in layer_types:
        kind = layer_type if hasattr(module, f"{layer_type}_inv_freq") else None
        if kind not in found:
            found[kind] = _Rotation(module, kind, max_len, dtype)
        rotations.append(found[kind])
    return rotations


class _Layer:
    """norm → attention → (norm) → + → norm → MLP → (norm) → +."""

    def __init__(self, layer: nn.Module, config, rotation: _Rotation, packed: bool, compiled: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._weights = _layer_weights(layer, config) if compiled else None
        self.number = attention.layer_idx
        self.head_dim = attention.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self._dtype = layer.input_layernorm.weight.dtype
        window = getattr(
            attention, "sliding_window", getattr(config, "sliding_window", None)
        )  # Mistral's is the latter
        self._scores = Scores(attention.scaling, window, getattr(attention, "attn_logit_softcapping", None))
        self._rotate = rotation
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
        products = self._qkv, self._output, self._gate_up, self._down
        packed = self._weights is not None and all(isinstance(product, PackedLinear) for product in products)
        self._handles = tuple(map(handle, products)) if packed else None

    def __call__(self, states: Tensor, step: AttentionStep) -> Tensor:
        """(T, d) → (T, d)."""
        if self._weights is not None and isinstance(step, DecodeStep) and self._fits(step):
            if len(states) == 1:
                return layer_row(self._weights, self.number, states, *self._rotate.at(step), step)
            if self._handles is not None:
                return layer_rows(self._weights, self._handles, self.number, states, *self._rotate.at(step), step)
        states = states.to(self._dtype)
        mixed = step.attend(self.number, *self._heads(states, step), self._scores)
        return self._rest(states, mixed)

    def finish(self, states: Tensor, step: PrefillStep) -> Tensor:
        """(T, d) → (S, d), at the step's `end_rows`."""
        states = states.to(self._dtype)
        query, key, value = self._heads(states, step)
        step.write(self.number, key, value)
        states, query = states[step.end_rows], query[step.end_rows]
        return self._rest(states, step.ends.look(self.number, query, self._scores)) if len(states) else states

    def _rest(self, states: Tensor, mixed: Tensor) -> Tensor:
        """All that follows attention: (T, d) states and the (T, heads, head_dim) that it mixed → (T, d)."""
        states = _add(states, self._output, mixed.reshape(len(states), -1), self._after_attention)
        gate, up = self._gate_up(self._before_mlp(states)).chunk(2, dim=-1)
        return _add(states, self._down, self._activation(gate) * up, self._after_mlp)

    def _fits(self, step: DecodeStep) -> bool:
        """Whether the compiled kernels can take it: they write through views, pad all rows alike, and know no window."""
        window = self._scores.sliding_window
        return step.cache.contiguous and step.uniform and (window is None or step.num_seen <= window)

    def _heads(self, states: Tensor, step: AttentionStep) -> tuple[Tensor, Tensor, Tensor]:
        """(T, d) → query (T, heads, head_dim), key and value (T, KV heads, head_dim), rotated to their positions."""
        heads = self._qkv(self._before_attention(states)).view(
            len(states), -1, self.head_dim
        )  # (T, heads + 2 KV heads, head_dim)
        turned, value = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self._query_norm is not None:
            query, key = turned.split([self.num_heads, self.num_kv_heads], dim=1)
            turned = torch.cat([self._query_norm(query), self._key_norm(key)], dim=1)
        query, key = self._rotate(turned, step).split([self.num_heads, self.num_kv_heads], dim=1)
        return query, key, value


def _layer_weights(layer: nn.Module, config) -> LayerWeights:
    """For `compiled`, before `fuse` takes the weights. Raises ModelError."""
    attention, mlp = layer.self_attn, layer.mlp
    fused = [
        fused_weight(modules)
        for modules in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        )
    ]
    odd = hasattr(attention, "q_norm") or hasattr(layer, "pre_feedforward_layernorm") or config.hidden_act != "silu"
    if odd or any(weight is None for weight in fused) or fused[0].device.type != "cpu":
        raise ModelError(
            "--compile: only Llama's and Mistral's layers, with plain weights and on a CPU, have compiled kernels; start without it."
        )
    qkv, output, gate_up, down = fused
    return LayerWeights(
        layer.input_layernorm.weight.detach(),
        qkv,
        output,
        layer.post_attention_layernorm.weight.detach(),
        gate_up,
        down,
        config.rms_norm_eps,
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.scaling,
    )


def _head_weights(model: PreTrainedModel) -> tuple[Tensor, Tensor, float]:
    """Norm, head and eps for `compiled.head_row`."""
    norm = model.base_model.norm
    return norm.weight.detach(), model.get_output_embeddings().weight.detach(), norm.variance_epsilon


def _add(residual: Tensor, linear: Linear | Modules, states: Tensor, norm: Norm | None) -> Tensor:
    """residual + linear(states), normed first where the family does so."""
    return linear.add_to(residual, states) if norm is None else residual + norm(linear(states))


def _norm(module: nn.Module | None) -> Norm | None:
    """RMS norm with a module's weight; Gemma's weights are kept less one, and applied in float32."""
    if module is None:
        return None
    eps = getattr(module, "variance_epsilon", None) or module.eps
    weight = module.weight.detach()
    if "Gemma" in type(module).__name__:
        shifted = 1.0 + weight.float()
        return lambda x: F.rms_norm(x.float(), shifted.shape, shifted, eps).to(x.dtype)
    if weight.device.type == "cpu" and weight.dtype != torch.float32:
        # The layer norm of (x, -x), whose mean is 0, is the RMS norm of x; it has one kernel here, the RMS norm eight.
        doubled, width = torch.cat([weight, weight]), weight.shape[-1]
        return lambda x: F.layer_norm(torch.cat([x, -x], dim=-1), doubled.shape, doubled, None, eps)[..., :width]
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)
