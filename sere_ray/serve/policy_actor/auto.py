"""Mode ``auto`` of a deployment: its configuration, and what a controller sees of the engines.

The router actor asks every ``interval_s`` for the counters of all ranks, as ``GET /sere/stats``
does, and hands them over here. Engines never hear of ``auto``: they get the policy of a level, like
any other.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sere_ray.observe.stats import STEP_KINDS, by_replica, since, totals
from sere_ray.policy.policy import Policy
from sere_ray.serve.policy_actor.controller import Controller, Decision, Observation, Target
from sere_ray.util.errors import PolicyError
from sere_ray.util.token_times import quantile_ms

AUTO = "auto"
"""The mode, where one is asked for; no policy has it."""


class Level(BaseModel):
    """Keys of a policy that make it stronger the smaller they are; those left out stay."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    select_top_k: int | None = Field(None, ge=1, description="S")
    threshold: float | None = Field(None, ge=0.0, le=1.0, description="rho; null = any stand-in")
    min_primary_experts: int | None = Field(None, ge=0, description="m; null = K of the model")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("a level must set one of " + ", ".join(type(self).model_fields))
        return self


class AutoConfig(Target):
    """The part ``auto`` of a deployment file."""

    interval_s: float = Field(2.0, ge=0.5, le=60, description="seconds between two looks")
    levels: tuple[Level, ...] = Field(
        min_length=1,
        max_length=16,
        description="changes of the policy, each stronger than the one before; exact routing is "
        "level 0 and not named",
    )


def level_policies(base: Policy, config: AutoConfig, top_k: int) -> list[Policy]:
    """The policy of every level, exact routing first.

    Args:
        base: keys that no level sets.
        config: the levels.
        top_k: K of the model.

    Raises:
        PolicyError: a level is not valid for the model, or not stronger than the one before.
    """
    if base.by_rows is not None:
        raise PolicyError(
            "policy.by_rows: mode 'auto' sets keys for steps of every size; leave by_rows out"
        )
    keys = base.model_dump()
    policies = [Policy.parse({**keys, "mode": "off"})]
    for number, level in enumerate(config.levels):
        where = f"auto.levels.{number}"
        changes = level.model_dump(exclude_unset=True)
        policy = Policy.parse({**keys, **changes, "mode": "on"}, where=where)
        policy.for_model(top_k=top_k, where=where)
        if number and not _is_stronger(policy, policies[-1], top_k):
            raise PolicyError(
                f"{where} = {changes}: must re-route more than the level before it: of "
                "select_top_k, threshold and min_primary_experts one must fall and none rise"
            )
        policies.append(policy)
    return policies


def _is_stronger(policy: Policy, than: Policy, top_k: int) -> bool:
    new, old = (policy.for_model(top_k=top_k), than.for_model(top_k=top_k))
    pairs = [
        (getattr(new, key) or 0, getattr(old, key) or 0)  # no threshold: any stand-in, as with 0
        for key in Level.model_fields
    ]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


class AutoPilot:
    """Levels, the controller that chooses one, and what it saw last.

    Args:
        base: keys that no level sets.
        config: target and levels.
        top_k: K of the model.

    Raises:
        PolicyError: as :func:`level_policies`.
    """

    def __init__(self, base: Policy, config: AutoConfig, top_k: int) -> None:
        self.config, self._top_k = config, top_k
        self.rebase(base)
        self._controller = Controller(config, len(self.policies))
        self._counters: dict[str, Mapping[str, Any]] = {}
        self._seen: Observation | None = None

    def rebase(self, base: Policy) -> None:
        """Change keys that no level sets; the level stays.

        Raises:
            PolicyError: as :func:`level_policies`; then nothing has changed.
        """
        self.policies = level_policies(base, self.config, self._top_k)
        self.base = base

    @property
    def policy(self) -> Policy:
        """Of the level that holds."""
        return self.policies[self._controller.level]

    def observe(self, replicas: Iterable[Mapping[str, Any]]) -> Decision:
        """Take an interval into account: what ranks counted since the last call.

        A rank that did not answer, now or then, is left out; without any nothing changes.

        Args:
            replicas: as for :func:`sere_ray.observe.stats.totals`.
        """
        replicas = list(replicas)
        counted = since(replicas, self._counters)
        self._counters = by_replica(replicas)
        if not counted:
            return Decision(self._controller.level)
        self._seen = _observation(totals(counted))
        return self._controller.observe(self._seen)

    def status(self) -> dict[str, Any]:
        """Fields of ``AutoStatus`` in the control API."""
        seen = self._seen
        return {
            "level": self._controller.level,
            "levels": len(self.policies),
            "tpot_ms": None if seen is None else seen.tpot_ms,
            "load": None if seen is None else seen.load,
            "rerouted_share": None if seen is None else seen.rerouted_share,
            "base": self.base.model_dump(),
        }


def _observation(total: Mapping[str, Any]) -> Observation:
    kinds = [total[kind] for kind in STEP_KINDS]
    steps, rows, slots = (sum(k[name] for k in kinds) for name in ("steps", "decode_rows", "slots"))
    rerouted = sum(sum(k["slots_rerouted"]) for k in kinds)
    return Observation(
        tpot_ms=quantile_ms(total["token_times"], 0.9),
        load=rows / steps if steps else 0.0,
        rerouted_share=rerouted / slots if slots else 0.0,
    )
