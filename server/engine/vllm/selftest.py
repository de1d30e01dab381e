"""Start-up proofs, through the whole engine: each profile's vector arrives, and nothing is changed where nothing is added."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from server.engine.base import EngineError, EngineInfo, GenerationRequest, SamplingOptions
from steering.decision import ProfileActivation, SteeringOptions
from steering.errors import ModelError, ProfileError
from steering.profile import SteeringProfile

if TYPE_CHECKING:
    from server.engine.base import TokenEvent

NUM_TOKENS = 5
NUM_LOGPROBS = 5
BEFORE_ALL = -(2**31)  # a profile that is loaded amid traffic need not wait for the queue


# Times a profile's own strength: a coarse dtype must show it, but may not hold as much; a linear map, or one layer's vector of
# several, may be weak here.
STRENGTHS = (4.0, 1.0, 32.0, 1024.0)

Tokens = list[tuple[int, object]]
Generate = Callable[[GenerationRequest], "AsyncIterator[TokenEvent]"]


async def check_steering(generate: Generate, info: EngineInfo, profiles: Sequence[SteeringProfile]) -> None:
    """Generate plain, at strength 0 and with the gate forced open: the first two must be equal bit for bit, the third must
    differ, for each profile. Raises ProfileError; ModelError where vLLM does not answer at all.

    Args:
        generate, info: the engine's.
    """
    try:
        plain = await _tokens(generate, info)
    except EngineError as error:
        raise ModelError(
            f"--engine vllm: the first request failed: {error}. What vLLM wrote above says why."
        ) from error
    for profile in profiles:
        problem = await _problem(generate, info, profile, plain)
        if problem is not None:
            raise ProfileError(
                f"profile {profile.name!r} does not steer this model inside vLLM as it should: {problem}. Where the plugin was not "
                "loaded (`pip show finesteer-server` tells whether this package is installed as vLLM sees it), install it; else "
                "leave --engine out, and report the model's architecture and vLLM's version."
            )


async def _problem(generate: Generate, info: EngineInfo, profile: SteeringProfile, plain: Tokens) -> str | None:
    try:
        if await _tokens(generate, info, _activation(profile, 0.0)) != plain:
            return "at strength 0 it changes answers"
    except EngineError as error:
        return str(error)
    problem = "it changes nothing"
    for times in STRENGTHS:
        try:
            if await _tokens(generate, info, _activation(profile, times * (profile.manifest.strength or 1.0))) != plain:
                return None
        except EngineError as error:
            problem = str(error)
    return problem


def _activation(profile: SteeringProfile, strength: float) -> ProfileActivation:
    return ProfileActivation(profile.name, strength, gate="open", version=profile.version)


async def _tokens(generate: Generate, info: EngineInfo, *activations: ProfileActivation) -> Tokens:
    """Tokens and log-probabilities of a short greedy run."""
    prompt = tuple(i % info.vocab_size for i in range(1, min(NUM_TOKENS, info.max_model_len - 2) + 1))
    sampling = SamplingOptions(max_tokens=2, temperature=0.0, logprobs=NUM_LOGPROBS)
    request = GenerationRequest("selftest", prompt, sampling, SteeringOptions(activations), priority=BEFORE_ALL)
    events: list[TokenEvent] = [event async for event in generate(request)]
    return [(event.token_id, event.logprobs) for event in events]
