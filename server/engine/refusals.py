"""What every engine refuses, in the same words. No torch here."""

from __future__ import annotations

from collections.abc import Iterable

from server.engine.base import EngineInfo, GenerationError, GenerationRequest, PromptTooLongError
from steering.decision import ProfileDecision, SteeringOptions


def check_length_and_count(request: GenerationRequest, info: EngineInfo) -> None:
    """Raise PromptTooLongError where the prompt leaves no room for a token, GenerationError where n is more than run at once."""
    if len(request.prompt_token_ids) >= info.max_model_len:
        raise PromptTooLongError(
            f"the prompt has {len(request.prompt_token_ids)} tokens; the limit is {info.max_model_len - 1}, "
            f"since prompt and completion share {info.max_model_len} positions"
        )
    if request.n > info.max_num_seqs:
        raise GenerationError(f"n is {request.n}; this server runs {info.max_num_seqs} at most", "n_too_large")


def unsafe(steering: SteeringOptions, profiles: Iterable[ProfileDecision]) -> GenerationError | None:
    """Fail closed: what ends a request of which a profile should have acted but could not compute its vector; else None."""
    acting = {a.profile for a in steering.activations if a.strength != 0 and not a.shadow}
    for profile in profiles:
        if profile.reason == "non_finite" and profile.name in acting:
            return GenerationError(
                f"steering profile {profile.name!r} computed a vector that is not finite for this prompt; "
                "the request was not answered unsteered. Check the profile and the model's dtype.",
                "steering_non_finite",
            )
    return None
