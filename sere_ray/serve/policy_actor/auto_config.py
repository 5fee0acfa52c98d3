"""Mode ``auto`` as a deployment file describes it: what to hold, and the levels."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sere_ray.policy.policy import Policy
from sere_ray.util.errors import PolicyError

AUTO = "auto"
"""Name of the mode where one is asked for. No policy has it: a policy is that of a level."""


class AutoTarget(BaseModel):
    """What mode ``auto`` holds: a time per output token, limits of quality, or both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tpot_ms: float | None = Field(
        None,
        gt=0,
        description="p90 of requests' time per output token (TPOT), milliseconds; null = re-route "
        "as much as the quality floors allow",
    )
    max_rerouted_share: float = Field(
        1.0, ge=0, le=1, description="quality floor: most slots of decode rows that may move"
    )
    max_score: float | None = Field(
        None,
        gt=0,
        description="quality floor: highest score of a level's answers, nats a token; null = any",
    )
    margin: float = Field(0.15, gt=0, lt=1, description="how much below counts as clearly below")
    patience: int = Field(3, ge=1, description="intervals in a row before a level changes")

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        floors = self.max_score is not None or "max_rerouted_share" in self.model_fields_set
        if self.tpot_ms is None and not floors:
            raise ValueError("give tpot_ms, max_rerouted_share or max_score: what to hold")
        return self


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


class AutoConfig(AutoTarget):
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
