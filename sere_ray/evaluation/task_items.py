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
from sere_ray.evaluation.task_texts import Document, Span
from sere_ray.util.errors import SereError

_T = TypeVar("_T")
_SEED = 0


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

    about: str
    """What is right."""
    prompt_tokens: int
    """Tokens of a text that are exact."""
    decode_tokens: int
    """Tokens of a text after them."""
    choices: int
    """Texts of a question."""
    ask: "Callable[[Task, list[Document], PreTrainedTokenizerBase], Iterator[Question]]"
    """Makes the questions, as many as there are."""

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
    for number, start in _shuffled(windows):
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
    rng = random.Random(_SEED)
    windows = []
    for document in documents:
        pieces = [
            document.ids[start : start + task.length]
            for start in range(0, len(document.ids) - task.length + 1, _CONTINUATION)
        ]
        ends = sorted({tuple(piece[answer[0] :]) for piece in pieces})
        for piece in pieces:
            others = [end for end in ends if end != tuple(piece[answer[0] :])]
            if len(others) >= task.choices - 1:
                windows.append((piece, rng.sample(others, task.choices - 1)))
    for piece, others in _shuffled(windows):
        yield Question([piece, *(piece[: answer[0]] + list(end) for end in others)], [answer])


def _arithmetic(
    task: Task, documents: list[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Question]:
    """Sums worked out line by line after three examples; documents have no part."""
    for before, reply, after in worked_texts(tokenizer, random.Random(_SEED)):
        rest = task.decode_tokens - len(reply)
        if rest >= 0 and len(before) >= task.prompt_tokens:
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
    for number, start in _shuffled(pieces):
        answers = [
            (first - start + size, last - start + size)
            for first, last in words[number]
            if start + _LEAD <= first and last <= start + size
        ]
        if answers:
            yield Question([documents[number].ids[start : start + size] * 2], answers)


_CONTINUATION = 12
"""Tokens of each of the four ends."""
_LEAD = 8
"""Tokens that are repeated before the first word is asked for."""
TASKS = {
    "cloze": Task("every token of a word of the text is the most likely one", 64, 64, 1, _cloze),
    "continuation": Task(
        "of four ends, the text's own is the most likely", 48, 28, 4, _continuation
    ),
    "arithmetic": Task(
        "every token of a worked sum is the most likely one", 96, 64, 1, _arithmetic
    ),
    "copying": Task(
        "every token of a word that is repeated is the most likely one", 48, 48, 1, _copying
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


def _shuffled(values: list[_T]) -> list[_T]:
    """In an order that mixes documents, as a server's batch does."""
    return random.Random(_SEED).sample(values, len(values))
