"""What a training would read and about how long its extraction would take; nothing is written."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steering.architecture import decoder_layers, text_config
from steering.training.examples import read_examples
from steering.training.extraction import encode_query, query_states
from steering.training.options import TrainingOptions
from steering.training.progress import progress_bar
from steering.training.trainer import candidates


@dataclass(frozen=True)
class Estimate:
    """`tokens` of all forward passes, `seconds` at the pace of one batch; `memory_bytes` of the states at any time, one layer's,
    and `disk_bytes` of all that the cache will hold, or, for several layers without one, a temporary folder."""

    pairs: int
    queries: int
    layers: int
    tokens: int
    seconds: float
    memory_bytes: int
    disk_bytes: int


def estimate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TrainingOptions, *, progress: bool = False
) -> Estimate:
    """Check and tokenise all examples, and time one batch of queries. Raises as `train` does for its inputs."""
    layers = candidates(options.layer, len(decoder_layers(model)))
    examples = read_examples(options, text_config(model).hidden_size)
    queries, pairs = examples.queries, examples.pairs
    lengths, answers = array("Q"), 0
    with progress_bar("tokens", len(queries) + len(pairs), progress) as advance:
        for query in queries:
            lengths.append(len(encode_query(tokenizer, query)))
            advance()
        for pair, number in zip(pairs, examples.pair_number.tolist(), strict=True):
            for answer in (pair.preferred, pair.undesired):
                answers += len(tokenizer(answer, add_special_tokens=False)["input_ids"])
            answers += 2 * lengths[examples.pair_rows[number]]
            advance()
    tokens = sum(lengths) + answers
    size, held = 0, 0
    while size < len(lengths) and (not size or held + lengths[size] <= options.batch_tokens):
        held += lengths[size]
        size += 1
    batch = queries[:size]
    query_states(model, tokenizer, batch[:1], layers)  # the first pass is slower than the others
    started = time.perf_counter()
    query_states(model, tokenizer, batch, layers, batch_tokens=options.batch_tokens)
    pace = (time.perf_counter() - started) / held
    width = 4 * text_config(model).hidden_size
    memory = width * (len(queries) + len(examples.pair_rows))
    disk = width * len(layers) * (len(queries) + 2 * len(pairs)) if options.cache or len(layers) > 1 else 0
    return Estimate(len(pairs), len(queries), len(layers), tokens, pace * tokens, memory, disk)
