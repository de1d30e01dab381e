"""Fields of vLLM's that both endpoints of completions take beside OpenAI's, and their shape in an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, model_validator

from server.wire.base import ResponseModel, Unsupported, inconsistent
from server.wire.sampling import SamplingFields

MAX_PRIORITY = 2**31 - 1

NOT_BUILT: Mapping[str, Unsupported] = {
    "include_stop_str_in_output": Unsupported("Append the stop string yourself.", (False,)),
    "skip_special_tokens": Unsupported("Special tokens are no text; ask for return_token_ids.", (True,)),
    "spaces_between_special_tokens": Unsupported("Remove the field.", (True,)),
    "truncate_prompt_tokens": Unsupported("Shorten the prompt yourself; /tokenize counts its tokens."),
    "use_beam_search": Unsupported("Remove the field.", (False,)),
    "length_penalty": Unsupported("There is no beam search.", (1, 1.0)),
}


class CommonExtras(SamplingFields):
    """What the open servers' clients send."""

    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None,
        description="Log-probabilities of the prompt's tokens, each with so many of the likeliest; not in streams.",
    )
    return_token_ids: bool | None = Field(None, description="Give the prompt's and the completions' token ids.")
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = Field(
        None, description="Lower runs earlier; 0 where it is not given."
    )

    @model_validator(mode="after")
    def _prompt_logprobs_are_for_whole_answers(self) -> CommonExtras:
        if self.prompt_logprobs is not None and self.stream:
            raise inconsistent("prompt_logprobs", "is not given in streams; leave it out, or set stream to false")
        return self


class PromptLogprob(ResponseModel):
    """One token at one place in the prompt. `rank` 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
