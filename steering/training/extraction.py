"""Residual-stream states at the site (a decoder layer's output), batched, exact, and no deeper than the site.

Rows are sorted by length and right-padded into batches of a token budget. Causal attention never lets a row see the
padding to its right, so a row's states do not depend on its batch but for rounding (tests/parity/test_extraction.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from steering.architecture import decoder_layers, text_config
from steering.errors import ModelError, TrainingDataError
from steering.training.data import Pair, Query
from steering.training.progress import progress_bar

DEFAULT_BATCH_TOKENS = 8192


class _SiteReached(Exception):
    """Ends a forward pass once the site's output is known: the layers above it would be wasted."""


def encode_query(tokenizer: PreTrainedTokenizerBase, query: Query) -> list[int]:
    """Token ids of a conversation through the chat template, up to and including the generation prompt.

    Raises ModelError if the tokenizer has no chat template, TrainingDataError if the template refuses the messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ModelError(
            "the model's tokenizer has no chat template, so there is no telling where a prompt ends. "
            "Train on the instruction-tuned checkpoint, or add chat_template.jinja to its folder."
        )
    try:
        encoded = tokenizer.apply_chat_template(query.chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    except TemplateError as error:
        raise TrainingDataError(f"{query.where}: the chat template refuses field 'query': {error}") from error
    return list(encoded["input_ids"])


def query_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Query],
    layer: int,
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    label: str = "queries",
    progress: bool = False,
) -> Tensor:
    """h_q for each query: the state at the site, at the prompt's last token.

    Args:
        layer: ℓ, 0-based; the site is this layer's output.
        batch_tokens: the most tokens, padding included, in one pass (one longer row makes a batch of its own).
        label: the progress bar's.
    Returns:
        (N, d) float32 on the CPU, in the order of `queries`.
    """
    prompts = [encode_query(tokenizer, query) for query in queries]

    def last(states: Tensor, rows: list[int]) -> Tensor:
        ends = torch.tensor([len(prompts[i]) - 1 for i in rows], device=states.device)
        return states[torch.arange(len(rows), device=states.device), ends]

    with progress_bar(label, len(queries), progress) as advance:
        return _reduce(model, prompts, [query.where for query in queries], layer, batch_tokens, advance, last)


def shifts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    layer: int,
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: bool = False,
) -> Tensor:
    """δ = h₊ − h₋ for each pair: (N, d) float32 on the CPU. Args as `query_states`."""
    queries = [pair.query for pair in pairs]
    common = {"batch_tokens": batch_tokens, "progress": progress}
    preferred = [pair.preferred for pair in pairs]
    undesired = [pair.undesired for pair in pairs]
    return answer_states(
        model, tokenizer, queries, preferred, layer, label="preferred answers", **common
    ) - answer_states(model, tokenizer, queries, undesired, layer, label="undesired answers", **common)


def answer_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Query],
    answers: Sequence[str],
    layer: int,
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    label: str = "answers",
    progress: bool = False,
) -> Tensor:
    """h₊ or h₋ for each answer, teacher-forced after its prompt: the mean over the answer's tokens at the site.

    The end-of-turn token is not part of the answer (ours). Args and returns as `query_states`.
    """
    prompts = [encode_query(tokenizer, query) for query in queries]
    sequences = [
        prompt + tokenizer(answer, add_special_tokens=False)["input_ids"]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]

    def mean(states: Tensor, rows: list[int]) -> Tensor:
        position = torch.arange(states.shape[1], device=states.device)  # (T,)
        starts = torch.tensor([len(prompts[i]) for i in rows], device=states.device)[:, None]
        ends = torch.tensor([len(sequences[i]) for i in rows], device=states.device)[:, None]
        inside = (position >= starts) & (position < ends)  # (N, T)
        total = torch.where(inside[..., None], states.float(), 0.0).sum(1)
        return total / (ends - starts)

    with progress_bar(label, len(answers), progress) as advance:
        return _reduce(model, sequences, [query.where for query in queries], layer, batch_tokens, advance, mean)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of like length, longest first, of at most `batch_tokens` tokens with padding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        count = max(1, batch_tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def _reduce(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    names: Sequence[str],
    layer: int,
    batch_tokens: int,
    advance: Callable[..., None],
    reduce: Callable[[Tensor, list[int]], Tensor],
) -> Tensor:
    """`reduce` each batch's states (B, T, d) to (B, d), and put the rows back in order. `names`: each row's file:line."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    for sequence, name in zip(sequences, names, strict=True):
        if limit is not None and len(sequence) > limit:
            raise TrainingDataError(
                f"{name}: {len(sequence)} tokens with the chat template, but the model has {limit} positions. Shorten it."
            )
    device = model.get_input_embeddings().weight.device
    found = torch.empty(len(sequences), text_config(model).hidden_size)
    with torch.inference_mode(), _stop_at(model, layer) as forward:
        for rows in batches_by_length(list(map(len, sequences)), batch_tokens):
            width = len(sequences[rows[0]])
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros(len(rows), width, dtype=torch.long)
            for b, row in enumerate(rows):
                ids[b, : len(sequences[row])] = torch.tensor(sequences[row])
                mask[b, : len(sequences[row])] = 1
            states = forward(ids.to(device), mask.to(device))
            found[rows] = reduce(states, rows).float().cpu()
            advance(len(rows))
    return found.clone()


@contextmanager
def _stop_at(model: nn.Module, layer: int) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Yields (ids, mask) → the site's states (B, T, d); the model is as before when the context ends."""
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ModelError(f"layer {layer} is outside the model's layers 0 to {len(layers) - 1}.")
    reached: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        reached.append(output if isinstance(output, Tensor) else output[0])
        raise _SiteReached

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        reached.clear()
        try:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        except _SiteReached:
            return reached.pop()
        raise ModelError(f"the forward pass never came to layer {layer}.")

    handle = layers[layer].register_forward_hook(hook)
    try:
        yield forward
    finally:
        handle.remove()
