"""Sums of two or three operations, worked out left to right, as chats of the model."""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

_EXAMPLES = 3
"""Worked sums before the one that is asked, so that the form of a reply is known."""


def worked_sum(rng: random.Random) -> tuple[str, str]:
    """A problem and its reply. The first operation is a product, no result is below zero."""
    value = rng.randint(100, 999)
    expression, lines = str(value), []
    for step in range(rng.choice((2, 3))):
        operand = rng.randint(2, 9) if step == 0 else rng.randint(2, 10 ** rng.randint(1, 3) - 1)
        signs = "*" if step == 0 else "+-" if operand <= value else "+"
        sign = rng.choice(signs)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
        lines.append(f"{value} {sign} {operand} = {result}")
        expression += f" {sign} {operand}"
        value = result
    return f"Work out {expression}.", "\n".join([*lines, f"Answer: {value}"])


def worked_texts(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Token ids of what comes before a reply, of the reply, and of what may come after it.

    They are chats in the model's template, or plain text where it has none. A server's prompt ends
    where the reply starts. After it another such text goes on, so that all rows of a batch decode.
    """

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    while True:
        sums = [worked_sum(rng) for _ in range(_EXAMPLES + 1)]
        before, (_, reply) = ids(_before(tokenizer, sums)), sums[-1]
        yield before, ids(reply), ids("\n") + before


def _before(tokenizer: PreTrainedTokenizerBase, sums: list[tuple[str, str]]) -> str:
    """The examples and the last problem, up to its reply."""
    *examples, (problem, _) = sums
    if tokenizer.chat_template is None:
        shown = [f"{question}\n{reply}\n\n" for question, reply in examples]
        return "".join(shown) + f"{problem}\n"
    messages = [
        {"role": role, "content": content}
        for example in examples
        for role, content in zip(("user", "assistant"), example, strict=True)
    ]
    messages.append({"role": "user", "content": problem})
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text
