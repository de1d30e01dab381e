"""One step of the generation loop: schedule, run, decide, append. Synchronous; the engine puts a thread around it."""

from __future__ import annotations

from server.engine.base import EngineObserver, EngineStats, GenerationError, TokenEvent
from server.engine.native.runner import Runner
from server.engine.native.sampler import Sampled
from server.engine.native.scheduler import Scheduler
from server.engine.native.sequence import Phase, Sequence, SequenceGroup
from steering.decision import SteeringDecision

Result = TokenEvent | SteeringDecision | Exception
Results = list[tuple[SequenceGroup, Result]]


class EngineCore:
    """The scheduler and the runner together. `add`, `abort` and `step` are called from one thread.

    Args:
        max_model_len: prompt and completion tokens together.
        observer: told of each decision that a generation gets, when it is made.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, max_model_len: int, observer: EngineObserver | None = None
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.max_model_len = max_model_len
        self._observer = observer
        self._results: Results = []

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, group: SequenceGroup) -> None:
        """Queue a request. Raises EngineOverloadedError."""
        self.scheduler.add(group)

    def abort(self, group: SequenceGroup) -> None:
        """Drop a request at whatever stage; its rows are free at once."""
        self.scheduler.abort(group)

    def step(self) -> Results:
        """One forward pass: newcomers get their decision, everyone running gets a token. Returns what to tell whom."""
        result = self.runner.step(self.scheduler.schedule())
        for group, decision in result.decisions:
            self._decide(group, decision)
        for sequence, sampled in result.sampled:
            if sequence.phase is not Phase.FINISHED:
                self._append(sequence, sampled)
        self.scheduler.collect()
        results, self._results = self._results, []
        return results

    def stats(self) -> EngineStats:
        """Gauges of this moment."""
        capacity = self.scheduler.max_num_seqs * self.max_model_len
        return EngineStats(
            self.scheduler.num_running, self.scheduler.num_waiting, self.scheduler.num_running_tokens / capacity
        )

    def _decide(self, group: SequenceGroup, decision: SteeringDecision) -> None:
        """Take note of what steering did to a prompt that was just prefilled."""
        if group.score_only:
            self._results.append((group, decision))
            self.scheduler.abort(group)
            return
        if self._observer is not None:
            self._observer.decided(decision)
        refusal = _unsafe(decision, group)
        if refusal is not None:
            self._fail(group, refusal)
            return
        group.decision = decision
        for sequence in group.sequences:
            sequence.steered = decision.applied
            sequence.phase = Phase.DECODE

    def _append(self, sequence: Sequence, sampled: Sampled) -> None:
        """Give a sequence its token, and end it if that was its last."""
        group = sequence.group
        if not sampled.finite:
            self._fail(group, GenerationError("the model produced NaN or infinite logits", "non_finite_logits"))
            return
        options = sequence.request.sampling
        sequence.token_ids.append(sampled.token_id)
        full = len(sequence.token_ids) >= self.max_model_len
        if sampled.token_id in options.stop_token_ids:
            sequence.finish_reason = "stop"
        elif full or sequence.num_completion_tokens >= options.max_tokens:
            sequence.finish_reason = "length"
        event = TokenEvent(sequence.index, sampled.token_id, sequence.finish_reason, sampled.logprobs, group.decision)
        group.decision = None  # said once, on the first event
        self._results.append((group, event))
        if sequence.finish_reason is not None:
            self.scheduler.finish(sequence)

    def _fail(self, group: SequenceGroup, error: GenerationError) -> None:
        """End one request with an error; its KV rows may hold NaN, so they are cleaned."""
        for sequence in group.sequences:
            if sequence.slot >= 0:
                self.runner.cache.scrub(sequence.slot)
        self.scheduler.abort(group)
        self._results.append((group, error))


def _unsafe(decision: SteeringDecision, group: SequenceGroup) -> GenerationError | None:
    """Fail closed: a profile that should have acted but could not compute its vector ends the request."""
    acting = {a.profile for a in group.request.steering.activations if a.strength != 0 and not a.shadow}
    for profile in decision.profiles:
        if profile.reason == "non_finite" and profile.name in acting:
            return GenerationError(
                f"steering profile {profile.name!r} computed a vector that is not finite for this prompt; "
                "the request was not answered unsteered. Check the profile and the model's dtype.",
                "steering_non_finite",
            )
    return None
