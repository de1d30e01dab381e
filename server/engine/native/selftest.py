"""Start-up proofs: our packed attention computes what the model's own code computes, and each profile's vector arrives.

A checkpoint or a profile that fails is refused, so nothing is served wrongly or silently unsteered.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from server.engine.base import GenerationRequest, SamplingOptions, TokenEvent
from server.engine.native.attention import ATTENTION, AttentionStep, KVCache, register
from server.engine.native.core import EngineCore, Result
from server.engine.native.runner import Runner
from server.engine.native.scheduler import Scheduler
from server.engine.native.sequence import SequenceGroup
from steering.architecture import text_config
from steering.decision import ProfileActivation, SteeringOptions
from steering.errors import ModelError, ProfileError
from steering.profile import SteeringProfile

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


def check_steering(model: PreTrainedModel, profiles: list[SteeringProfile]) -> None:
    """Generate two tokens plain, at strength 0, and with the gate forced open: the first two must be equal bit for bit, the
    third must differ, for each profile. Raises ProfileError."""
    core = EngineCore(Runner(model, profiles, 1, LENGTH), Scheduler(1, LENGTH, 1), LENGTH)
    plain = _generate(core, ())
    for profile in profiles:
        strength = 4 * (profile.manifest.strength or 1.0)  # coarse dtypes must show it
        shut = _generate(core, (ProfileActivation(profile.name, 0.0, gate="open"),))
        steered = _generate(core, (ProfileActivation(profile.name, strength, gate="open"),))
        if shut != plain or steered == plain:
            what = "at strength 0 it changes answers" if shut != plain else "it changes nothing"
            raise ProfileError(
                f"profile {profile.name!r} does not steer this model as it should: {what}. Train it again at another layer, or "
                "report the model's architecture."
            )


def _generate(core: EngineCore, activations: tuple[ProfileActivation, ...]) -> list[object]:
    """Tokens and log-probabilities of a short greedy run, or its failure's words."""
    prompt = tuple(i % text_config(core.runner.model).vocab_size for i in range(1, PROMPT + 1))
    sampling = SamplingOptions(max_tokens=2, temperature=0.0, logprobs=5)
    core.add(
        SequenceGroup.of(GenerationRequest("selftest", prompt, sampling, SteeringOptions(activations)), lambda _: None)
    )
    results: list[Result] = []
    with core.runner.attached():
        while core.has_work:
            results += [result for _, result in core.step()]
    return [(r.token_id, r.logprobs) if isinstance(r, TokenEvent) else str(r) for r in results]
