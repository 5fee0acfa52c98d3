"""Who hears how far a training is: a console, directly or through an actor on Ray."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console

from sere_ray.util.progress import progress


class Listener(Protocol):
    """Who hears how far training is."""

    def at(self, steps: int) -> None:
        """So many steps of all levels are done; fewer than before where a worker had died."""

    def say(self, text: str) -> None:
        """What validation found."""


@contextmanager
def on_console(console: Console | None, total: int) -> Iterator[Listener]:
    """A listener that shows progress and time left while the block runs.

    Args:
        console: where to; None = nowhere.
        total: steps of all levels.
    """
    with progress(console, total, task="train masks", unit="steps") as advance:
        done = 0

        class Shown:
            def at(self, steps: int) -> None:
                nonlocal done
                if steps != done:
                    advance(steps - done)
                done = steps

            def say(self, text: str) -> None:
                if console is not None:
                    console.print(text, highlight=False, soft_wrap=True)

        yield Shown()


class Notes:
    """An actor that holds what workers say until the command takes it."""

    def __init__(self) -> None:
        self.steps: int | None = None
        self.texts: list[str] = []
        self.refused: str | None = None

    def at(self, steps: int) -> None:
        """See :class:`Listener`."""
        self.steps = steps

    def say(self, text: str) -> None:
        """See :class:`Listener`."""
        self.texts.append(text)

    def take(self) -> tuple[int | None, list[str]]:
        """Steps, and texts that have not been taken yet."""
        texts, self.texts = self.texts, []
        return self.steps, texts

    def refuse(self, text: str) -> None:
        """A worker cannot go on, and could not if it were started again."""
        self.refused = self.refused or text

    def refusal(self) -> str | None:
        """Why it cannot."""
        return self.refused


class Noted:
    """The first worker's end of :class:`Notes`.

    Attributes:
        before: steps of trainings that came before this one.
    """

    def __init__(self, notes: Any) -> None:
        self.notes, self.before = notes, 0

    def at(self, steps: int) -> None:
        """See :class:`Listener`."""
        self.notes.at.remote(self.before + steps)

    def say(self, text: str) -> None:
        """See :class:`Listener`."""
        self.notes.say.remote(text)
