"""What every command of the command line shares."""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from sere_ray.util.errors import SereError

console = Console(stderr=True)
DEFAULT_URL = "http://127.0.0.1:8000"
"""Of a deployment on this machine."""


def as_root(url: str) -> str:
    """An option's address, with or without ``/v1``."""
    from sere_ray.util.http import root

    try:
        return root(url)
    except SereError as error:
        raise typer.BadParameter(str(error)) from None


Model = Annotated[str, typer.Argument(help="Checkpoint folder or hub name.")]
Revision = Annotated[str | None, typer.Option(help="Branch or commit of a hub model.")]
Out = Annotated[Path, typer.Option(help="File to write; replaced in one step.")]
TextColumn = Annotated[str, typer.Option(help="Column that holds the text.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float32"],
    typer.Option(help="Of the weights; auto: the checkpoint's, on a CPU float32."),
]


@contextmanager
def user_errors() -> Iterator[None]:
    """Print what the user has to fix as one line, exit code 2, no traceback."""
    try:
        yield
    except SereError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def numbers(option: str, text: str, allowed: Container[int]) -> list[int]:
    """The whole numbers of a comma-separated option.

    Raises:
        SereError: one is not among the allowed.
    """
    values = [int(part) if part.strip().isdecimal() else None for part in text.split(",")]
    found = [value for value in values if value is not None and value in allowed]
    if len(found) != len(values):
        raise SereError(f"{option} = {text!r}: must be numbers of {allowed}, comma-separated")
    return found


def share(option: str, text: str) -> float:
    """A share as a percentage or a number: ``1%`` and ``0.01`` are the same.

    Raises:
        SereError: it is neither.
    """
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        raise SereError(f"{option} = {text!r}: must be a share, such as 1% or 0.01") from None


def names(text: str) -> tuple[str, ...]:
    """The names of a comma-separated option."""
    return tuple(part.strip() for part in text.split(","))


def saver(out: Path) -> Callable[[dict[str, Any]], None]:
    """A function that writes its argument, the content of a result, to the result file ``out``."""
    from sere_ray.util.results import write_result

    return lambda content: write_result(out, content)
