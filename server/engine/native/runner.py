"""Runs one step's passes: packs rows, runs the layers from site to site, steers in between, samples. The only caller of the model.

The model is cut into segments of layers, each ending at a site. A prompt runs through the first segment whole, in as many
chunks as it takes, and leaves its states there; then the site reads the last one's, and the next segment starts from the
states plus the dose. So every token passes every layer once, and the vector reaches all of the prompt although only its end
decides it. With several sites each decides on states that the sites below have already changed, as in a single pass.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from server.engine.native.attention import DecodeStep, PrefillStep, Span
from server.engine.native.block_index import digest
from server.engine.native.cuda_graph import GraphedDecode
from server.engine.native.decoder import Decoder
from server.engine.native.kv_cache import KVCache
from server.engine.native.prefix_cache import PrefixCache
from server.engine.native.prompt_logprobs import foretold
from server.engine.native.sampler import Sampled, sample
from server.engine.native.scheduler import Chunk
from server.engine.native.sequence import Phase, Sequence, SequenceGroup
from steering.decision import SteeringOptions, combine
from steering.intervention import Reading, Site

MAX_READINGS = 1024  # prompts whose gate and vector are kept


@dataclass
class Prefilled:
    """What a pass over chunks brought: requests that are now decided, and the first tokens of those whose prompt is through."""

    decided: list[SequenceGroup] = field(default_factory=list)
    sampled: list[tuple[Sequence, Sampled]] = field(default_factory=list)


def segments_of(num_layers: int, sites: Seq[Site]) -> list[range]:
    """The layers up to each site, and those after the last (none, if that is the last layer)."""
    ends = [site.layer + 1 for site in sites] + [num_layers]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


class Runner:
    """The decoder, its caches and its sites. Call inside `torch.inference_mode()`."""

    def __init__(self, decoder: Decoder, sites: Seq[Site], cache: KVCache, num_cached_blocks: int) -> None:
        self.decoder = decoder
        self.sites = list(sites)
        self.segments = segments_of(decoder.num_layers, sites)
        self.cache = cache
        self.prefix_cache = PrefixCache(cache, self.segments, num_cached_blocks)
        self._graphed: GraphedDecode | None = None
        self._readings: dict[tuple[int, bytes, SteeringOptions], Reading] = {}

    def change_sites(self, sites: Seq[Site], num_cached_blocks: int, groups: Seq[SequenceGroup]) -> None:
        """Act at other sites from the next step on. Requests keep what was decided about them; prompts that are on their way
        begin again. Where the layers change, the prefix cache begins empty.

        Args:
            sites: those of before that stay must be the same objects.
            num_cached_blocks: of each of the new segments.
            groups: every request that waits or runs.
        """
        before, after = ([site.layer for site in s] for s in (self.sites, sites))
        self.sites = list(sites)
        if before == after:
            return
        self.segments = segments_of(self.decoder.num_layers, sites)
        stats, self.prefix_cache = self.prefix_cache.stats, None
        self.prefix_cache = PrefixCache(self.cache, self.segments, num_cached_blocks)
        self.prefix_cache.stats = stats
        self._readings.clear()
        for group in groups:
            group.steering.move(before, after, group.decision is not None)
            for sequence in group.sequences:
                if sequence.phase is Phase.PREFILL and (group.prefilled or sequence.index == 0):
                    self.enter(sequence, 0)
        if self._graphed is not None:
            self.record_graphs()

    def enter(self, sequence: Sequence, segment: int) -> None:
        """Put a sequence at the start of a segment; what is cached of it counts as done.

        In the last segment nothing does for a prompt whose log-probabilities are asked for: the cache has no states there, and
        each row's are needed. What the segments below have of it counts.
        """
        group, sequence.segment = sequence.group, segment
        scored = group.scores_prompt and segment == len(self.segments) - 1
        sequence.num_done = 0 if scored else self.prefix_cache.load(sequence, segment)
        if not group.prefilled:
            found = sequence.num_done
            group.num_cached_tokens = found if segment == 0 else min(found, group.num_cached_tokens)

    def prefill(self, segment: int, chunks: Seq[Chunk]) -> Prefilled:
        """Run chunks through one segment. Writes their slots, moves their sequences on.

        In the last segment, prompts whose log-probabilities are asked for have a pass of their own, in which every row is
        computed to its end: the others' numbers and cost are the same as without them.
        """
        if segment < len(self.segments) - 1:
            return self._pass(segment, chunks, self._to_site)
        scored = [chunk for chunk in chunks if chunk.sequence.group.scores_prompt]
        plain = [chunk for chunk in chunks if not chunk.sequence.group.scores_prompt] if scored else chunks
        result = Prefilled()
        for through, mine in ((self._to_ends, plain), (self._to_every_row, scored)):
            if mine:
                found = self._pass(segment, mine, through)
                result.decided += found.decided
                result.sampled += found.sampled
        return result

    def _pass(self, segment: int, chunks: Seq[Chunk], through: Callable[..., Tensor]) -> Prefilled:
        """`prefill` in one pass; `through` runs the segment's layers and gives the states at prompts' ends, (S, d)."""
        spans, row = [], 0
        for chunk in chunks:
            spans.append(Span(row, chunk.sequence.slot, chunk.start, chunk.stop, chunk.last))
            row += chunk.stop - chunk.start
        step = PrefillStep(self.cache, spans)
        ends = through(self._inputs(segment, chunks), self.segments[segment], step, chunks)
        for chunk in chunks:
            chunk.sequence.num_done = chunk.stop
            if chunk.last:
                self.prefix_cache.save(chunk.sequence, segment)
        done = sorted((chunk.sequence for chunk in chunks if chunk.last), key=lambda sequence: sequence.slot)
        result = Prefilled()
        if not done:
            return result
        result.decided = self._decide(segment, done, ends)
        if segment == len(self.segments) - 1:
            result.sampled = self._first_tokens(done, ends)
        else:
            for sequence in done:
                self.enter(sequence, segment + 1)
        return result

    def _to_site(self, states: Tensor, layers: range, step: PrefillStep, chunks: Seq[Chunk]) -> Tensor:
        """Through layers that end at a site, where every row's state is left."""
        states = self.decoder.run(states, layers, step)
        self.cache.write(self.cache.states, step.slots, step.positions, states[:, None])
        return states[step.end_rows]

    def _to_ends(self, states: Tensor, layers: range, step: PrefillStep, chunks: Seq[Chunk]) -> Tensor:
        """Through the last layers, for the prompts' ends alone."""
        return self.decoder.finish(states, layers, step)

    def _to_every_row(self, states: Tensor, layers: range, step: PrefillStep, chunks: Seq[Chunk]) -> Tensor:
        """Through the last layers with every row, and note the log-probabilities of the prompt tokens that the rows foretell.

        A chunk at a prompt's start begins anew: a request that was preempted in mid-prefill is run, and noted, again.
        """
        states, row = self.decoder.run(states, layers, step), 0
        for chunk in chunks:
            group, length = chunk.sequence.group, chunk.stop - chunk.start
            if chunk.start == 0:
                group.prompt_logprobs = [None]
            tokens = group.request.prompt_token_ids[chunk.start + 1 : chunk.stop + 1]
            num_top = group.request.sampling.prompt_logprobs or 0
            group.prompt_logprobs += foretold(self.decoder.logits, states[row : row + length], tokens, num_top)
            row += length
        return states[step.end_rows]

    def decode(self, sequences: Seq[Sequence]) -> list[tuple[Sequence, Sampled]]:
        """One token for each of the sequences, which are in the order of their slots."""
        token_ids = [s.token_ids[-1] for s in sequences]
        slots, lengths = [s.slot for s in sequences], [len(s.token_ids) for s in sequences]
        rows = [
            [0 if s.group.steering.doses[site] is None else 1 + s.slot for s in sequences]
            for site in range(len(self.sites))
        ]
        if self._graphed is not None:
            logits = self._graphed(token_ids, slots, lengths, rows)
        else:
            device = self.decoder.device
            step = DecodeStep(self.cache, slots, lengths)
            added = [torch.tensor(r, device=device) if any(r) else None for r in rows]
            logits = self._decode_pass(step, torch.tensor(token_ids, device=device), added)
        return list(zip(sequences, sample(logits, list(sequences)), strict=True))

    def record_graphs(self) -> None:
        """Replay decode passes as CUDA graphs from now on. Raises RuntimeError where that cannot be done."""
        self._graphed = GraphedDecode(self._decode_pass, self.cache, len(self.sites))

    def _decode_pass(self, step: DecodeStep, token_ids: Tensor, table_rows: list[Tensor | None]) -> Tensor:
        """Logits (D, V); `table_rows`: for each site the row of its table that each of the D rows gets, None: no row any."""
        states = self.decoder.embed(token_ids)
        for number, layers in enumerate(self.segments):
            states = self.decoder.run(states, layers, step)
            if number < len(self.sites) and table_rows[number] is not None:
                states = states + self.sites[number].table[table_rows[number]]
        return self.decoder.logits(states)

    def _inputs(self, segment: int, chunks: Seq[Chunk]) -> Tensor:
        """What the chunks bring to a segment: their embeddings, or the site's states plus the dose; (T, d)."""
        if segment == 0:
            token_ids = [t for chunk in chunks for t in chunk.sequence.token_ids[chunk.start : chunk.stop]]
            return self.decoder.embed(torch.tensor(token_ids, device=self.decoder.device))
        parts = []
        for chunk in chunks:
            sequence = chunk.sequence
            states = self.cache.read(self.cache.states, sequence.slot, chunk.stop)[0, chunk.start :]
            dose = sequence.group.steering.doses[segment - 1]
            if dose is not None:
                states = dose.add(states, chunk.start, sequence.num_prompt_tokens)
            parts.append(states)
        return torch.cat(parts)

    def _decide(self, segment: int, sequences: Seq[Sequence], states: Tensor) -> list[SequenceGroup]:
        """Let the site at a segment's end read its queries; returns the requests that are then decided."""
        new = [(row, s.group) for row, s in enumerate(sequences) if s.group.decision is None]
        if segment < len(self.sites):
            new = [(row, group) for row, group in new if len(group.steering.doses) == segment]
            asking = [(row, group) for row, group in new if group.request.steering.activations]
            for _, group in new:
                group.steering.doses.append(None)
            if asking:
                for (_, group), reading in zip(asking, self._read(segment, asking, states), strict=True):
                    group.steering.doses[segment] = reading.dose
                    group.steering.profiles.extend(reading.profiles)
                    group.steering.compute_ms += reading.compute_ms
        if segment < len(self.sites) - 1:
            return []
        for _, group in new:
            options = group.request.steering
            found = {profile.name: profile for profile in group.steering.profiles}
            profiles = tuple(found[a.profile] for a in options.activations)
            group.decision = combine(options, profiles, group.steering.compute_ms)
        return [group for _, group in new]

    def _read(self, site: int, asking: Seq[tuple[int, SequenceGroup]], states: Tensor) -> list[Reading]:
        """What a site makes of queries, each with its row of `states`. A prompt that was read under the same options before
        is answered from memory: in another batch its state is rounded otherwise, and so would be its vector and that one's key."""
        keys = [
            (site, digest(group.request.prompt_token_ids, group.request.cache_owner), group.request.steering)
            for _, group in asking
        ]
        new = {key: row for key, (row, _) in zip(keys, asking, strict=True) if key not in self._readings}
        if new:
            readings = self.sites[site].read(states[list(new.values())], [options for _, _, options in new])
            self._readings |= zip(new, readings, strict=True)
        found = [self._readings[key] if key in new else replace(self._readings[key], compute_ms=0.0) for key in keys]
        while len(self._readings) > MAX_READINGS:
            self._readings.pop(next(iter(self._readings)))  # the oldest
        return found

    def _first_tokens(self, sequences: Seq[Sequence], states: Tensor) -> list[tuple[Sequence, Sampled]]:
        """The next token of each prefilled sequence, and of the completions that share its prompt."""
        receivers, rows = [], []
        for row, sequence in enumerate(sequences):
            group = sequence.group
            heirs = [sequence] if group.prefilled else group.sequences
            group.prefilled = True
            for heir in heirs:
                for site, dose in zip(self.sites, group.steering.doses, strict=True):
                    site.hold(heir.slot, dose)
            if len(heirs) > 1:
                self.cache.copy(sequence.slot, [s.slot for s in heirs[1:]], len(sequence.token_ids))
            receivers += heirs
            rows += [row] * len(heirs)
        logits = self.decoder.logits(states)
        logits = logits if rows == list(range(len(logits))) else logits[rows]
        return list(zip(receivers, sample(logits, receivers), strict=True))
