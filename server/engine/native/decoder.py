"""A decoder's layers, run by range: embed → layers[a:b] → logits.

`TransformersDecoder` runs any transformers decoder through its own modules; `fused.FusedDecoder` is faster for the common
families. Both take the residual stream in and give it out, so that steering acts between two ranges, in plain sight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from server.engine.native.attention import AttentionStep, PrefillStep, Scores
from server.engine.native.kv_cache import KVShape
from steering.architecture import decoder_layers, text_config

ATTENTION = "finesteer"


class Decoder(ABC):
    """The model, as the runner sees it."""

    num_layers: int
    num_heads: int
    hidden_size: int
    vocab_size: int
    softcapped: bool  # whether attention's scores are, for which no paged kernel is to be had
    dtype: torch.dtype
    device: torch.device

    def __init__(self, model: PreTrainedModel) -> None:
        config = text_config(model)
        self.num_layers = config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.softcapped = getattr(config, "attn_logit_softcapping", None) is not None
        self.dtype, self.device = model.dtype, model.device

    @abstractmethod
    def kv_shapes(self) -> list[KVShape]:
        """What each layer keeps of a token."""

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """(T,) int64 → (T, d), the input of layer 0."""

    @abstractmethod
    def run(self, states: Tensor, layers: range, step: AttentionStep) -> Tensor:
        """The residual stream before `layers[0]` → after `layers[-1]`, both (T, d). Writes the step's keys and values."""

    def finish(self, states: Tensor, layers: range, step: PrefillStep) -> Tensor:
        """`run` through the model's last layers, for what comes of the step's `end_rows` alone; (T, d) → (S, d)."""
        return self.run(states, layers, step)[step.end_rows]

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """The residual stream after the last layer, (S, d) → (S, V)."""


class TransformersDecoder(Decoder):
    """Any transformers decoder whose attention can be replaced: its own forward, in which layers outside the range pass through.

    Args:
        model: its attention is replaced by ours and its layers' `forward` wrapped; it can serve nothing else afterwards.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        _register()
        model.set_attn_implementation(ATTENTION)
        self._model = model.eval().requires_grad_(False)
        self._layers = range(self.num_layers)
        self._states: Tensor | None = None
        for index, layer in enumerate(decoder_layers(model)):
            layer.forward = self._ranged(index, layer.forward)

    def kv_shapes(self) -> list[KVShape]:
        probe = _ShapeProbe(self.device)
        with torch.inference_mode():
            self.run(self.embed(torch.zeros(1, dtype=torch.long, device=self.device)), range(self.num_layers), probe)
        return [probe.shapes[layer] for layer in range(self.num_layers)]

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._model.get_input_embeddings()(token_ids)

    def run(self, states: Tensor, layers: range, step: AttentionStep) -> Tensor:
        if not layers:
            return states
        self._forward(self._model.base_model, states, layers, position_ids=step.positions[None], step=step)
        return self._states

    def logits(self, states: Tensor) -> Tensor:
        positions = torch.zeros(1, len(states), dtype=torch.long, device=self.device)
        nothing = range(self.num_layers, self.num_layers)
        return self._forward(self._model, states, nothing, position_ids=positions).logits[0]

    def _forward(self, module: nn.Module, states: Tensor, layers: range, **options: object):
        self._layers, self._states = layers, states
        return module(inputs_embeds=states[None], use_cache=False, **options)

    def _ranged(self, index: int, forward):
        """A layer that runs inside the range, passes through outside, and notes the residual stream either way."""

        in_tuple = False  # some families' layers return one; learnt when the layer first runs, in `kv_shapes`

        def ranged(hidden_states: Tensor, *args: object, **kwargs: object):
            nonlocal in_tuple
            if self._layers.start > 0 and index == 0:  # what the model made of `inputs_embeds` was for layer 0
                hidden_states = self._states[None]
            if index not in self._layers:
                return (hidden_states,) if in_tuple else hidden_states
            output = forward(hidden_states, *args, **kwargs)
            in_tuple = not isinstance(output, Tensor)
            if index == self._layers.stop - 1:
                self._states = (output[0] if in_tuple else output)[0]
            return output

        return ranged


class _ShapeProbe(AttentionStep):
    """Runs one token and notes what each layer would keep."""

    def __init__(self, device: torch.device) -> None:
        self.positions = torch.zeros(1, dtype=torch.long, device=device)
        self.shapes: dict[int, KVShape] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        self.shapes[layer] = KVShape(key.shape[1], key.shape[2], value.shape[2])
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step: AttentionStep,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Transformers' attention-function contract: query (1, H, T, head_dim), key and value (1, KV, T, ·) → (1, T, H, ·)."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, ·)
    scores = Scores(scaling, sliding_window, softcap)
    return step.attend(module.layer_idx, query, key, value, scores).unsqueeze(0), None


def _register() -> None:
    """Make `ATTENTION` known to transformers. It makes its own masks, so the models are told to make none. Idempotent."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _no_mask)


def _no_mask(*_: object, **__: object) -> None:
    return None
