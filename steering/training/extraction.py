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
from steering.training.cache import StateCache, StatesByLayer, Window, read_layer
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
) -> Tensor | StatesByLayer:
    """h_q for each query: the state at the site, at the prompt's last token.

    Args:
        queries: taken a window at a time, as slices.
        layer: ℓ, 0-based; the site is this layer's output. Several layers are read in one pass.
        batch_tokens: the most tokens, padding included, in one pass (one longer row makes a batch of its own).
        cache: where finished windows of rows are kept and looked for.
        label: the progress bar's.
    Returns:
        (N, d) float32 on the CPU, in the order of `queries`. For several layers (L, N, d); with a cache, its like that holds no
        more than the files' names and reads a layer's (N, d) where it is asked for.
    """
    layers = [layer] if isinstance(layer, int) else list(layer)
    found = _Collected(len(layers), len(queries), text_config(model).hidden_size, _on_disk(layer, cache))
    with progress_bar(label, len(queries), progress) as advance, _reading(model, layers, batch_tokens, cache) as read:
        for start in range(0, len(queries), WINDOW):
            window = queries[start : start + WINDOW]
            prompts = [encode_query(tokenizer, query) for query in window]
            rows = [(ids, len(ids) - 1) for ids in prompts]
            found.add(torch.arange(start, start + len(rows)), read(rows, window, advance))
    return found.result(layer)


def shifts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    layer: int | Sequence[int],
    *,
    number: Tensor | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    cache: StateCache | None = None,
    progress: bool = False,
) -> Tensor | StatesByLayer:
    """δ = h₊ − h₋ for each pair: each answer is teacher-forced after its prompt, h is the mean over the answer's tokens at the site.

    The end-of-turn token is not part of the answer (ours).
    Args:
        number: (num pairs,), 0 to M − 1, each at least once: which of M rows the mean of whose pairs' shifts each pair belongs
            to; default: a row for each.
        others: as `query_states`.
    Returns:
        As `query_states`, M rows.
    """
    layers = [layer] if isinstance(layer, int) else list(layer)
    number = torch.arange(len(pairs)) if number is None else number
    counts = number.bincount()
    found = _Collected(len(layers), len(counts), text_config(model).hidden_size, _on_disk(layer, cache), counts)
    with (
        progress_bar("answers", 2 * len(pairs), progress) as advance,
        _reading(model, layers, batch_tokens, cache) as read,
    ):
        for start in range(0, len(pairs), WINDOW):
            window = pairs[start : start + WINDOW]
            queries = [pair.query for pair in window]
            prompts = [encode_query(tokenizer, query) for query in queries]
            sides = []
            for name in ("preferred", "undesired"):
                answers = [_answer_ids(tokenizer, pair, name) for pair in window]
                rows = [(ids + answer, len(ids)) for ids, answer in zip(prompts, answers, strict=True)]
                sides.append(read(rows, queries, advance))
            found.add(number[start : start + len(window)], *sides)
    return found.result(layer)


def _answer_ids(tokenizer: PreTrainedTokenizerBase, pair: Pair, name: str) -> list[int]:
    ids = tokenizer(getattr(pair, name), add_special_tokens=False)["input_ids"]
    if not ids:
        raise TrainingDataError(f"{pair.query.where}: the {name} answer has no tokens. Change it or remove the row.")
    return ids


def _on_disk(layer: int | Sequence[int], cache: StateCache | None) -> bool:
    return cache is not None and not isinstance(layer, int)


class _Collected:
    """(L, M, d) states summed up of windows: in memory at once, or, where windows are files, a layer at a time when asked for."""

    def __init__(self, num_layers: int, num_rows: int, width: int, on_disk: bool, counts: Tensor | None = None) -> None:
        """`counts`: (M,), by which the sums are divided; default: each row gets just one state."""
        self._shape, self._counts = (num_layers, num_rows, width), counts
        self._sums = None if on_disk else torch.zeros(self._shape)
        self._windows: list[tuple[Tensor, list[Window]]] = []

    def add(self, rows: Tensor, states: Window, less: Window | None = None) -> None:
        """Add a window's states, less others', to these rows."""
        window = [states] if less is None else [states, less]
        if self._sums is None:
            self._windows.append((rows, [Window(part.path) for part in window]))
        else:
            self._sums.index_add_(1, rows, _difference([part.states for part in window]))

    def result(self, layer: int | Sequence[int]) -> Tensor | StatesByLayer:
        if self._sums is None:
            return StatesByLayer(self._shape[0], self._layer)
        found = self._mean(self._sums)
        return found[0] if isinstance(layer, int) else found

    def _layer(self, index: int) -> Tensor:
        sums = torch.zeros(self._shape[1:])
        for rows, window in self._windows:
            sums.index_add_(0, rows, _difference([read_layer(part.path, index) for part in window]))
        return self._mean(sums)

    def _mean(self, sums: Tensor) -> Tensor:
        return sums if self._counts is None else sums.div_(self._counts[:, None])


def _difference(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] - parts[1]


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of like length, longest first, of at most `batch_tokens` tokens with padding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        count = max(1, batch_tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def _refuse_too_long(model: nn.Module, ids: list[int], query: Query) -> None:
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and len(ids) > limit:
        raise TrainingDataError(
            f"{query.where}: {len(ids)} tokens with the chat template, but the model has {limit} positions. Shorten it."
        )


@contextmanager
def _reading(
    model: nn.Module, layers: list[int], batch_tokens: int, cache: StateCache | None
) -> Iterator[Callable[[list[Row], list[Query], Callable[..., None]], Window]]:
    """Yields (a window's n rows, the queries they are of, progress) → its (L, n, d) states, each row's mean over its span."""
    width = text_config(model).hidden_size
    with torch.inference_mode(), _passes(model, layers) as read:

        def window(rows: list[Row], queries: list[Query], advance: Callable[..., None]) -> Window:
            for (ids, _), query in zip(rows, queries, strict=True):
                _refuse_too_long(model, ids, query)
            path = cache.path(layers, rows) if cache else None
            kept = cache.load(path, (len(layers), len(rows), width)) if cache else None
            if kept is not None:
                advance(len(rows))
                return Window(path, kept)
            found = torch.empty(len(layers), len(rows), width)
            for batch in batches_by_length([len(ids) for ids, _ in rows], batch_tokens):
                states = read([rows[b] for b in batch])
                if not states.isfinite().all():
                    raise ModelError(
                        f"the model's states are not finite numbers in {model.dtype}, for one at {queries[batch[0]].where}. "
                        "Give another --dtype, such as float32."
                    )
                found[:, batch] = states
                advance(len(batch))
            if cache:
                cache.save(path, found)
            return Window(path, found)

        yield window


@contextmanager
def _passes(model: nn.Module, layers: list[int]) -> Iterator[Callable[[list[Row]], Tensor]]:
    """Yields batch of B rows → (L, B, d) on the CPU. Each layer's (B, T, d) is reduced as soon as it is there, on its own
    device, and the pass ends at the last layer asked for; the model is as before when the context ends."""
    modules = decoder_layers(model)
    for layer in layers:
        if not 0 <= layer < len(modules):
            raise ModelError(f"layer {layer} is outside the model's layers 0 to {len(modules) - 1}.")
    last, reduced, starts, ends = max(layers), {}, torch.empty(0), torch.empty(0)
    device = model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device  # offloaded: moved where it is needed

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
