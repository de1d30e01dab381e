"""Runs one step: packs the rows, makes one forward pass with steering inside it, samples. The only module that calls the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from server.engine.native import attention
from server.engine.native.attention import AttentionStep, KVCache
from server.engine.native.sampler import Sampled, sample
from server.engine.native.scheduler import Batch
from server.engine.native.sequence import Sequence, SequenceGroup
from steering.decision import SteeringDecision, combine
from steering.intervention import Intervention, Query, StepPlan
from steering.profile import SteeringProfile


@dataclass(frozen=True)
class StepResult:
    """`decisions`: one for each prefilled group. `sampled`: the next token of each sequence that ran."""

    decisions: list[tuple[SequenceGroup, SteeringDecision]]
    sampled: list[tuple[Sequence, Sampled]]


class Runner:
    """Holds the model, its KV cache and its intervention.

    Args:
        model: a transformers decoder; its attention implementation is replaced by ours.
        profiles: checked against the model; raises ProfileError.
    """

    def __init__(
        self, model: PreTrainedModel, profiles: list[SteeringProfile], max_num_seqs: int, max_model_len: int
    ) -> None:
        attention.register()
        model.set_attn_implementation(attention.ATTENTION)
        self.model = model.eval().requires_grad_(False)
        self.cache = KVCache(max_num_seqs, max_model_len)
        self.intervention = Intervention(model, profiles, max_num_seqs)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Steps must run inside this context: the hooks are on, gradients off."""
        with torch.inference_mode(), self.intervention.attached():
            yield

    def step(self, batch: Batch) -> StepResult:
        """Run a batch. Writes the KV rows and steering rows of its sequences; changes no sequence but its random stream."""
        token_ids, slots, positions, table_rows = [], [], [], []
        for sequence in batch.decode:
            token_ids.append(sequence.token_ids[-1])
            slots.append(sequence.slot)
            positions.append(len(sequence.token_ids) - 1)
            table_rows.append(_table_slot(sequence) if sequence.steered else 0)
        prefills, queries = [], []
        for group in batch.prefill:
            start, first = len(token_ids), group.sequences[0]
            prompt = group.request.prompt_token_ids
            token_ids += prompt
            slots += [first.slot] * len(prompt)
            positions += range(len(prompt))
            prefills.append((start, len(token_ids)))
            options = group.request.steering
            if options.activations:
                queries.append(Query(len(token_ids) - 1, _table_slot(first), options))
                prompt_row = self.intervention.prompt_row(_table_slot(first))
                table_rows += [prompt_row] * (len(prompt) - 1) + [_table_slot(first)]
            else:
                table_rows += [0] * len(prompt)

        device = self.model.device
        step = AttentionStep(
            cache=self.cache,
            slots=torch.tensor(slots, device=device),
            positions=torch.tensor(positions, device=device),
            decode_slots=torch.tensor([s.slot for s in batch.decode], dtype=torch.long, device=device),
            decode_lengths=torch.tensor([len(s.token_ids) for s in batch.decode], dtype=torch.long, device=device),
            prefills=tuple(prefills),
            first_slot=min((s.slot for s in batch.decode), default=0),
            last_slot=max((s.slot for s in batch.decode), default=0),
            max_length=max((len(s.token_ids) for s in batch.decode), default=0),
        )
        plan = StepPlan(tuple(queries), torch.tensor(table_rows, device=device) if any(table_rows) else None)
        logit_rows = [*range(len(batch.decode)), *(end - 1 for _, end in prefills)]
        with self.intervention.step(plan) as record:
            logits = self.model(
                input_ids=torch.tensor([token_ids], device=device),
                position_ids=step.positions[None],
                use_cache=False,
                logits_to_keep=torch.tensor(logit_rows, device=device),
                step=step,
            ).logits[0]  # (S, V)

        sequences, rows = list(batch.decode), list(range(len(batch.decode)))
        for row, group in enumerate(batch.prefill, start=len(batch.decode)):
            if not group.score_only:
                sequences += group.sequences
                rows += [row] * len(group.sequences)
                self._share_prefill(group)
        decided = iter(record.decisions())
        decisions = [
            (group, next(decided) if group.request.steering.activations else combine(group.request.steering, ()))
            for group in batch.prefill
        ]
        if not sequences:
            return StepResult(decisions, [])
        logits = logits if rows == list(range(len(logits))) else logits[rows]
        return StepResult(decisions, list(zip(sequences, sample(logits, sequences), strict=True)))

    def _share_prefill(self, group: SequenceGroup) -> None:
        """Give the group's other completions what the first one's prefill made."""
        first, *others = group.sequences
        if others:
            self.cache.copy_slot(first.slot, [s.slot for s in others], first.num_prompt_tokens)
            self.intervention.copy_slot(_table_slot(first), [_table_slot(s) for s in others])


def _table_slot(sequence: Sequence) -> int:
    """The sequence's row in the steering tables, whose row 0 is zero."""
    return sequence.slot + 1
