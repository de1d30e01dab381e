"""How much one key may ask: requests and tokens a minute, requests at once. Token buckets that refill all the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from server.access.keys import ApiKey
from server.errors import RateLimitError


@dataclass
class Bucket:
    """Holds up to `size`, refills by `size` a minute. A debt is allowed: what is spent is known only afterwards."""

    size: int
    now: Callable[[], float]
    level: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self._at = float(self.size), self.now()

    def refill(self) -> None:
        now = self.now()
        self.level, self._at = min(self.size, self.level + (now - self._at) * self.size / 60), now

    def seconds_until(self, level: float) -> float:
        """How long until it holds so much again, if nobody takes anything."""
        return max(0.0, (level - self.level) * 60 / self.size)


class Usage:
    """What one key has used. `begin` each request, and `end` it, whatever came of it."""

    def __init__(self, key: ApiKey, now: Callable[[], float] = time.monotonic) -> None:
        self._key, self._running = key, 0
        self._requests = Bucket(key.requests_per_minute, now) if key.requests_per_minute else None
        self._tokens = Bucket(key.tokens_per_minute, now) if key.tokens_per_minute else None

    def begin(self) -> None:
        """Count a request in. Raises RateLimitError where it is one too many, and counts nothing then."""
        for bucket in (self._requests, self._tokens):
            if bucket is not None:
                bucket.refill()
        if self._key.max_concurrent is not None and self._running >= self._key.max_concurrent:
            raise RateLimitError(
                f"This key may have {self._key.max_concurrent} requests running at once.", retry_after_s=1
            )
        if self._requests is not None and self._requests.level < 1:
            raise RateLimitError(
                f"This key may send {self._requests.size} requests a minute.", self._requests.seconds_until(1)
            )
        if self._tokens is not None and self._tokens.level <= 0:
            raise RateLimitError(
                f"This key may use {self._tokens.size} tokens a minute.", self._tokens.seconds_until(1)
            )
        if self._requests is not None:
            self._requests.level -= 1
        self._running += 1

    def end(self, num_tokens: int) -> None:
        """Count it out, with the prompt and completion tokens that it took."""
        self._running -= 1
        if self._tokens is not None:
            self._tokens.level -= num_tokens

    def headers(self) -> dict[str, str]:
        """What is left, under OpenAI's names."""
        found: dict[str, str] = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found |= {
                    f"x-ratelimit-limit-{name}": str(bucket.size),
                    f"x-ratelimit-remaining-{name}": str(max(0, math.floor(bucket.level))),
                    f"x-ratelimit-reset-{name}": f"{bucket.seconds_until(bucket.size):.3f}s",
                }
        return found
