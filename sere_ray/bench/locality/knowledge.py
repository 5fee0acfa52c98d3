"""Ways to know which experts a request will want before its prompt is computed."""

from abc import ABC, abstractmethod
from functools import cache

import numpy as np

from sere_ray.bench.locality.recorded import Request
from sere_ray.engine.signatures import Floats, project, unit
from sere_ray.serve.by_experts.kinds import Kinds
from sere_ray.serve.by_experts.text import text_vector


@cache
def signature_of(request: Request, num_experts: int) -> Floats:
    """What an engine counts of the request's prompt."""
    ids = request.topk_ids[: request.prompt_tokens]  # [P, layers, K]
    layers = ids.shape[1]
    counts = np.zeros((layers, num_experts), dtype=np.int64)
    for layer in range(layers):
        counts[layer] = np.bincount(ids[:, layer].ravel(), minlength=num_experts)
    return project(counts, len(ids))


class Knowledge(ABC):
    """What a router knows."""

    @abstractmethod
    def tell(self, request: Request, key: str) -> Floats | None:
        """The signature to expect of a request that comes; None = not known."""

    @abstractmethod
    def learn(self, request: Request, key: str, signature: Floats) -> None:
        """The request's prompt was computed."""


class FromItself(Knowledge):
    """The request's own signature: known only where prompts are computed elsewhere first."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    def tell(self, request: Request, key: str) -> Floats | None:
        """Its own."""
        return signature_of(request, self._num_experts)

    def learn(self, request: Request, key: str, signature: Floats) -> None:
        """Nothing."""


class FromText(Knowledge):
    """Texts like it: :class:`Kinds`, as ranks and request router have it."""

    def __init__(self) -> None:
        self._kinds = Kinds()

    def tell(self, request: Request, key: str) -> Floats | None:
        """Of the kinds nearest to the prompt's text."""
        return self._kinds.tell(text_vector(request.prompt))

    def learn(self, request: Request, key: str, signature: Floats) -> None:
        """One more of a kind."""
        self._kinds.add(text_vector(request.prompt), signature)


class FromName(Knowledge):
    """Earlier requests of the same name: conversation, key, or first letters of the prompt.

    Args:
        what: ``conversation``, ``key`` or ``prefix``.
    """

    LETTERS = 24
    """Of a prefix."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._mean: dict[str, Floats] = {}

    def tell(self, request: Request, key: str) -> Floats | None:
        """Mean over those of the name; the newest counts a fourth."""
        return self._mean.get(self._name(request, key))

    def learn(self, request: Request, key: str, signature: Floats) -> None:
        """One more of the name."""
        name = self._name(request, key)
        before = self._mean.get(name)
        new = (
            signature
            if before is None
            else unit(before * np.float32(0.75) + signature * np.float32(0.25))
        )
        self._mean[name] = new

    def _name(self, request: Request, key: str) -> str:
        if self._what == "conversation":
            return str(request.conversation)
        return key if self._what == "key" else request.prompt[: self.LETTERS]


class Mixed(Knowledge):
    """The first of several ways that knows."""

    def __init__(self, *ways: Knowledge) -> None:
        self._ways = ways

    def tell(self, request: Request, key: str) -> Floats | None:
        """Of the first that knows."""
        return next((t for w in self._ways if (t := w.tell(request, key)) is not None), None)

    def learn(self, request: Request, key: str, signature: Floats) -> None:
        """Every one learns."""
        for way in self._ways:
            way.learn(request, key, signature)


class TextAlone(FromText):
    """The same with the text's own vector as the signature: no engine counts anything."""
