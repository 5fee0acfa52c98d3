"""Requests whose routing is known: the demo model's own choices, text by text, recorded once."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray import assets
from sere_ray.bench.locality.texts import Conversation, conversations
from sere_ray.calibration.choices import changed_choices
from sere_ray.calibration.loading import load_model, load_tokenizer
from sere_ray.rules import Choice

PROMPT_TOKENS = 64
"""Of a turn of a text that goes on; prompts of sums are as long as they are."""
ANSWER_TOKENS = (16, 48)
"""Least and most tokens of an answer."""
_BATCH = 32


@dataclass(frozen=True, eq=False)
class Request:
    """One turn of a conversation.

    Attributes:
        kind: of its text.
        conversation: number of it.
        turn: number of the turn, from 0.
        prompt: the text that the request sends.
        prompt_tokens: of it.
        topk_ids: ``[tokens, layers, K]`` uint8, of prompt and answer; layers in order.
    """

    kind: str
    conversation: int
    turn: int
    prompt: str
    prompt_tokens: int
    topk_ids: NDArray[np.uint8]

    @property
    def steps(self) -> int:
        """Decode steps: rows of the answer."""
        return len(self.topk_ids) - self.prompt_tokens


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation as tokens, ``ids`` of prompt and answer."""

    kind: str
    conversation: int
    turn: int
    prompt: str
    prompt_tokens: int
    ids: list[int]


def record(turns: Sequence[Turn], on_texts: Callable[[int], object]) -> list[Request]:
    """What the exact model chooses for each token of each turn.

    Args:
        turns: of :func:`turns_of`.
        on_texts: called with how many more are done.
    """
    model = load_model(
        str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32"
    )
    turns = sorted(turns, key=lambda turn: len(turn.ids))
    found: list[Request] = []
    for start in range(0, len(turns), _BATCH):
        batch = turns[start : start + _BATCH]
        longest = max(len(turn.ids) for turn in batch)
        padded = [turn.ids + [0] * (longest - len(turn.ids)) for turn in batch]
        for turn, ids in zip(batch, _choices(model, torch.tensor(padded)), strict=True):
            found.append(
                Request(
                    turn.kind,
                    turn.conversation,
                    turn.turn,
                    turn.prompt,
                    turn.prompt_tokens,
                    ids[: len(turn.ids)],
                )
            )
        on_texts(len(batch))
    return found


def _choices(model: torch.nn.Module, input_ids: Tensor) -> NDArray[np.uint8]:
    """``[B, L, layers, K]``; padding is behind the text, where it changes nothing before it."""
    by_layer: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Choice:
        by_layer[layer] = topk_ids
        return topk_ids, topk_weights

    with torch.inference_mode(), changed_choices(model, keep):
        model(input_ids=input_ids, use_cache=False)
    layers = torch.stack([by_layer[layer] for layer in sorted(by_layer)], dim=1)
    shape = (*input_ids.shape, *layers.shape[1:])
    return layers.view(shape).numpy().astype(np.uint8)


def turns_of(conversations_of_kind: int, seed: int) -> list[Turn]:
    """The turns of so many conversations of each kind, as tokens.

    Args:
        conversations_of_kind: at most; of some kinds there are fewer.
        seed: of the texts and of the lengths of answers.
    """
    tokenizer, rng = load_tokenizer(str(assets.MODEL)), random.Random(seed)
    taken: dict[str, int] = {}
    turns = []
    for number, conversation in enumerate(conversations(seed)):
        taken[conversation.kind] = taken.get(conversation.kind, 0) + 1
        if taken[conversation.kind] > conversations_of_kind:
            continue
        turns += _tokens(tokenizer, rng, number, conversation)
    return turns


def _tokens(
    tokenizer: object, rng: random.Random, number: int, conversation: Conversation
) -> list[Turn]:
    found = []
    for turn, (asked, text) in enumerate(conversation.turns):
        answer = rng.randint(*ANSWER_TOKENS)
        if asked:
            chat = [{"role": "user", "content": asked}]
            prompt = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
                chat, add_generation_prompt=True, tokenize=False
            )
            prompt_ids = tokenizer(prompt)["input_ids"]  # type: ignore[operator]
            ids = prompt_ids + tokenizer(text)["input_ids"][:answer]  # type: ignore[operator]
        else:
            ids = tokenizer(text)["input_ids"][: PROMPT_TOKENS + answer]  # type: ignore[operator]
            prompt_ids = ids[:PROMPT_TOKENS]
            asked = tokenizer.decode(prompt_ids)  # type: ignore[attr-defined]
        if len(ids) - len(prompt_ids) >= ANSWER_TOKENS[0]:
            found.append(Turn(conversation.kind, number, turn, asked, len(prompt_ids), ids))
    return found
