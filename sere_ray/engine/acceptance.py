"""How often drafts of speculative decoding are accepted, and so how much their rows count.

The scheduler counts, as it alone knows of each step's drafts what became of them, and every step
carries the weights of its rows to the workers: the same ones to all. They are integers, so that
what ranks add up is the same everywhere. Functions here wrap methods of vLLM's scheduler and
worker; see the ledger in ``patches.py``.
"""

from collections.abc import Callable
from typing import Any

from sere_ray.engine.checks import sere_config
from sere_ray.engine.states import find_state
from sere_ray.rules.margin import WEIGHT_UNIT

_WINDOW = 4096
"""Drafts at a place after which what was counted counts half."""


class Acceptance:
    """Counts by place of a draft behind its request's last token.

    Args:
        num_drafts: most of a request and step.
    """

    def __init__(self, num_drafts: int) -> None:
        self._proposed, self._accepted = [0] * num_drafts, [0] * num_drafts

    def observe(self, proposed: int, accepted: int) -> None:
        """So many drafts of a request were verified, and the first of them were accepted."""
        for place in range(min(proposed, len(self._proposed))):
            self._proposed[place] += 1
            self._accepted[place] += place < accepted
        if self._proposed and self._proposed[0] > _WINDOW:
            self._proposed = [count // 2 for count in self._proposed]
            self._accepted = [count // 2 for count in self._accepted]

    def weights(self) -> tuple[int, ...]:
        """``[1 + num_drafts]``: of a last token, then of each draft, 1 to ``WEIGHT_UNIT``.

        The weight of a draft is how often all up to it were accepted; whole before there was one.
        """
        counts = zip(self._proposed, self._accepted, strict=True)
        shares = ((accepted + 1, proposed + 1) for proposed, accepted in counts)
        found = ((2 * WEIGHT_UNIT * part + of) // (2 * of) for part, of in shares)  # rounded
        return WEIGHT_UNIT, *(max(weight, 1) for weight in found)


def count_drafts(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """``Scheduler.make_spec_decoding_stats``: for each request whose drafts were verified."""
    if sere_config(scheduler.vllm_config) is not None:
        _of(scheduler).observe(kwargs["num_draft_tokens"], kwargs["num_accepted_tokens"])
    return original(scheduler, *args, **kwargs)


def send_weights(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """``Scheduler.schedule``: what it returns goes to every worker."""
    output = original(scheduler, *args, **kwargs)
    config = scheduler.vllm_config
    if config.speculative_config is not None and sere_config(config) is not None:
        output.sere_draft_weights = _of(scheduler).weights()
    return output


def take_weights(original: Callable[..., Any], worker: Any, scheduler_output: Any) -> Any:
    """``Worker.execute_model``: before the step is prepared."""
    weights = getattr(scheduler_output, "sere_draft_weights", None)
    if weights is not None and (state := find_state(worker.vllm_config)):
        state.draft_weights = weights
    return original(worker, scheduler_output)


def _of(scheduler: Any) -> Acceptance:
    if not hasattr(scheduler, "sere_acceptance"):
        num_drafts = scheduler.vllm_config.speculative_config.num_speculative_tokens
        scheduler.sere_acceptance = Acceptance(num_drafts)
    found: Acceptance = scheduler.sere_acceptance
    return found
