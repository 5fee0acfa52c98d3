"""Which experts the prompts of requests chose: counted in the prompt pass, kept as small vectors.

Prompt and answer of a request want much the same experts (ELDR, arXiv 2607.00466, finds r = 0.70 to
0.92), so a request router can place requests by them. Counting begins at the first reading
(:meth:`PromptSignatures.take`); until then nothing here runs. Pure numpy: no vLLM, no device.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
DIMENSIONS = 256
"""Of a signature."""
MOST_OPEN = 256
"""Prompts under way whose experts are counted; the oldest, then aborted ones, are forgotten."""
MOST_REQUESTS = 2048
"""Signatures that wait to be read; the oldest are forgotten."""


class Signature(NamedTuple):
    """What is known of one request's prompt.

    Attributes:
        request: id of the request in its engine.
        rows: prompt rows that were counted; those found in the prefix cache were not computed.
        vector: ``[DIMENSIONS]`` float32 as bytes, of :func:`project`.
    """

    request: str
    rows: int
    vector: bytes


@cache
def _places(size: int) -> tuple[NDArray[np.int64], Floats]:
    """Where each of ``size`` numbers goes, and with which sign: a count sketch, the same anywhere.

    Where there is a place for each, each has its own, and nothing is lost.
    """
    if size <= DIMENSIONS:
        return np.arange(size), np.ones(size, dtype=np.float32)
    rng = np.random.default_rng(20260701)
    signs = rng.choice(np.array([-1, 1], dtype=np.float32), size)
    return rng.integers(0, DIMENSIONS, size), signs


def project(counts: NDArray[np.integer], rows: int) -> Floats:
    """Counts of experts as a vector whose inner products are nearly those of the whole.

    Square roots, since whether an expert is read at all depends less than linearly on how often it
    is chosen (Charikar et al., "Finding frequent items in data streams", for the sketch).

    Args:
        counts: ``[layers, E]``, how many rows chose each expert.
        rows: that were counted.

    Returns:
        ``[DIMENSIONS]`` float32, of length 1 if any expert was chosen.
    """
    places, signs = _places(counts.size)
    share = np.sqrt(counts.ravel() / max(rows, 1)).astype(np.float32)
    vector = np.bincount(places, weights=share * signs, minlength=DIMENSIONS).astype(np.float32)
    return unit(vector)


def unit(vector: Floats) -> Floats:
    """The vector with length 1; a vector of zeros stays."""
    length = float(np.linalg.norm(vector))
    return vector / np.float32(length) if length else vector


class PromptRows(NamedTuple):
    """Rows of a step that belong to one prompt."""

    request: str
    first: int
    last: int
    is_whole: bool
    """Whether the prompt ends in this step."""


def prompt_rows(
    requests: Sequence[str],
    num_computed: NDArray[np.integer],
    num_prompt: NDArray[np.integer],
    query_start: NDArray[np.integer],
) -> list[PromptRows]:
    """Which rows of a step are of prompts; those of answers are left out.

    Args:
        requests: R ids.
        num_computed: ``[R]`` tokens already in the KV cache.
        num_prompt: ``[R]`` tokens of the prompt.
        query_start: ``[R + 1]`` first row of each request, and the end.
    """
    found = []
    for i in np.flatnonzero(num_computed < num_prompt):
        left, first = int(num_prompt[i] - num_computed[i]), int(query_start[i])
        count = min(left, int(query_start[i + 1]) - first)
        if count:
            found.append(PromptRows(requests[i], first, first + count, count == left))
    return found


class PromptSignatures:
    """Counts of requests whose prompts are being computed, and signatures of those that are done.

    Args:
        num_layers: with experts.
        num_experts: of a layer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shape = (num_layers, num_experts)
        self._open: OrderedDict[str, NDArray[np.int32]] = OrderedDict()
        self._rows: dict[str, int] = {}
        self._done: OrderedDict[str, Signature] = OrderedDict()
        self._step: Sequence[PromptRows] = ()

    def begin(self, prompts: Sequence[PromptRows]) -> None:
        """A step begins in which these rows are of prompts."""
        self._step = prompts
        for part in prompts:
            if part.request not in self._open:
                self._open[part.request] = np.zeros(self._shape, dtype=np.int32)
                self._rows[part.request] = 0
                if len(self._open) > MOST_OPEN:
                    forgotten, _ = self._open.popitem(last=False)
                    del self._rows[forgotten]
            self._rows[part.request] += part.last - part.first

    def add(self, position: int, topk_ids: NDArray[np.integer]) -> None:
        """Count a layer of the step.

        Args:
            position: of the layer among those with experts.
            topk_ids: ``[T, K]``, the gate's own choice.
        """
        for part in self._step:
            counts = self._open.get(part.request)
            if counts is not None:
                chosen = topk_ids[part.first : part.last].ravel()
                counts[position] += np.bincount(chosen, minlength=self._shape[1])

    def end(self) -> None:
        """The step is over: prompts that ended in it have their signature."""
        for part in self._step:
            if part.is_whole and part.request in self._open:
                counts, rows = self._open.pop(part.request), self._rows.pop(part.request)
                vector = project(counts, rows).tobytes()
                self._done[part.request] = Signature(part.request, rows, vector)
                if len(self._done) > MOST_REQUESTS:
                    self._done.popitem(last=False)
        self._step = ()

    def take(self) -> list[Signature]:
        """Those that are done since the last time, the oldest first; they are forgotten here."""
        done = list(self._done.values())
        self._done.clear()
        return done


@contextmanager
def counting(signatures: PromptSignatures | None, prompts: Sequence[PromptRows]) -> Iterator[None]:
    """A step that counts these rows; None counts nothing."""
    if signatures is None:
        yield
        return
    signatures.begin(prompts)
    try:
        yield
    finally:
        signatures.end()


class CountsPrompts:
    """Part of an engine's state where signatures can be counted; elsewhere there are none."""

    signatures: PromptSignatures | None = None

    def take_signatures(self) -> dict[str, Any]:
        """``model`` and fields of each :class:`Signature` since the last time, as ``signatures``.

        The first call begins counting.
        """
        if self.signatures is None:
            self.signatures = self.make_signatures()
        return {
            "model": self.gates_of_model(),
            "signatures": [list(signature) for signature in self.signatures.take()],
        }

    def make_signatures(self) -> PromptSignatures:
        """Empty ones for this model."""
        raise NotImplementedError

    def gates_of_model(self) -> str:
        """A word that only models with the same gates share: others' signatures mean nothing."""
        raise NotImplementedError


class Taken(NamedTuple):
    """What one engine has counted."""

    model: str
    signatures: list[Signature]


def of_workers(answers: Sequence[Mapping[str, Any] | None]) -> Taken | None:
    """The signatures of one engine; None where it cannot count them.

    Tensor-parallel workers count the same, and pipeline stages other layers: a request's vectors of
    several workers are added up, which leaves the first as it is and joins the second.

    Args:
        answers: of every worker: what :meth:`CountsPrompts.take_signatures` returned, or None.
    """
    found: dict[str, Signature] = {}
    model = ""
    for answer in answers:
        if answer is None:
            return None
        model = answer["model"]
        for request, rows, content in answer["signatures"]:
            vector, known = np.frombuffer(content, dtype=np.float32), found.get(request)
            if known is not None:
                vector = unit(vector + np.frombuffer(known.vector, dtype=np.float32))
            found[request] = Signature(request, rows, vector.tobytes())
    return Taken(model, list(found.values()))
