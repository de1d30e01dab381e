"""Start-up proof that our packed attention computes what the model's own code computes: else the checkpoint is refused."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from server.engine.native.attention import ATTENTION, AttentionStep, KVCache, register
from steering.architecture import text_config
from steering.errors import ModelError

PROMPT, LENGTH = 5, 8
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}


@torch.inference_mode()
def check_against_transformers(model: PreTrainedModel) -> None:
    """Run eight tokens twice, through transformers' eager attention at once and through ours as prefill and decode.

    Raises ModelError where the logits differ by more than rounding: an attention feature that we do not know (sinks,
    biases, shared keys) would otherwise answer wrongly without a word. Leaves the model on our attention.
    """
    register()
    ids = torch.arange(1, LENGTH + 1, device=model.device)[None] % text_config(model).vocab_size
    model.set_attn_implementation("eager")
    wanted = model(input_ids=ids, use_cache=False).logits[0].float()
    model.set_attn_implementation(ATTENTION)
    cache = KVCache(2, LENGTH)  # row 1 is ours; row 0 stays empty, as in a batch with a free row
    found = [_run(model, ids[:, :PROMPT], 0, cache)]
    found += [_run(model, ids[:, i : i + 1], i, cache) for i in range(PROMPT, LENGTH)]
    error = (torch.cat(found).float() - wanted).norm() / wanted.norm()
    if not error < TOLERANCE.get(model.dtype, 2e-3):
        raise ModelError(
            f"{type(model).__name__}: the native engine's logits differ from transformers' by {error:.1%}. "
            "This architecture needs something that the engine does not know; it is refused rather than served wrongly."
        )


def _run(model: PreTrainedModel, ids: torch.Tensor, start: int, cache: KVCache) -> torch.Tensor:
    """Logits of `ids` (1, T) at positions from `start`: a prefill for start 0, else a decode step; (T, V)."""
    length = ids.shape[1]
    positions = torch.arange(start, start + length, device=ids.device)
    ones = torch.ones(1, dtype=torch.long, device=ids.device)
    decoding = start > 0
    step = AttentionStep(
        cache=cache,
        slots=torch.ones_like(positions),
        positions=positions,
        decode_slots=ones if decoding else ones[:0],
        decode_lengths=positions + 1 if decoding else ones[:0],
        prefills=() if decoding else ((0, length),),
        first_slot=0,
        last_slot=1,
        max_length=start + length,
    )
    return model(input_ids=ids, position_ids=positions[None], use_cache=False, step=step).logits[0]
