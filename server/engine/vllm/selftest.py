"""Start-up proofs, through the whole engine: each profile's vector arrives, and nothing is changed where nothing is added."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from server.engine.base import EngineError, EngineInfo, GenerationRequest, SamplingOptions
from steering.decision import ProfileActivation, SteeringOptions
from steering.errors import ProfileError
from steering.profile import SteeringProfile

if TYPE_CHECKING:
    from server.engine.base import TokenEvent

NUM_TOKENS = 5
NUM_LOGPROBS = 5
BEFORE_ALL = -(2**31)  # a profile that is loaded amid traffic need not wait for the queue


Generate = Callable[[GenerationRequest], "AsyncIterator[TokenEvent]"]


async def check_steering(generate: Generate, info: EngineInfo, profiles: Sequence[SteeringProfile]) -> None:
    """Generate plain, at strength 0 and with the gate forced open: the first two must be equal bit for bit, the third must
    differ, for each profile. Raises ProfileError.

    Args:
        generate, info: the engine's.
    """
    plain = await _tokens(generate, info)
    for profile in profiles:
        strength = profile.manifest.strength or 1.0
        shut = await _tokens(generate, info, ProfileActivation(profile.name, 0.0, gate="open", version=profile.version))
        steered = plain
        for times in (
            4.0,
            1.0,
            32.0,
        ):  # coarse dtypes must show it; a coarse dtype may not hold as much; a linear map may be weak here
            activation = ProfileActivation(profile.name, times * strength, gate="open", version=profile.version)
            try:
                steered = await _tokens(generate, info, activation)
            except EngineError:
                continue
            if steered != plain:
                break
        if shut != plain or steered == plain:
            what = "at strength 0 it changes answers" if shut != plain else "it changes nothing"
            raise ProfileError(
                f"profile {profile.name!r} does not steer this model inside vLLM as it should: {what}. Serve it with this "
                "server's own engine (leave --engine out), and report the model's architecture and vLLM's version."
            )


async def _tokens(generate: Generate, info: EngineInfo, *activations: ProfileActivation) -> list[tuple[int, object]]:
    """Tokens and log-probabilities of a short greedy run."""
    prompt = tuple(i % info.vocab_size for i in range(1, min(NUM_TOKENS, info.max_model_len - 2) + 1))
    sampling = SamplingOptions(max_tokens=2, temperature=0.0, logprobs=NUM_LOGPROBS)
    request = GenerationRequest("selftest", prompt, sampling, SteeringOptions(activations), priority=BEFORE_ALL)
    events: list[TokenEvent] = [event async for event in generate(request)]
    return [(event.token_id, event.logprobs) for event in events]
