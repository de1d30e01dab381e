"""What a request may say to the model's chat template."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, model_validator
from pydantic_core import PydanticCustomError

from server.wire.base import RequestModel, inconsistent

# What `apply_chat_template` takes by name, and what it puts at a template's disposal.
RESERVED = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "sanitize_control_tokens"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "self", "loop", "raise_exception", "strftime_now", "range", "dict", "namespace"),
        *("lipsum", "cycler", "joiner", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
        *("mask_token", "additional_special_tokens", "extra_special_tokens"),
    }
)


def _not_reserved(options: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(RESERVED & set(options)):
        raise PydanticCustomError("reserved", f"must not hold {taken[0]!r}, which the server sets itself")
    return options


class TemplateFields(RequestModel):
    """vLLM's names. A model that has them has `messages` too."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_not_reserved)] | None = None

    @model_validator(mode="after")
    def _begins_or_continues(self) -> TemplateFields:
        if not self.continue_final_message:
            return self
        if self.add_generation_prompt:
            raise inconsistent("continue_final_message", "cannot go with add_generation_prompt true; send one of them")
        messages = getattr(self, "messages", None)
        if messages and messages[-1].role != "assistant":
            raise inconsistent("continue_final_message", "needs the last message to be the assistant's")
        return self

    def template_fields(self) -> dict[str, Any]:
        """The same as fields of `Conversation`; a turn is opened unless the last one is continued."""
        continues = bool(self.continue_final_message)
        opens = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        return {
            "add_generation_prompt": opens,
            "continue_final_message": continues,
            "template_options": self.chat_template_kwargs or {},
        }
