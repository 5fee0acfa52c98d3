"""Speculative decoding: which methods are supported, and which model is the draft.

A request's rows of a decode step, its last token and the drafts behind it, are re-routable; the
layers of a draft model are left alone, so drafts are those of stock for the same hidden states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sere_ray.util.errors import UnsupportedError

METHODS = ("ngram", "mtp", "eagle", "eagle3", "draft_model")
"""vLLM's names of the methods whose rows were tested; ``eagle3`` has those of ``eagle``."""


def check_speculation(vllm_config: Any) -> None:
    """Refuse ways to speculate whose rows this version would take for others, or never saw.

    Raises:
        UnsupportedError: names the option, its value and what to do.
    """
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if speculative is None:
        return
    refused = [
        (
            speculative.method not in METHODS,
            f"method = {speculative.method!r}: not tested",
            f"use one of {', '.join(METHODS)}",
        ),
        (
            speculative.enable_adaptive_verification,
            "enable_adaptive_verification = True: the device decides which rows are whose",
            "start without it",
        ),
        (
            parallel.data_parallel_size > 1,
            f"data_parallel_size = {parallel.data_parallel_size}: passes of the draft model would "
            "be taken for steps",
            "use data_parallel_size = 1",
        ),
        (
            parallel.enable_expert_parallel and vllm_config.device_config.device_type == "cpu",
            "enable_expert_parallel = True on a CPU: vLLM computes a draft's experts wrong there",
            "start without it",
        ),
    ]
    for is_refused, what, remedy in refused:
        if is_refused:
            raise UnsupportedError(
                f"sere: speculative_config: {what}; {remedy}, or start without speculative decoding"
            )


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Is this the configuration of the draft model, not of the one that is served?

    Args:
        vllm_config: vLLM's; a draft model has one of its own, or shares that of the engine.
        model_config: the part of it that a model is made from.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or model_config is speculative.target_model_config:
        return False  # without a draft model, as for n-grams, vLLM names the served one again
    return model_config is speculative.draft_model_config


_building_draft: ContextVar[bool] = ContextVar("sere_ray_building_draft", default=False)


@contextmanager
def building_draft() -> Iterator[None]:
    """Layers that are built while this is open are a draft model's."""
    token = _building_draft.set(True)
    try:
        yield
    finally:
        _building_draft.reset(token)


def builds_draft() -> bool:
    """Whether the layer that is being built is a draft model's."""
    return _building_draft.get()
