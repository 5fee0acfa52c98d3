"""The task ``long``: texts that go on for 512 tokens and more. Right if the continuation is sound.

Damage that single tokens do not show adds up here: a model falls into a loop, or rambles.
"""

import random
import unicodedata
from itertools import islice

from sere_ray import assets
from sere_ray.calibration.data import open_texts
from sere_ray.loadtest.compare.ask import Endpoint, Reply
from sere_ray.loadtest.compare.scores import Scores
from sere_ray.util.errors import DataError

_PROMPT = 400
"""Characters that are continued: some 100 tokens."""
_EVERY = 2_000
"""Characters from one such piece of a document to the next."""
_MOST_PIECES = 20_000
"""That are read, so that a streamed dataset ends."""
_GRAM = 16
"""Characters: some four tokens."""
_LOOPS = 0.5


def run_long(
    endpoint: Endpoint, items: int, seed: int, data: str | None, text_column: str
) -> list[Scores]:
    """Continues pieces of a text.

    Args:
        endpoint: whom to ask; its ``max_tokens`` is the length that is wanted.
        items: pieces, or as many as the text has.
        seed: of their choice.
        data: the text; None = the demo's held-out text.
        text_column: that holds it.

    Raises:
        SereError: the text cannot be read or has no piece; the endpoint refuses.
    """
    prompts = pieces(data, text_column)
    chosen = random.Random(seed).sample(prompts, min(items, len(prompts)))
    replies = endpoint.completions(chosen)
    measures = {
        "tokens": [float(reply.tokens) for reply in replies],
        "repetition": [repetition(reply.text) for reply in replies],
    }
    by_item = {
        name: {str(i): value for i, value in enumerate(values)} for name, values in measures.items()
    }
    right = {str(i): is_sound(reply) for i, reply in enumerate(replies)}
    return [Scores("long", f"sound, {endpoint.max_tokens} tokens at most", right, by_item)]


def pieces(data: str | None, text_column: str) -> list[str]:
    """Beginnings to be continued, from all of a text.

    Raises:
        DataError: it cannot be read, or every document is too short.
    """
    texts = assets.heldout_texts() if data is None else open_texts(data, text_column).texts
    found = (
        text[start : start + _PROMPT]
        for text in texts
        for start in range(0, len(text) - _PROMPT + 1, _EVERY)
    )
    kept = list(islice(found, _MOST_PIECES))
    if not kept:
        raise DataError(
            f"--data = {data!r}: no document has {_PROMPT} characters to be continued; give longer "
            "documents"
        )
    return kept


def is_sound(reply: Reply) -> bool:
    """Whether an answer is text, and no loop: at most half of its 16-grams were there before."""
    return is_text(reply.text) and repetition(reply.text) <= _LOOPS


def is_text(text: str) -> bool:
    """Whether there are words, and no broken, unassigned or control characters."""
    broken = any(
        char == "\N{REPLACEMENT CHARACTER}"
        or (unicodedata.category(char) in ("Cc", "Cn") and char not in "\n\r\t\f")
        for char in text
    )
    return bool(text.strip()) and not broken


def repetition(text: str) -> float:
    """Share of the text's 16-grams of characters that were there before, 0..1.

    As seq-rep-4 of Welleck et al. (arXiv 1908.04319), which counts four tokens: a client has none.
    """
    grams = [text[i : i + _GRAM] for i in range(len(text) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
