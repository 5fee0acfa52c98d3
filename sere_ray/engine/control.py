"""Read counters and set the policy of a running engine, from the process that owns it."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from sere_ray.dispatch import DISPATCH_COUNTS, mean_report
from sere_ray.engine.counters import KIND_NAMES, SHARDS, SLOTS, SLOTS_MASKED
from sere_ray.engine.worker_calls import WorkerCalls
from sere_ray.policy.capabilities import GateFacts
from sere_ray.policy.policy import Policy


class Engine(Protocol):
    """What ``vllm.LLM`` offers for control."""

    def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> list[Any]:
        """Call a method of every worker by name."""
        ...


def calls_of(engine: Engine) -> WorkerCalls[list[Any]]:
    """Calls of every worker; each returns one answer of each.

    Raises:
        AttributeError: at the call: the engine runs without the ``sere`` key.
    """
    return WorkerCalls(lambda name, arguments: engine.collective_rpc(name, args=arguments))


def read_counters(engine: Engine, *, reset: bool = True) -> dict[str, Any]:
    """Counters of the engine: :func:`of_engine`.

    Raises:
        AttributeError: the engine runs without the ``sere`` key.
    """
    return of_engine(calls_of(engine).counters(reset=reset))


def of_engine(of_workers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the workers of one engine counted.

    Tensor-parallel workers count the same, so the first one's stand for them; but for slots where
    rows are spread over them. Pipeline stages count layers apart: lists by layer are added up, and
    the seconds of a pass; rows and steps are the same in all of them.

    Args:
        of_workers: of every worker, by rank.
    """
    stages: dict[int, list[dict[str, Any]]] = {}
    for report in of_workers:
        stages.setdefault(report["stage"], []).append(report)
    first, *others = (_of_stage(stages[stage]) for stage in sorted(stages))
    merged = dict(first)
    for kind in KIND_NAMES:
        merged[kind] = dict(first[kind])
        for other in others:
            for name, found in other[kind].items():
                merged[kind][name] = _added(name, merged[kind][name], found)
    del merged["stage"]
    merged.pop(SHARDS, None)
    return merged


def _of_stage(of_workers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the tensor-parallel workers of a stage counted."""
    first, *others = of_workers
    if first.get(SHARDS, 1) == 1:
        return first
    merged = dict(first)
    for kind in KIND_NAMES:
        sums = {name: first[kind][name] for name in SLOTS}
        for other in others:
            sums = {name: _added(name, sums[name], other[kind][name]) for name in SLOTS}
        merged[kind] = {**first[kind], **sums}
    return merged


def _added(name: str, of_some: Any, of_other: Any) -> Any:
    if isinstance(of_some, list):
        return [a + b for a, b in zip(of_some, of_other, strict=True)]
    if name == "forward_seconds" and of_some is not None and of_other is not None:
        return of_some + of_other
    return of_some


def gates_of(of_workers: Sequence[GateFacts]) -> GateFacts:
    """What the gates of a model keep policies from; pipeline stages have some of its layers each.

    Args:
        of_workers: of every worker of one engine.
    """

    def first(found: Iterable[Any]) -> Any:
        return min((each for each in found if each is not None), default=None)

    return {
        "unknown": first(each["unknown"] for each in of_workers),
        "odd": first(each["odd"] for each in of_workers),
        "hashed": first(each["hashed"] for each in of_workers),
    }


def set_policy(engine: Engine, policy: Policy) -> None:
    """Set the policy of every worker from the next step on.

    Requests that arrive later never find KV blocks that were computed under the old policy.
    """
    calls_of(engine).set_policy(policy.model_dump())


def experts_read(counters: dict[str, Any], field: str) -> float:
    """Mean number of distinct experts per layer and decode-only step.

    Args:
        counters: of :func:`read_counters`.
        field: ``experts_before`` or ``experts_after``.
    """
    decode = counters["decode_only"]
    per_layer: list[int] = decode[field]
    steps: int = max(decode["steps"], 1)
    return sum(per_layer) / len(per_layer) / steps


def slots_kept(counters: dict[str, Any]) -> float:
    """Share of the slots of decode-only steps that masks kept.

    Args:
        counters: of :func:`read_counters`.
    """
    decode = counters["decode_only"]
    masked: list[int] = decode[SLOTS_MASKED]
    slots: int = decode["decode_rows"] * counters["top_k"] * len(masked)
    return 1 - sum(masked) / max(slots, 1)


def dispatch_report(counters: dict[str, Any], kind: str = "decode_only") -> dict[str, Any]:
    """Bytes, destination ranks and experts read of one rank's dispatch, over all layers.

    Args:
        counters: of :func:`read_counters`, of an engine with ``dispatch: all_to_all``.
        kind: ``decode_only`` or ``mixed``.

    Returns:
        See :func:`sere_ray.dispatch.mean_report`.

    Raises:
        KeyError: the engine dispatches otherwise.
    """
    of_group, of_kind = counters["dispatch"], counters[kind]["dispatch"]
    return mean_report(
        [sum(of_kind[name]) for name in DISPATCH_COUNTS],
        calls=sum(of_kind["calls"]),
        ranks=of_group["ranks"],
        row_bytes=of_group["row_bytes"],
    )
