"""What is asked: a seeded workload file, or the lengths of a recorded trace."""

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sere_ray.policy.tiers import HEADER
from sere_ray.util.errors import SereError

_T = TypeVar("_T", bound=BaseModel)
_TEXT = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work number night
point home water room mother area money story fact month lot right study book eye job word
business issue side kind head house service friend father power hour game line end member law
"""
_WORDS = _TEXT.split()
"""Common English words: one token each for tokenizers trained on English text."""
_MOONCAKE_BLOCK = 512
"""Tokens that one of a Mooncake trace's ``hash_ids`` stands for."""


class Entry(BaseModel):
    """One request of a workload; a line of its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(min_length=1)
    max_tokens: int = Field(ge=1, le=1 << 20)
    ignore_eos: bool = Field(default=False, description="go on to max_tokens; vLLM only")
    temperature: float = Field(
        default=0, ge=0, le=2, description="of sampling; 1 keeps answers of random weights apart"
    )
    answer: str | None = Field(
        default=None, description="what must follow the last `Answer:` of the reply"
    )
    tier: str | None = Field(default=None, description="quality tier to ask for, not the key's")
    at: float | None = Field(default=None, ge=0, description="seconds from the start, in a trace")


class ClientKey(BaseModel):
    """An API key of the load; a line of the file of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = Field(min_length=1)
    tier: str | None = Field(default=None, description="asked for with each request of this key")
    weight: float = Field(default=1.0, gt=0, description="share of the requests")

    def headers(self, entry: Entry) -> dict[str, str]:
        """HTTP headers of a request: the key, and the tier to ask for (the entry's, else ours)."""
        tier = entry.tier or self.tier
        return {"Authorization": f"Bearer {self.key}"} | ({HEADER: tier} if tier else {})


def load_workload(path: Path) -> list[Entry]:
    """Read a workload: a JSON object a line, with the fields of :class:`Entry`.

    Raises:
        SereError: names file and line.
    """
    return [_checked(Entry, record, where) for where, record in _json_lines(path)]


def load_keys(path: Path) -> list[ClientKey]:
    """Read a YAML list of ``{key: ..., tier: ..., weight: ...}``.

    Raises:
        SereError: names file and entry; never shows a key.
    """
    try:
        records = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SereError(f"{path}: not a readable YAML file ({type(error).__name__})") from None
    if not isinstance(records, list) or not records:
        raise SereError(f"{path}: must be a list of entries such as `- {{key: sk-..., weight: 2}}`")
    return [_checked(ClientKey, r, f"{path}, entry {i + 1}") for i, r in enumerate(records)]


def load_trace(path: Path, *, speed: float = 1.0) -> list[Entry]:
    """Read a recorded trace: Mooncake's JSON lines or BurstGPT's CSV.

    Prompts are made up in the recorded lengths, counted in words; equal ``hash_ids`` of Mooncake
    make equal prefixes. Answers have the recorded length. The first request is due at once.

    Args:
        path: ``.jsonl`` or ``.csv``.
        speed: 2 = replay in half of the time.

    Raises:
        SereError: not such a file.
    """
    read = _burst_gpt if path.suffix == ".csv" else _mooncake
    entries = sorted(read(path, speed), key=lambda entry: entry.at or 0.0)
    if not entries:
        raise SereError(f"{path}: no request in it")
    first = entries[0].at or 0.0  # of a part of a trace, days after its beginning
    return [entry.model_copy(update={"at": (entry.at or 0.0) - first}) for entry in entries]


def text_workload(
    *, requests: int, prompt_words: tuple[int, int], output_tokens: tuple[int, int], seed: int
) -> list[Entry]:
    """Made-up text; lengths uniform between two numbers, answers of exactly the drawn length."""
    draw = random.Random(seed)
    return [
        Entry(
            prompt=_text(draw, draw.randint(*prompt_words)),
            max_tokens=draw.randint(*output_tokens),
            ignore_eos=True,
        )
        for _ in range(requests)
    ]


def arithmetic_workload() -> list[Entry]:
    """The demo model's held-out problems, with their answers."""
    from sere_ray import assets

    return [Entry(prompt=p, max_tokens=96, answer=a) for p, a in assets.arithmetic()]


def to_lines(entries: list[Entry]) -> str:
    """The text of a workload file."""
    records = (entry.model_dump(exclude_defaults=True) for entry in entries)
    return "".join(json.dumps(record) + "\n" for record in records)


def _mooncake(path: Path, speed: float) -> Iterator[Entry]:
    for where, record in _json_lines(path):
        try:
            at = float(record["timestamp"]) / 1e3 / speed
            length, output = int(record["input_length"]), int(record["output_length"])
            blocks = [int(number) for number in record.get("hash_ids", [])]
        except (KeyError, TypeError, ValueError):
            raise SereError(
                f"{where}: needs timestamp (ms), input_length and output_length, as Mooncake has"
            ) from None
        yield _of_trace(_blocks_text(blocks, length, where), output, at)


def _burst_gpt(path: Path, speed: float) -> Iterator[Entry]:
    with _opened(path) as file:
        for number, record in enumerate(csv.DictReader(file), 2):
            where = f"{path}, line {number}"
            try:
                at = float(record["Timestamp"]) / speed
                length, output = int(record["Request tokens"]), int(record["Response tokens"])
            except (KeyError, TypeError, ValueError):
                raise SereError(
                    f"{where}: needs Timestamp, Request tokens and Response tokens, as BurstGPT has"
                ) from None
            if output:  # BurstGPT records failed requests with 0
                yield _of_trace(_text(random.Random(number), length), output, at)


def _of_trace(prompt: str, output: int, at: float) -> Entry:
    return Entry(prompt=prompt, max_tokens=max(output, 1), ignore_eos=True, at=at)


def _blocks_text(blocks: list[int], length: int, where: str) -> str:
    """A prompt whose blocks are the same wherever their numbers are."""
    whole = [_text(random.Random(number), _MOONCAKE_BLOCK).split() for number in blocks]
    words = [word for block in whole for word in block]
    missing = length - len(words)
    return " ".join((words + _text(random.Random(where), max(missing, 1)).split())[:length])


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(_WORDS, k=max(words, 1)))


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise SereError(f"{path}: {error.strerror}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(file and line, record)``; empty lines are left out."""
    count = 0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise SereError(f"{path}, line {number}: not a JSON object")
            count += 1
            yield f"{path}, line {number}", record
    if not count:
        raise SereError(f"{path}: no request in it")


def _checked(kind: type[_T], record: Any, where: str) -> _T:
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "entry"
        raise SereError(f"{where}: {field}: {first['msg']}") from None
