"""Files of text, told by their ending: parquet, JSON, plain text; compressed or not."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sere_ray.util.errors import DataError

ALLOWED = (
    "allowed: a .parquet, .jsonl, .ndjson or .json file with a text column, any other UTF-8 text "
    "file, these but .parquet also as .gz, .bz2 or .xz, or the name of a Hugging Face dataset"
)
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_UNREAD = (".csv", ".tsv", ".zst", ".zip", ".tar", ".tgz", ".7z", ".arrow", ".feather", ".pdf")
"""Endings of files whose syntax would pass for text, or that are not text."""
_PARQUET_ROWS = 64  # rows read at a time


def file_texts(path: Path, column: str) -> Iterator[str]:
    """Documents of a file, by its ending.

    Raises:
        DataError: such files are not read. While texts are walked: damaged, or no such column.
    """
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    kind = before if last in _OPENERS else last
    if kind in _UNREAD or (kind == ".parquet" and last in _OPENERS):
        raise DataError(f"data = {str(path)!r}: {kind or last} files are not read; {ALLOWED}")
    if kind == ".parquet":
        return _parquet_texts(path, column)
    if kind in (".jsonl", ".ndjson"):
        return _jsonl_texts(path, column)
    return _json_texts(path, column) if kind == ".json" else _plain_texts(path)


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from them
        raise DataError(f"data = {str(path)!r}: not a readable parquet file ({error})") from None
    _check_column(column, file.schema_arrow.names, str(path))
    for batch in file.iter_batches(_PARQUET_ROWS, columns=[column]):
        for text in batch.column(0).to_pylist():
            yield _as_text(text, column, str(path))


def _jsonl_texts(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"data = {where!r}: not a line of JSON ({error}); mend it") from None
        yield row_text(row, column, where)


def _json_texts(path: Path, column: str) -> Iterator[str]:
    """Of a list of objects; else of an object a line."""
    try:
        rows = json.loads("".join(_lines(path)))
    except json.JSONDecodeError:
        yield from _jsonl_texts(path, column)
        return
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise DataError(f"data = {str(path)!r}: must be a list of objects with {column!r}")
    for number, row in enumerate(rows):
        yield row_text(row, column, f"{path}, entry {number}")


def _plain_texts(path: Path) -> Iterator[str]:
    yield "".join(_lines(path))


def _lines(path: Path) -> Iterator[str]:
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8") as file:
            yield from file
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"data = {str(path)!r}: not a text file ({error}); {ALLOWED}") from None


def row_text(row: object, column: str, where: str) -> str:
    """The text of a row of JSON or of a hub data set.

    Raises:
        DataError: it is no object, has no such column, or the column holds no text.
    """
    if not isinstance(row, dict):
        raise DataError(f"data = {where!r}: must be an object with {column!r}, is {row!r:.60}")
    _check_column(column, list(row), where)
    return _as_text(row[column], column, where)


def _check_column(column: str, columns: Sequence[str], where: str) -> None:
    """Refuse a column that is not there.

    Raises:
        DataError: names those that are.
    """
    if column not in columns:
        raise DataError(
            f"data = {where!r}: no column {column!r}; it has {', '.join(map(repr, columns))}; "
            "choose one as text_column"
        )


def _as_text(value: object, column: str, where: str) -> str:
    """What a row holds; nothing is empty text.

    Raises:
        DataError: it is no text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"data = {where!r}: column {column!r} holds {type(value).__name__}, must be text; "
            "choose another one as text_column"
        )
    return value
