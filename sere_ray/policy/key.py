"""The value of vLLM's ``sere`` key: a policy, and what an engine takes at its start and keeps."""

from collections.abc import Mapping

from pydantic import ValidationError

from sere_ray.policy.explain import explain
from sere_ray.policy.policy import Policy
from sere_ray.policy.startup import Startup
from sere_ray.util.errors import PolicyError


def parse_key(value: object, *, where: str = "sere") -> tuple[Policy, Startup]:
    """Validate the value of vLLM's ``sere`` key: a policy, and what an engine takes at its start.

    Args:
        value: a mapping of keys.
        where: name of the key in error messages.

    Raises:
        PolicyError: as for :meth:`Policy.parse`.
    """
    if not isinstance(value, Mapping):
        return Policy.parse(value, where=where), Startup()
    given = {key: value[key] for key in Startup.model_fields if key in value}
    policy = {key: value[key] for key in value if key not in given}
    try:
        startup = Startup.model_validate(given)
    except ValidationError as error:
        keys = tuple(Startup.model_fields)
        raise PolicyError(
            "; ".join(explain(e, where, Startup, keys) for e in error.errors())
        ) from None
    return Policy.parse(policy, where=where), startup
