"""The calls that reach the workers of an engine by name, through vLLM's ``collective_rpc``."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

COUNTERS = "sere_counters"
SET_POLICY = "sere_set_policy"
SETTLE = "sere_settle"
SIGNATURES = "sere_signatures"
GATES = "sere_gates"
CHANGES = (SET_POLICY, SETTLE)
"""Calls after which KV blocks are of another policy: see ``kv_salt.py``."""

Result = TypeVar("Result")


class WorkerCalls(Generic[Result]):
    """Every call by its name and with its arguments; ``patches.py`` answers them in the worker.

    Args:
        send: calls a method of every worker by name, with these arguments. What it returns, a list
            with one answer of each worker or something to await it by, is what every call returns.
    """

    def __init__(self, send: Callable[[str, tuple[Any, ...]], Result]) -> None:
        self._send = send

    def counters(self, *, reset: bool) -> Result:
        """Read the counters: :meth:`sere_ray.engine.state.EngineState.read_counters`."""
        return self._send(COUNTERS, (reset,))

    def set_policy(self, policy: dict[str, Any], artifact: bytes | None = None) -> Result:
        """Set the policy: :meth:`sere_ray.engine.state.EngineState.set_policy`."""
        return self._send(SET_POLICY, (policy, artifact))

    def settle(self) -> Result:
        """Say that every rank was told the last policy."""
        return self._send(SETTLE, ())

    def signatures(self) -> Result:
        """Read signatures of prompts: :func:`sere_ray.engine.signatures.of_workers` joins them."""
        return self._send(SIGNATURES, ())

    def gates(self) -> Result:
        """Read what the model's gates keep policies from:
        :func:`sere_ray.engine.control.gates_of` joins them."""
        return self._send(GATES, ())
