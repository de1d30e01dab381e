"""What is known of a request at its end: told to the log, the metrics, the audit log and the trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.observability.audit import AuditLog
from server.observability.logging import log_request
from server.observability.metrics import Metrics
from steering.decision import SteeringDecision

if TYPE_CHECKING:
    from server.answers.generation import Generation
    from server.observability.tracing import Tracer

QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})


@dataclass(frozen=True)
class RequestAccount:
    """One request, ended.

    Attributes:
        route: the path as the API names it, with `{name}` for what varies; None where there is no such route.
        status: of the HTTP answer; 500 where none was begun.
        began_s: Unix time. `seconds`: from there to the end.
        key: the name of the API key.
        model: as the client named it.
        generations: one for each prompt, ended too.
        trace_headers: of the request, for W3C trace context.
    """

    request_id: str
    method: str
    path: str
    route: str | None
    status: int
    began_s: float
    seconds: float
    key: str | None = None
    model: str | None = None
    generations: Sequence[Generation] = ()
    trace_headers: Mapping[str, str] | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(generation.prompt_tokens for generation in self.generations)

    @property
    def completion_tokens(self) -> int:
        return sum(generation.completion_tokens for generation in self.generations)

    @property
    def first_token_s(self) -> float | None:
        """From the arrival at the engine to the first token of any prompt; None where there was none."""
        times = [generation.time_to_first_token_s for generation in self.generations]
        return min((time_s for time_s in times if time_s is not None), default=None)

    @property
    def decisions(self) -> list[SteeringDecision]:
        return [generation.decision for generation in self.generations if generation.decision is not None]

    @property
    def finish_reasons(self) -> list[str]:
        """Of every completion: `stop`, `length`, `abort` or `error`."""
        return [reason for generation in self.generations for reason in generation.finish_reasons if reason is not None]

    @property
    def summary(self) -> dict[str, Any]:
        """The log line's fields; None where there is nothing to say."""
        fields: dict[str, Any] = {
            "request": self.request_id,
            "path": self.path,
            "status": self.status,
            "seconds": self.seconds,
            "key": self.key,
        }
        if not self.generations:
            return fields
        decisions = self.decisions
        return fields | {
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "first_token_s": self.first_token_s,
            "finish": list(dict.fromkeys(self.finish_reasons)),
            "steered": any(decision.applied for decision in decisions),
            "reason": list(dict.fromkeys(decision.reason for decision in decisions)) or None,
            "fired": list(dict.fromkeys(p.name for d in decisions for p in d.profiles if p.fired)) or None,
        }


class Recorder:
    """Tells of each request's end wherever it is to be told.

    Args:
        text_of: the text of a prompt's token ids, where the log is to show prompts.
    """

    def __init__(
        self,
        metrics: Metrics,
        audit: AuditLog | None = None,
        tracer: Tracer | None = None,
        text_of: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self._metrics, self._audit, self._tracer, self._text_of = metrics, audit, tracer, text_of

    def ended(self, account: RequestAccount) -> None:
        """Count it, log it, trace it, and put its decisions into the audit log."""
        self._metrics.answered(account.route, account.status)
        if self._audit is not None:
            self._audit.put(account)
        if account.path in QUIET_PATHS:
            return
        fields = account.summary
        if self._tracer is not None:
            fields["trace"] = self._tracer.ended(account)
        if self._text_of is not None and account.generations:
            fields["prompt"] = [
                self._text_of(generation.request.prompt_token_ids) for generation in account.generations
            ]
        log_request(fields)
