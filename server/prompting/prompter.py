"""From messages or text to prompt token ids: loading the tokenizer, rendering the chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from server.conversation import Conversation
from server.errors import InvalidRequestError
from server.prompting.vocabulary import Vocabulary
from server.tools.template import TemplateTools
from steering.errors import ModelError

# The template's own refusals, and what one raises that is given what it does not expect. It runs sandboxed, so nothing else does.
TEMPLATE_FAILURES = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


class Prompter:
    """A tokenizer with its chat template. Works in a thread of its own, so a long prompt does not hold the event loop up."""

    def __init__(
        self,
        tokenizer: Any,
        eos_token_ids: frozenset[int],
        chat_template: str | None = None,
        tool_format: str | None = None,
    ) -> None:
        """
        Args:
            chat_template: Jinja text that takes the place of the tokenizer's own.
            tool_format: how the model writes tool calls, where its template does not show it.
        Raises:
            ModelError: see `Vocabulary`.
        """
        self.vocabulary = Vocabulary(tokenizer)
        self.eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self.tools = TemplateTools(_text_of(chat_template or tokenizer.chat_template), tool_format)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompter")

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can work."""
        return bool(self._chat_template or self._tokenizer.chat_template)

    def template_problem(self) -> str | None:
        """What is wrong with the chat template whatever the conversation, if anything is."""
        if not self.has_chat_template:
            return None
        messages = [{"role": "user", "content": "Hello"}]
        try:
            self._tokenizer.apply_chat_template(messages, chat_template=self._chat_template, tokenize=False)
        except TemplateSyntaxError as error:
            return f"line {error.lineno}: {_first_line(error)}"
        except TEMPLATE_FAILURES:  # it may want another conversation
            pass
        return None

    async def chat(self, conversation: Conversation) -> tuple[int, ...]:
        """Token ids of a conversation up to where the assistant speaks. Raises InvalidRequestError."""
        if not self.has_chat_template:
            raise InvalidRequestError(
                f"{conversation.param}: this model has no chat template, so there is no right way to write a conversation "
                "for it. Use /v1/completions, or start the server with --chat-template FILE.",
                param=conversation.param,
                code="no_chat_template",
            )
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._render, conversation)

    async def text(self, prompt: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer puts around text unless told otherwise."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, prompt, add_special_tokens)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens in it, as the tokenizer writes it: for one whose `text` they are, that text."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._decode, list(token_ids))

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """How the vocabulary writes each token."""
        return self._tokenizer.convert_ids_to_tokens(list(token_ids))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    def _render(self, conversation: Conversation) -> tuple[int, ...]:
        messages, told = self.tools.told(conversation)
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._chat_template,
                add_generation_prompt=conversation.add_generation_prompt,
                continue_final_message=conversation.continue_final_message,
                tokenize=False,
                **told,
                **conversation.template_options,
            )
        except TEMPLATE_FAILURES as error:
            raise InvalidRequestError(
                f"{conversation.param}: the model's chat template refuses them: {str(error).rstrip('.')}.",
                param=conversation.param,
                code="chat_template_refused",
            ) from error
        return self._encode(text, False)  # the template has written the special tokens

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _text_of(template: str | dict[str, str] | None) -> str:
    """A tokenizer may have several templates, by name."""
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def load_prompter(model: str, chat_template: Path | None = None, tool_format: str | None = None) -> Prompter:
    """The prompter of a model folder or hub id; arguments as for `Prompter`.

    Raises ModelError: no tokenizer, a tokenizer that cannot be streamed, a chat template that cannot be read or is no Jinja.
    """
    from transformers import AutoTokenizer

    folder = Path(model)
    if not folder.is_dir() and (folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1):
        raise ModelError(
            f"{model}: no such folder. --model takes a folder with a transformers checkpoint, or a hub id."
        )
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{folder / TOKENIZER_FILES[0]}: no such file. Copy the model's tokenizer into its folder; "
            "the server cannot read text without it."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # the tokenizers library raises bare Exception for a bad tokenizer.json
        raise ModelError(f"{model}: its tokenizer cannot be loaded ({_first_line(error)}).") from error
    prompter = Prompter(tokenizer, eos_token_ids(model, tokenizer), _template_text(chat_template), tool_format)
    if problem := prompter.template_problem():
        raise ModelError(f"{chat_template or model}: the chat template is not valid Jinja ({problem}).")
    return prompter


def eos_token_ids(model: str, tokenizer: Any) -> frozenset[int]:
    """Every token id that ends an answer: the generation config's (or the config's), and the tokenizer's own."""
    from transformers import AutoConfig, GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError as error:
        if (Path(model) / "generation_config.json").exists():
            raise ModelError(f"{model}: its generation_config.json cannot be read ({_first_line(error)}).") from error
        configured = getattr(AutoConfig.from_pretrained(model).get_text_config(decoder=True), "eos_token_id", None)
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    return frozenset(ids | ({tokenizer.eos_token_id} - {None}))


def _template_text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: the chat template cannot be read ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
