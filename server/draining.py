"""Between the signal to end and the end: what still runs may finish, nothing new begins."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Draining:
    """Attributes:
    begun: the server has been told to end.
    num_active: requests that are being answered.
    """

    begun: bool = False
    num_active: int = 0
