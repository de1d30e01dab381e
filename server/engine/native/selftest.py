"""Start-up proofs: our decoder computes what the model's own code computes, and each profile's vector arrives.

A checkpoint or a profile that fails is refused, so nothing is served wrongly or silently unsteered.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.base import GenerationError, GenerationRequest, SamplingOptions, TokenEvent
from server.engine.native.attention import AttentionStep, DecodeStep, PrefillStep, Span
from server.engine.native.build import EngineOptions, build_core, new_cache
from server.engine.native.core import EngineCore
from server.engine.native.decoder import Decoder
from steering.architecture import text_config
from steering.decision import ProfileActivation, SteeringOptions
from steering.errors import ProfileError
from steering.experts import LinearMap
from steering.profile import SteeringProfile

LENGTH = 8
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}


@torch.inference_mode()
def reference_logits(model: PreTrainedModel) -> Tensor:
    """Transformers' own, eager attention, whole: (LENGTH, V) float32. Run before the model becomes a `Decoder`."""
    ids = _token_ids(text_config(model).vocab_size, model.device)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    model.set_attn_implementation(before)
    return logits


@torch.inference_mode()
def decoder_error(decoder: Decoder, wanted: Tensor) -> float:
    """How far a decoder is from `reference_logits`, relative, in units of what rounding explains: more than 1 is wrong.

    Runs the tokens as the engine would: the first five in two chunks, cut in the middle of the layers, the rest one by one; then
    all as one prompt, for what comes of its end.
    """
    ids = _token_ids(decoder.vocab_size, decoder.device)
    cache = new_cache(decoder, 0, 2, LENGTH, num_blocks=2)
    for slot in (0, 1):
        cache.reserve(slot, LENGTH)
    cut = decoder.num_layers // 2
    lower, upper = range(cut), range(cut, decoder.num_layers)

    def run(step: AttentionStep, start: int, stop: int) -> Tensor:
        return decoder.run(decoder.run(decoder.embed(ids[start:stop]), lower, step), upper, step)

    states = [run(PrefillStep(cache, [Span(0, 1, a, b, False)]), a, b) for a, b in ((0, 3), (3, 5))]
    states += [run(DecodeStep(cache, [1], [i + 1]), i, i + 1) for i in range(5, LENGTH)]
    whole = PrefillStep(cache, [Span(0, 0, 0, LENGTH, True)])
    states.append(decoder.finish(decoder.run(decoder.embed(ids), lower, whole), upper, whole))
    wanted = torch.cat([wanted, wanted[-1:]])
    error = (decoder.logits(torch.cat(states)).float() - wanted).norm() / wanted.norm()
    return float(error) / TOLERANCE.get(decoder.dtype, 2e-3)


def check_steering(decoder: Decoder, model: PreTrainedModel, profiles: list[SteeringProfile]) -> None:
    """Generate two tokens plain, at strength 0, and with the gate forced open: the first two must be equal bit for bit, the
    third must differ, for each profile. Raises ProfileError.

    Of a profile with several layers each layer's vector must arrive, so each is tried alone as well.

    A linear map may make next to nothing of the probe's state and much of others, as it should where those states are like
    benign ones. It gets a second try at the strength that gives the probe what its strongest query would get. One layer's
    vector of several may be weak by itself: it gets a second try at the strength that makes it as long as the probe's state.
    """
    options = EngineOptions(max_num_seqs=1, max_model_len=LENGTH, prefix_cache_bytes=0)
    parts = [part for profile in profiles for part in profile.layers_alone()]
    core, _ = build_core(decoder, model, [*profiles, *parts], options)
    plain = _generate(core, ())
    for number, profile in enumerate([*profiles, *parts]):
        strength = 4 * (profile.manifest.strength or 1.0)  # coarse dtypes must show it
        shut = _generate(core, (ProfileActivation(profile.name, 0.0, gate="open"),))
        steered = _generate(core, (ProfileActivation(profile.name, strength, gate="open"),))
        if _failed(steered):  # a coarse dtype may not hold four times as much
            steered = _generate(core, (ProfileActivation(profile.name, profile.manifest.strength, gate="open"),))
        alone = number >= len(profiles)
        if steered == plain and (raised := _raised_strength(core, profile, alone)) is not None:
            steered = _generate(core, (ProfileActivation(profile.name, raised, gate="open"),))
        if shut != plain or steered == plain or _failed(steered):
            what = "at strength 0 it changes answers" if shut != plain else "it changes nothing"
            if shut == plain and _failed(steered):
                what = f"at its own strength, {steered[-1]}"
            raise ProfileError(
                f"profile {profile.name!r} does not steer this model as it should: {what}. Train it again at another layer, or "
                "report the model's architecture."
            )


def _raised_strength(core: EngineCore, profile: SteeringProfile, alone: bool) -> float | None:
    """The strength at which the dose on the probe, relative to its state, is a linear map's largest possible, λ‖W‖₂, or 1 for
    a layer that is tried alone; None where no strength is: other profiles, and a map that makes nothing at all of the probe."""
    strength = profile.manifest.strength or 1.0
    if isinstance(profile.experts, LinearMap):
        wanted = abs(strength) * profile.experts.gain
    elif alone:
        wanted = 1.0
    else:
        return None
    first = _run(core, (ProfileActivation(profile.name, strength, gate="open"),))[0]
    dose = first.decision.profiles[0].relative_norm if isinstance(first, TokenEvent) and first.decision else 0.0
    return strength * wanted / dose if dose > 0 else None


def _failed(generated: list[object]) -> bool:
    return any(isinstance(item, str) for item in generated)


def _generate(core: EngineCore, activations: tuple[ProfileActivation, ...]) -> list[object]:
    """Tokens and log-probabilities of a short greedy run, or its failure's words."""
    results = _run(core, activations)
    return [(r.token_id, r.logprobs) if isinstance(r, TokenEvent) else str(r) for r in results]


def _run(core: EngineCore, activations: tuple[ProfileActivation, ...]) -> list[TokenEvent | GenerationError]:
    prompt = tuple(i % core.runner.decoder.vocab_size for i in range(1, 6))
    sampling = SamplingOptions(max_tokens=2, temperature=0.0, logprobs=5)
    return core.run([GenerationRequest("selftest", prompt, sampling, SteeringOptions(activations))])["selftest"]


def _token_ids(vocab_size: int, device: torch.device) -> Tensor:
    return torch.arange(1, LENGTH + 1, device=device) % vocab_size
