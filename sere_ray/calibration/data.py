"""Calibration text: where it comes from, and how it becomes token windows and batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sere_ray.calibration.text_files import ALLOWED, file_texts, row_text
from sere_ray.util.errors import DataError
from sere_ray.util.files import file_sha256

_CHARACTERS_PER_TOKEN = 8  # first guess of how much of a long document is needed


@dataclass(frozen=True)
class TextSource:
    """Documents and where they come from."""

    name: str
    texts: Iterator[str]
    """Read lazily, can be walked once."""
    revision: str | None = None
    """Commit of a hub dataset."""
    sha256: str | None = None
    """Hash of a local file."""


@dataclass(frozen=True)
class Batch:
    """Windows padded on the right to the longest one."""

    input_ids: Tensor
    """``[B, L]`` int64."""
    mask: Tensor
    """``[B, L]`` int64: 1 = a real token, 0 = padding."""


def open_texts(data: str, text_column: str = "text") -> TextSource:
    """Open a file or a hub dataset.

    Args:
        data: path of a file that its ending tells, in upper or lower case: ``.parquet``,
            ``.jsonl`` or ``.ndjson`` (an object a line), ``.json`` (a list of objects, or one a
            line), all with a text column, any other text file (one document); all but
            ``.parquet`` also compressed, ``.gz``, ``.bz2`` or ``.xz``. Or name of a Hugging Face
            dataset, of which the split ``train`` is streamed.
        text_column: name of the column.

    Raises:
        DataError: cannot be read, has no such column, or holds no text. Also while the texts
            are walked.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        raise DataError(f"data = {data!r}: is a folder; {ALLOWED}")
    if not path.exists():
        looks_like_file = path.suffix[1:2].isalpha()  # "org/set-v1.0" does not
        if looks_like_file or path.is_absolute() or data.startswith((".", "~")):
            raise DataError(f"data = {data!r}: no such file; {ALLOWED}")
        texts, revision = _hub_texts(data, text_column)
        return TextSource(data, _not_empty(texts, data), revision=revision)
    texts = file_texts(path, text_column)
    return TextSource(data, _not_empty(texts, data), sha256=file_sha256(path))


def make_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequences: int, length: int
) -> list[list[int]]:
    """Cut documents into windows of token ids.

    A document gives consecutive windows of exactly ``length`` tokens; its rest is left out. The
    first windows of all documents come first, then the second ones, and so on; documents
    shorter than ``length`` give one short window each and come last. So enough long documents
    are the recipe of the paper: one truncated sequence each, and no more documents are read.

    Args:
        texts: documents; read only as far as needed.
        tokenizer: adds the special tokens it adds by default.
        sequences: number of windows.
        length: tokens of a window.

    Returns:
        ``sequences`` lists of at most ``length`` token ids.

    Raises:
        DataError: not enough text, or a number is not positive.
    """
    for name, value in (("sequences", sequences), ("length", length)):
        if value < 1:
            raise DataError(f"{name} = {value}: must be at least 1")
    rounds: list[list[list[int]]] = []  # rounds[r] holds the r-th window of every document
    short: list[list[int]] = []
    for text in texts:
        ids = _first_tokens(text, tokenizer, sequences * length)
        if len(ids) < length:
            short.extend([ids] if ids and len(short) < sequences else [])
            continue
        earlier = 0  # windows that come before this one whatever the next documents hold
        for number, start in enumerate(range(0, len(ids) - length + 1, length)):
            if earlier >= sequences:
                break
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(ids[start : start + length])
            earlier += len(rounds[number])
        if len(rounds[0]) >= sequences:
            break
    windows = [*chain.from_iterable(rounds), *short][:sequences]
    if len(windows) < sequences:
        raise DataError(
            f"the text gives {len(windows)} windows of up to {length} tokens, but sequences = "
            f"{sequences}; give more text, or fewer or shorter sequences"
        )
    return windows


def make_batches(windows: Sequence[Sequence[int]], batch_size: int, pad_id: int = 0) -> list[Batch]:
    """Group windows in order.

    Args:
        windows: lists of token ids.
        batch_size: windows of a batch.
        pad_id: any valid token id; masked everywhere.

    Raises:
        DataError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise DataError(f"batch_size = {batch_size}: must be at least 1")
    groups = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    return [_pad(group, pad_id) for group in groups]


def _pad(windows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    shape = (len(windows), max(len(window) for window in windows))
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.tensor(window)
        mask[row, : len(window)] = 1
    return Batch(ids, mask)


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """The first ``count`` token ids, without tokenising all of a very long text."""
    characters = max(1024, _CHARACTERS_PER_TOKEN * count)
    while True:
        ids: list[int] = tokenizer(text[:characters], verbose=False)["input_ids"]
        if len(ids) > count or characters >= len(text):
            return ids[:count]
        characters *= 4


def _hub_texts(name: str, column: str) -> tuple[Iterator[str], str | None]:
    """Stream the split ``train`` of a hub dataset; also the commit it is at."""
    try:
        import datasets  # heavy, and only needed here
        from huggingface_hub import HfApi

        datasets.disable_progress_bars()
        revision = HfApi().dataset_info(name).sha
        rows = datasets.load_dataset(name, revision=revision, split="train", streaming=True)
    except Exception as error:
        raise _hub_error(name, error) from None
    return _row_texts(rows, name, column), revision


def _row_texts(rows: Iterable[dict[str, Any]], name: str, column: str) -> Iterator[str]:
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise _hub_error(name, error) from None
        yield row_text(row, column, name)


def _hub_error(name: str, error: Exception) -> DataError:
    # datasets, the hub client and the HTTP stack share no base class short of Exception
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return DataError(
        f"data = {name!r}: no such file, and not a dataset that can be streamed from the hub "
        f"({reason}); {ALLOWED}; without a network, download it and give the file"
    )


def _not_empty(texts: Iterable[str], name: str) -> Iterator[str]:
    """The documents that hold something, at least one."""
    found = False
    for text in texts:
        if text.strip():
            found = True
            yield text
    if not found:
        raise DataError(f"data = {name!r}: holds no text; {ALLOWED}")
