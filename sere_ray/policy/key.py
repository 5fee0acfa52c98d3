"""The value of vLLM's ``sere`` key: a policy, and what an engine takes at its start and keeps."""

from collections.abc import Mapping

from pydantic import ValidationError

from sere_ray.policy.explain import explain
from sere_ray.policy.policy import Policy
from sere_ray.policy.startup import Startup
from sere_ray.util.errors import PolicyError


def parse_key(
    value: object, *, running: Startup | None = None, where: str = "sere"
) -> tuple[Policy, Startup]:
    """Validate the value of vLLM's ``sere`` key: a policy, and what an engine takes at its start.

    Args:
        value: a mapping of keys, or a policy.
        running: what the engine was started with; None = it starts with ``value``.
        where: name of the key in error messages.

    Returns:
        The policy, and what ``value`` says of the start.

    Raises:
        PolicyError: as for :meth:`Policy.parse` and :func:`check_beside_start`.
    """
    keys = value if isinstance(value, Mapping) else {}
    given = {key: keys[key] for key in Startup.model_fields if key in keys}
    try:
        startup = Startup.model_validate(given)
    except ValidationError as error:
        names = tuple(Startup.model_fields)
        raise PolicyError(
            "; ".join(explain(e, where, Startup, names) for e in error.errors())
        ) from None
    rest = {key: keys[key] for key in keys if key not in given}
    policy = Policy.parse(rest if isinstance(value, Mapping) else value, where=where)
    check_beside_start(policy, startup if running is None else running, where=where)
    return policy, startup


def check_beside_start(policy: Policy, startup: Startup, *, where: str = "sere") -> None:
    """Refuse a policy under which an engine would do nothing of what it was started for.

    Args:
        policy: valid.
        startup: of the engine.
        where: name of the policy in error messages.

    Raises:
        PolicyError: names the key and what to add.
    """
    by_experts = startup.replicas == "by_experts"
    if policy.rule == "none" and policy.masks is None and not by_experts:
        raise PolicyError(
            f"{where}.rule = 'none': changes nothing by itself; give masks and level, or another "
            "rule, or start engines that have vLLM's load balancer (enable_eplb) with replicas = "
            "'by_experts'; mode = 'off' is the exact model"
        )
    if by_experts and policy.union == "local":
        raise PolicyError(
            f"{where}.union = 'local': with replicas = 'by_experts' copies are chosen by what all "
            "ranks read, which ranks tell each other under union = 'global' alone; leave one of "
            "the two out"
        )
