"""The tasks: questions whose answers are tokens that decode rows predict.

A text of a question has a prompt of fixed length, which is exact, and decode positions after it.
What is asked starts behind the first of these, so that no exact row has a part in an answer. The
same seed gives the same questions.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from sere_ray.evaluation.task_arithmetic import worked_texts
from sere_ray.evaluation.task_definitions import definitions, which_name
from sere_ray.evaluation.task_texts import Document, Span
from sere_ray.util.errors import SereError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """One text with the answers in it; or several, each with one answer, of which one is true."""

    texts: list[list[int]]
    """Token ids, all of one length; of several the first is the true one."""
    answers: list[Span]
    """Tokens of the items of a text. Of one text each is an item; of several, it is the choice."""


@dataclass(frozen=True)
class Task:
    """A kind of question."""

    prompt_tokens: int
    """Tokens of a text that are exact."""
    decode_tokens: int
    """Tokens of a text after them."""
    choices: int
    """Texts of a question."""
    ask: "Callable[[Task, list[Document], PreTrainedTokenizerBase], Iterator[Question]]"
    """Makes the questions, as many as there are."""

    remedy: str = "give more or longer text, or a smaller batch"
    """What to do where there are too few questions."""
    seed: int = 0
    """Of the order, of what is drawn, and of sums: those of another seed are other sums."""

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self.prompt_tokens + self.decode_tokens


def _cloze(
    task: Task, documents: list[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Question]:
    """Every word of a window's decode positions; each token is asked for once."""
    windows = [
        (number, start)
        for number, document in enumerate(documents)
        for start in range(0, len(document.ids) - task.length + 1, task.decode_tokens - 1)
    ]
    words = [list(document.words()) for document in documents]
    for number, start in _shuffled(windows, task.seed):
        asked = start + task.prompt_tokens + 1, start + task.length
        answers = [
            (first - start, last - start)
            for first, last in words[number]
            if asked[0] <= first and last <= asked[1]
        ]
        if answers:
            yield Question([documents[number].ids[start : start + task.length]], answers)


def _continuation(
    task: Task, documents: list[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Question]:
    """How a window goes on, among the ends of three windows of the same document."""
    answer = (task.length - _CONTINUATION, task.length)
    rng = random.Random(task.seed)
    windows, ends = [], []
    for number, document in enumerate(documents):
        starts = range(0, len(document.ids) - task.length + 1, _CONTINUATION)
        own = {tuple(document.ids[start + answer[0] : start + answer[1]]) for start in starts}
        ends.append(sorted(own))
        if len(own) >= task.choices:
            windows += [(number, start) for start in starts]
    for number, start in _shuffled(windows, task.seed):
        text = documents[number].ids[start : start + task.length]
        before, end = text[: answer[0]], tuple(text[answer[0] :])
        others = [other for other in rng.sample(ends[number], task.choices) if other != end]
        false = [before + list(other) for other in others[: task.choices - 1]]
        yield Question([text, *false], [answer])


def _arithmetic(
    task: Task, documents: list[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Question]:
    """Sums worked out line by line after three examples; documents have no part."""
    misses = 0
    for before, reply, after in worked_texts(tokenizer, random.Random(task.seed)):
        rest = task.decode_tokens - len(reply)
        misses = 0 if rest >= 0 and len(before) >= task.prompt_tokens else misses + 1
        if misses > _MISSES:
            return
        if not misses:
            ids = before[-task.prompt_tokens :] + reply + after[:rest]
            answer = (task.prompt_tokens + 1, task.prompt_tokens + len(reply))
            yield Question([ids], [answer])


def _copying(
    task: Task, documents: list[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Question]:
    """A piece of a document, and the same piece once more: the words of the second one."""
    size = task.prompt_tokens
    pieces = [
        (number, start)
        for number, document in enumerate(documents)
        for start in range(0, len(document.ids) - size + 1, size)
    ]
    words = [list(document.words()) for document in documents]
    for number, start in _shuffled(pieces, task.seed):
        answers = [
            (first - start + size, last - start + size)
            for first, last in words[number]
            if start + _LEAD <= first and last <= start + size
        ]
        if answers:
            yield Question([documents[number].ids[start : start + size] * 2], answers)


def _definitions(
    task: Task, documents: list[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Question]:
    """Which of four names a text defines by what it says, after three examples."""
    defined = [
        definition
        for document in documents
        for definition in definitions(document, tokenizer)
        if len(definition.name) < task.decode_tokens
    ]
    rng = random.Random(task.seed)
    of_task = tokenizer, task.length, task.choices, rng
    for texts, size in which_name(_shuffled(defined, task.seed), *of_task):
        yield Question(texts, [(task.length - size, task.length)])


_CONTINUATION = 12
"""Tokens of each of the four ends."""
_MISSES = 100
"""Sums in a row whose tokens are too many, or those of the examples too few, before it ends."""
_LEAD = 8
"""Tokens that are repeated before the first word is asked for."""
TASKS = {
    "cloze": Task(64, 64, 1, _cloze),
    "continuation": Task(48, 28, 4, _continuation),
    "arithmetic": Task(
        *(96, 64, 1, _arithmetic),
        remedy="leave it out of --tasks: worked sums have too many tokens of this model",
    ),
    "copying": Task(48, 48, 1, _copying),
    "definitions": Task(
        *(64, 24, 4, _definitions),
        remedy="give more text, a smaller batch, or leave it out of --tasks: a text defines a name "
        "by `NAME is a`, `NAME:`, `NAME =`, or as a function or class",
    ),
}
"""By name."""


def check_tasks(names: tuple[str, ...]) -> None:
    """Refuse a name that no task has.

    Raises:
        SereError: names it.
    """
    for name in names:
        if name not in TASKS:
            raise SereError(f"--tasks: {name!r} is none of {', '.join(TASKS)}")


def _shuffled(values: list[_T], seed: int) -> list[_T]:
    """In an order that mixes documents, as a server's batch does."""
    return random.Random(seed).sample(values, len(values))
