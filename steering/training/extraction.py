"""Residual-stream states at one or many decoder layers' outputs, batched, exact, and no deeper than the last of them.

Rows are tokenised a window at a time, sorted by length within it, and right-padded into batches of a token budget. Causal attention never lets a row see the
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
from steering.training.cache import StateCache
from steering.training.data import Pair, Query
from steering.training.progress import progress_bar

DEFAULT_BATCH_TOKENS = 8192
WINDOW = 512  # rows tokenised at once, and kept in one cache file: what an interruption can lose

Row = tuple[list[int], int]  # token ids, and the first position of the span whose states are averaged (to the end)


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
    layer: int | Sequence[int],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    cache: StateCache | None = None,
    label: str = "queries",
    progress: bool = False,
) -> Tensor:
    """h_q for each query: the state at the site, at the prompt's last token.

    Args:
        layer: ℓ, 0-based; the site is this layer's output. Several layers are read in one pass.
        batch_tokens: the most tokens, padding included, in one pass (one longer row makes a batch of its own).
        cache: where finished windows of rows are kept and looked for.
        label: the progress bar's.
    Returns:
        (N, d) float32 on the CPU, in the order of `queries`; (L, N, d) for several layers.
    """

    def row(i: int) -> Row:
        prompt = encode_query(tokenizer, queries[i])
        return prompt, len(prompt) - 1

    with progress_bar(label, len(queries), progress) as advance:
        return _extract(model, row, queries, layer, batch_tokens, cache, advance)


def shifts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    layer: int | Sequence[int],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    cache: StateCache | None = None,
    progress: bool = False,
) -> Tensor:
    """δ = h₊ − h₋ for each pair: (N, d) float32 on the CPU; (L, N, d) for several layers. Args as `query_states`."""
    queries = [pair.query for pair in pairs]
    preferred = [pair.preferred for pair in pairs]
    undesired = [pair.undesired for pair in pairs]

    def read(answers: list[str], label: str) -> Tensor:
        return answer_states(
            model,
            tokenizer,
            queries,
            answers,
            layer,
            batch_tokens=batch_tokens,
            cache=cache,
            label=label,
            progress=progress,
        )

    return read(preferred, "preferred answers").sub_(read(undesired, "undesired answers"))


def answer_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Query],
    answers: Sequence[str],
    layer: int | Sequence[int],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    cache: StateCache | None = None,
    label: str = "answers",
    progress: bool = False,
) -> Tensor:
    """h₊ or h₋ for each answer, teacher-forced after its prompt: the mean over the answer's tokens at the site.

    The end-of-turn token is not part of the answer (ours). Args and returns as `query_states`.
    """

    def row(i: int) -> Row:
        prompt, answer = (
            encode_query(tokenizer, queries[i]),
            tokenizer(answers[i], add_special_tokens=False)["input_ids"],
        )
        if not answer:
            raise TrainingDataError(
                f"{queries[i].where}: one of the answers has no tokens. Change it or remove the row."
            )
        return prompt + answer, len(prompt)

    with progress_bar(label, len(answers), progress) as advance:
        return _extract(model, row, queries, layer, batch_tokens, cache, advance)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of like length, longest first, of at most `batch_tokens` tokens with padding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        count = max(1, batch_tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def _extract(
    model: nn.Module,
    row: Callable[[int], Row],
    queries: Sequence[Query],
    layer: int | Sequence[int],
    batch_tokens: int,
    cache: StateCache | None,
    advance: Callable[..., None],
) -> Tensor:
    """Each row's mean state over its span: (N, d), or (L, N, d). `row(i)` tokenises; only a window's ids are ever held."""
    layers = [layer] if isinstance(layer, int) else list(layer)
    found = torch.empty(len(layers), len(queries), text_config(model).hidden_size)
    with torch.inference_mode(), _reading(model, layers) as read:
        for start in range(0, len(queries), WINDOW):
            numbers = range(start, min(start + WINDOW, len(queries)))
            rows = [row(i) for i in numbers]
            for i, (ids, _) in zip(numbers, rows, strict=True):
                _refuse_too_long(model, ids, queries[i])
            part = found[:, start : start + len(rows)]
            path = cache.path(layers, rows) if cache else None
            kept = cache.load(path, tuple(part.shape)) if cache else None
            if kept is not None:
                part.copy_(kept)
                advance(len(rows))
                continue
            for batch in batches_by_length([len(ids) for ids, _ in rows], batch_tokens):
                part[:, batch] = states = read([rows[b] for b in batch])
                if not states.isfinite().all():
                    raise ModelError(
                        f"the model's states are not finite numbers in {model.dtype}, for one at {queries[start + batch[0]].where}. "
                        "Give another --dtype, such as float32."
                    )
                advance(len(batch))
            if cache:
                cache.save(path, part)
    return found[0] if isinstance(layer, int) else found


def _refuse_too_long(model: nn.Module, ids: list[int], query: Query) -> None:
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and len(ids) > limit:
        raise TrainingDataError(
            f"{query.where}: {len(ids)} tokens with the chat template, but the model has {limit} positions. Shorten it."
        )


@contextmanager
def _reading(model: nn.Module, layers: list[int]) -> Iterator[Callable[[list[Row]], Tensor]]:
    """Yields batch of B rows → (L, B, d) on the CPU. Each layer's (B, T, d) is reduced as soon as it is there, on its own
    device, and the pass ends at the last layer asked for; the model is as before when the context ends."""
    modules = decoder_layers(model)
    for layer in layers:
        if not 0 <= layer < len(modules):
            raise ModelError(f"layer {layer} is outside the model's layers 0 to {len(modules) - 1}.")
    last, reduced, starts, ends = max(layers), {}, torch.empty(0), torch.empty(0)
    device = model.get_input_embeddings().weight.device

    def hook(number: int, output: Tensor | tuple[Tensor, ...]) -> None:
        reduced[number] = _span_mean(output if isinstance(output, Tensor) else output[0], starts, ends)
        if number == last:
            raise _SiteReached

    def read(rows: list[Row]) -> Tensor:
        nonlocal starts, ends
        starts, ends = torch.tensor([s for _, s in rows]), torch.tensor([len(ids) for ids, _ in rows])
        ids = torch.zeros(len(rows), int(ends.max()), dtype=torch.long)
        for b, (tokens, _) in enumerate(rows):
            ids[b, : len(tokens)] = torch.tensor(tokens)
        mask = (torch.arange(ids.shape[1]) < ends[:, None]).long()
        reduced.clear()
        try:
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        except _SiteReached:
            return torch.stack([reduced[layer].cpu() for layer in layers])
        raise ModelError(f"the forward pass never came to layer {last}.")

    handles = [
        modules[n].register_forward_hook(lambda _m, _a, output, n=n: hook(n, output)) for n in dict.fromkeys(layers)
    ]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _span_mean(states: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """(B, T, d) → (B, d) float32: the mean over positions [start, end) of each row."""
    starts, ends = starts.to(states.device), ends.to(states.device)
    if bool((ends - starts == 1).all()):
        return states[torch.arange(len(states), device=states.device), starts].float()
    position = torch.arange(states.shape[1], device=states.device)  # (T,)
    inside = (position >= starts[:, None]) & (position < ends[:, None])  # (B, T)
    return torch.where(inside[..., None], states.float(), 0.0).sum(1) / (ends - starts)[:, None]
