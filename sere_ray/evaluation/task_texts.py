"""Documents as tokens that know where in the text they are, and where words are in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sere_ray.calibration.data import open_texts
from sere_ray.util.errors import DataError

Span = tuple[int, int]
"""First position and the one after the last."""
_WORD = re.compile(r"[^\W\d_]{3,}")
_MOST_CHARACTERS = 8_000_000
"""Of a text, so that a dataset that is streamed ends."""


@dataclass(frozen=True)
class Document:
    """A text as tokens."""

    text: str
    ids: list[int]
    offsets: list[Span]
    """Of each token, in characters."""

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase) -> "Document":
        """Tokens of a text, without special ones."""
        found = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return cls(text, found["input_ids"], found["offset_mapping"])

    def words(self) -> Iterator[Span]:
        """Words of three letters or more, in tokens: whole tokens, but for spaces before them."""
        # a character may be several tokens: its first one starts it, its last one ends it
        numbered = list(enumerate(self.offsets))
        starts = {start: token for token, (start, _) in reversed(numbered)}
        ends = {end: token + 1 for token, (_, end) in numbered}
        for word in _WORD.finditer(self.text):
            first, last = word.span()
            at = first
            while at not in starts and at and self.text[at - 1].isspace():
                at -= 1
            if at in starts and last in ends:
                yield starts[at], ends[last]


def read_documents(
    data: str, text_column: str, tokenizer: PreTrainedTokenizerBase
) -> list[Document]:
    """The documents of a text, up to 8 million characters.

    Raises:
        DataError: cannot be read, or the tokenizer does not say where in the text tokens are.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__}: does not say where in a text its tokens are, which tasks "
            "need; use a checkpoint with a tokenizer.json"
        )
    documents, characters = [], 0
    for text in open_texts(data, text_column).texts:
        documents.append(Document.of(text[: _MOST_CHARACTERS - characters], tokenizer))
        characters += len(documents[-1].text)
        if characters >= _MOST_CHARACTERS:
            break
    return documents
