"""Texts of four kinds, in conversations: what the traffic of the simulation asks.

Code and prose are the held-out and the calibration text of the demo model, its documentation
strings apart from the rest; arithmetic and tables are made here.
"""

import csv
import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from sere_ray import assets

KINDS = ("arithmetic", "code", "prose", "tables")
_DOCUMENTATION = re.compile(r'"""(.*?)"""', re.DOTALL)
_MOST_TURNS = 4
_LEAST_CHARACTERS = 600
"""Of a text that is cut into turns."""


@dataclass(frozen=True)
class Conversation:
    """A text that goes on over turns, or problems of one person.

    Attributes:
        kind: of :data:`KINDS`.
        turns: prompt and answer of each; for a text that goes on only its parts, and no prompt.
    """

    kind: str
    turns: tuple[tuple[str, str], ...]


def conversations(seed: int) -> list[Conversation]:
    """All there are, kind after kind; those that are made depend on ``seed`` alone."""
    rng = random.Random(seed)
    texts = [record["text"] for record in assets.records("calibration.jsonl")]
    texts += assets.heldout_texts()
    code = [_DOCUMENTATION.sub("", text) for text in texts]
    prose = ["\n\n".join(_DOCUMENTATION.findall(text)) for text in texts]
    return [
        *(Conversation("arithmetic", tuple(_problems(rng))) for _ in range(120)),
        *(_going_on("code", text) for text in code if len(text) >= _LEAST_CHARACTERS),
        *(_going_on("prose", text) for text in _joined(prose)),
        *(_going_on("tables", _table(rng)) for _ in range(120)),
    ]


def _going_on(kind: str, text: str) -> Conversation:
    part = max(_LEAST_CHARACTERS // 2, len(text) // _MOST_TURNS)
    parts = [text[at : at + part] for at in range(0, len(text), part)]
    whole = tuple(("", piece) for piece in parts[:_MOST_TURNS] if len(piece) >= part)
    return Conversation(kind, whole)


def _joined(pieces: list[str]) -> Iterator[str]:
    """Short pieces after each other, until there is enough for a conversation."""
    held = ""
    for piece in pieces:
        held += piece + "\n\n"
        if len(held) >= _LEAST_CHARACTERS:
            yield held
            held = ""


def _problems(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Sums in the form that the demo model was trained on, with their right answers."""
    for _ in range(_MOST_TURNS):
        value = rng.randint(100, 999)
        expression, lines = str(value), []
        for step in range(rng.randint(2, 3)):
            operand = rng.randint(2, 9) if step == 0 else rng.randint(2, 999)
            sign = "*" if step == 0 else ("-" if operand <= value and rng.random() < 0.5 else "+")
            result = {"*": value * operand, "+": value + operand, "-": value - operand}[sign]
            lines.append(f"{value} {sign} {operand} = {result}")
            expression, value = f"{expression} {sign} {operand}", result
        yield f"Work out {expression}.", "\n".join([*lines, f"Answer: {value}"])


_PLACES = ("Oslo", "Lima", "Cairo", "Hanoi", "Quito", "Turin", "Perth", "Lagos", "Kyoto", "Minsk")
_COLUMNS = ("date", "place", "count", "price", "share", "weight", "rate", "total", "code", "year")


def _table(rng: random.Random) -> str:
    """A table as comma-separated values or in Markdown, one of many columns and orders."""
    columns = rng.sample(_COLUMNS, rng.randint(4, 7))
    rows = [[_cell(rng, column) for column in columns] for _ in range(60)]
    if rng.random() < 0.5:
        lines = [columns, ["---"] * len(columns), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    return file.getvalue()


def _cell(rng: random.Random, column: str) -> str:
    if column == "date":
        return f"{rng.randint(2015, 2026)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    if column == "place":
        return rng.choice(_PLACES)
    if column in ("share", "rate"):
        return f"{rng.random():.3f}"
    return str(rng.randint(0, 9999))
