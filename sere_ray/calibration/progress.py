"""How far calibration is: a bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_SECONDS = 30.0


@contextmanager
def token_progress(console: Console | None, total: int) -> Iterator[Callable[[int], None]]:
    """Report progress while the block runs.

    Args:
        console: where to; None = nowhere.
        total: tokens to come.

    Yields:
        A function to call with the number of tokens just done.
    """
    if console is None:
        yield lambda tokens: None
    elif console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task("calibrate", total=total, rate=0.0)
            clock = _Clock(total)

            def advance(tokens: int) -> None:
                clock.done += tokens
                bar.update(task, advance=tokens, rate=clock.rate)

            yield advance
    else:
        yield _Lines(console, total).advance


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )


class _Clock:
    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.start = time.monotonic()

    @property
    def rate(self) -> float:
        """Tokens per second since the start."""
        return self.done / max(time.monotonic() - self.start, 1e-9)


class _Lines(_Clock):
    def __init__(self, console: Console, total: int) -> None:
        super().__init__(total)
        self.console, self.last = console, self.start

    def advance(self, tokens: int) -> None:
        self.done += tokens
        now = time.monotonic()
        if now - self.last < _LINE_EVERY_SECONDS and self.done < self.total:
            return
        self.last = now
        left = (self.total - self.done) / self.rate
        self.console.print(
            f"calibrate: {self.done:,} of {self.total:,} tokens, {self.rate:,.0f} tokens/s, "
            f"{left:,.0f} s left",
            highlight=False,
        )
