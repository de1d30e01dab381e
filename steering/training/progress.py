"""How a long task tells how far it is: `with progress_bar("pairs", total, show) as advance: advance(n)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(label: str, total: int, show: bool = True) -> Iterator[Callable[..., None]]:
    """A bar with the time gone and the time left. Yields `advance(count=1)`; with `show` off it tells nobody."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count=1: bar.advance(task, count)
        bar.update(task, completed=total)  # a stage that stops early is done, too
