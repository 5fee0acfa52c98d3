"""Names that a document defines, with what it says of them: any text that says ``NAME is a``,
``NAME:`` or ``NAME =``, or that has functions and classes.
"""

import random
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sere_ray.evaluation.task_texts import Document

_NAME = r"[^\W\d_]\w{2,}"
_NO_NAME = "that|this|these|those|there|here|which|what|who|they|she"
_DEFINES = re.compile(
    rf"\b(?:def|class|function|func|fn|struct|enum|interface|type)[ \t]+({_NAME})"
    rf"|\b(?!(?i:{_NO_NAME})\b)({_NAME})[ \t]+(?:(?:is|are)[ \t]+(?:an?|the)|means|denotes)\b"
    rf"|^\W*({_NAME})\W{{0,2}}[ \t]*[:=][ \t]*\S",
    re.MULTILINE,
)
_WORDS = re.compile(r"\w+")
_SAID = 20
"""Tokens of a definition: what follows the name."""
_EXAMPLES = 3
"""Definitions with their names before the one that is asked, so that the form is known."""
_DRAWN = 20
"""Definitions of which false names are taken: some may be in the text, or have the same name."""
_CUE, _END = "\nName:", "\n\n"


@dataclass(frozen=True)
class Definition:
    """A name and what the document says of it where it defines it."""

    name: list[int]
    """Token ids."""
    said: list[int]
    """Token ids of what follows the name; it does not hold the name."""
    words: frozenset[str]
    """Of what is said."""
    spelled: str
    """The name."""


def definitions(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[Definition]:
    """The names that a document defines, each once, in order."""
    first_uses: dict[str, int] = {}
    for match in _DEFINES.finditer(document.text):
        first_uses.setdefault(match[match.lastindex or 0], match.end(match.lastindex or 0))
    if not first_uses:
        return []
    starts = [start for start, _ in document.offsets]
    names = tokenizer([f" {name}" for name in first_uses], add_special_tokens=False)["input_ids"]
    found = []
    for (spelled, end), name in zip(first_uses.items(), names, strict=True):
        first = bisect_left(starts, end)
        said = document.ids[first : first + _SAID]
        if len(said) == _SAID:
            text = document.text[starts[first] : document.offsets[first + _SAID - 1][1]]
            words = frozenset(_WORDS.findall(text))
            if spelled not in words:
                found.append(Definition(name, said, words, spelled))
    return found


def which_name(
    defined: list[Definition],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    choices: int,
    rng: random.Random,
) -> Iterator[tuple[list[list[int]], int]]:
    """Texts that end with a definition and a name, the true one first, and the name's length.

    False names are of as many tokens, so that likelihoods can be compared. Neither they nor the
    true one are in the definition or in the examples before it.

    Args:
        defined: what is asked, and what false names and examples are taken from.
        tokenizer: of the model.
        length: tokens of a text; it is cut at its start.
        choices: texts of a question.
        rng: chooses the examples and the false names.
    """
    cue, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (_CUE, _END))
    by_size: dict[int, list[Definition]] = defaultdict(list)
    for definition in defined:
        by_size[len(definition.name)].append(definition)
    for asked in defined:
        size = len(asked.name)
        shown = rng.sample(defined, min(_EXAMPLES, len(defined)))
        told = asked.words.union(*(example.words | {example.spelled} for example in shown))
        drawn = rng.sample(by_size[size], min(_DRAWN, len(by_size[size])))
        names = {d.spelled: d.name for d in (asked, *drawn) if d.spelled not in told}
        before = [token for d in shown for token in (*d.said, *cue, *d.name, *end)]
        before += [*asked.said, *cue]
        at = len(before) + size - length
        if at >= 0 and asked.spelled in names and len(names) >= choices:
            yield [before[at:] + name for name in list(names.values())[:choices]], size
