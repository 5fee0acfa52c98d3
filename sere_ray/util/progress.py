"""Show how far long work is: a bar on a terminal, elsewhere a plain line now and then."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_SECONDS = 10.0


@contextmanager
def progress(
    console: Console | None, total: int, *, task: str, unit: str
) -> Iterator[Callable[[int], None]]:
    """Report progress while the block runs.

    Args:
        console: where to; None = nowhere.
        total: units to come.
        task: name of the work.
        unit: what is counted, in the plural.

    Yields:
        A function to call with the number of units just done.
    """
    if console is None:
        yield lambda done: None
    elif console.is_terminal:
        with _bar(console, unit) as bar:
            shown = bar.add_task(task, total=total, rate=0.0)
            clock = _Clock(total)

            def advance(done: int) -> None:
                clock.done += done
                bar.update(shown, advance=done, rate=clock.rate)

            yield advance
    else:
        yield _Lines(console, total, task, unit).advance


@contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    """Show that the block goes on: a spinner on a terminal, a line every ten seconds elsewhere."""
    if console.is_terminal:
        with console.status(text):
            yield
        return
    start = time.monotonic()

    def tell() -> None:
        console.print(f"   {text}: {time.monotonic() - start:.0f} s", highlight=False)

    with every(_LINE_EVERY_SECONDS, tell):
        yield


@contextmanager
def every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call a function now and then while the block runs, in a thread, which ends with the block."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            call()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _bar(console: Console, unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TextColumn("{task.fields[rate]:,.4g} " + unit + "/s"),
        TimeRemainingColumn(),
        console=console,
    )


class _Clock:
    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.start = time.monotonic()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.monotonic() - self.start, 1e-9)


class _Lines(_Clock):
    def __init__(self, console: Console, total: int, task: str, unit: str) -> None:
        super().__init__(total)
        self.console, self.last, self.task, self.unit = console, self.start, task, unit

    def advance(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.last < _LINE_EVERY_SECONDS and self.done < self.total:
            return
        self.last = now
        rate, unit = self.rate, self.unit
        self.console.print(
            f"{self.task}: {self.done:,} of {self.total:,} {unit}, {rate:,.4g} {unit}/s, "
            f"{(self.total - self.done) / rate:,.0f} s left",
            highlight=False,
        )
