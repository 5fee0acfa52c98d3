"""Which rows of a step may be re-routed. Pure numpy: no vLLM, no device."""

import numpy as np
from numpy.typing import NDArray

from sere_ray.rules import EXACT, REROUTABLE

Ints = NDArray[np.integer]


def request_kinds(num_computed: Ints, num_prompt: Ints, num_known: Ints) -> NDArray[np.int8]:
    """Kind of every request of a step.

    A request decodes when all its prompt and all but its newest known token have been computed.
    A preempted request that recomputes its own answer does not: those rows are exact again. While
    drafts that were rejected are still counted as computed, no request is taken for another kind.

    Args:
        num_computed: ``[R]`` tokens already in the KV cache.
        num_prompt: ``[R]`` tokens of the prompt.
        num_known: ``[R]`` tokens of prompt and answer so far (without speculative drafts).

    Returns:
        ``[R]`` int8 of ``REROUTABLE`` and ``EXACT``.
    """
    decodes = (num_computed >= num_prompt) & (num_computed + 1 >= num_known)
    return np.where(decodes, REROUTABLE, EXACT).astype(np.int8)


def scheduled_kinds(is_prefilling: NDArray[np.bool_]) -> NDArray[np.int8]:
    """The same from what the V2 model runner keeps: a preempted request prefills again.

    Args:
        is_prefilling: ``[R]``.

    Returns:
        ``[R]`` int8 of ``REROUTABLE`` and ``EXACT``.
    """
    return np.where(is_prefilling, EXACT, REROUTABLE).astype(np.int8)


def row_kinds(kinds: NDArray[np.int8], query_start: Ints) -> NDArray[np.int8]:
    """Spread request kinds over rows.

    Args:
        kinds: ``[R]`` int8.
        query_start: ``[R + 1]`` first row of each request, and the end.

    Returns:
        ``[query_start[-1]]`` int8.
    """
    return np.repeat(kinds, np.diff(query_start))


def draft_positions(kinds: NDArray[np.int8], query_start: Ints) -> NDArray[np.int8]:
    """Which rows verify a draft: all of a decoding request but the first, its last token.

    Args:
        kinds: ``[R]`` int8.
        query_start: ``[R + 1]`` first row of each request, and the end.

    Returns:
        ``[query_start[-1]]`` int8: 1 for the first draft of a request and so on, 0 elsewhere.
    """
    place = np.arange(query_start[-1]) - np.repeat(query_start[:-1], np.diff(query_start))
    return np.where(row_kinds(kinds, query_start) == REROUTABLE, place, 0).astype(np.int8)
