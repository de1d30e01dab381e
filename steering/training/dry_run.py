"""What a training would read and about how long its extraction would take; nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steering.architecture import decoder_layers, text_config
from steering.training.extraction import encode_query, query_states
from steering.training.options import TrainingOptions
from steering.training.progress import progress_bar
from steering.training.trainer import candidates, read_examples


@dataclass(frozen=True)
class Estimate:
    """`tokens` of all forward passes, `seconds` at the pace of one batch, `state_bytes` in memory at the end (and on disk)."""

    pairs: int
    queries: int
    layers: int
    tokens: int
    seconds: float
    state_bytes: int


def estimate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TrainingOptions, *, progress: bool = False
) -> Estimate:
    """Check and tokenise all examples, and time one batch of queries. Raises as `train` does for its inputs."""
    layers = candidates(options.layer, len(decoder_layers(model)))
    pairs, bare, _ = read_examples(options, text_config(model).hidden_size)
    queries = list(dict.fromkeys([q.query for rows in bare.values() for q in rows] + [p.query for p in pairs]))
    lengths, answers = {}, 0
    with progress_bar("tokens", len(queries) + len(pairs), progress) as advance:
        for query in queries:
            lengths[query] = len(encode_query(tokenizer, query))
            advance()
        for pair in pairs:
            for answer in (pair.preferred, pair.undesired):
                answers += lengths[pair.query] + len(tokenizer(answer, add_special_tokens=False)["input_ids"])
            advance()
    tokens = sum(lengths.values()) + answers
    batch, held = [], 0
    for query in queries:
        if batch and held + lengths[query] > options.batch_tokens:
            break
        batch.append(query)
        held += lengths[query]
    query_states(model, tokenizer, batch[:1], layers)  # the first pass is slower than the others
    started = time.perf_counter()
    query_states(model, tokenizer, batch, layers, batch_tokens=options.batch_tokens)
    pace = (time.perf_counter() - started) / held
    size = 4 * len(layers) * text_config(model).hidden_size * (len(queries) + 2 * len(pairs))
    return Estimate(len(pairs), len(queries), len(layers), tokens, pace * tokens, size)
