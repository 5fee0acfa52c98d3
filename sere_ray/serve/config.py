"""What a deployment serves: one validated description, in ``deploy/*.yaml`` and in Python."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from sere_ray.policy.key import parse_key
from sere_ray.policy.key_file import read_key_file
from sere_ray.policy.policy import Policy
from sere_ray.policy.startup import Startup
from sere_ray.proxy.limits import Limits
from sere_ray.serve.gateway.access import AccessConfig
from sere_ray.serve.policy_actor.auto_config import AUTO, AutoConfig
from sere_ray.serve.replica.scorer import ScoreConfig, unscorable_engine
from sere_ray.util.errors import SereError

BACK_DOORS = ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE")
"""Switches of vLLM that a served engine must never have."""


class ServeConfig(BaseModel):
    """One model behind the OpenAI routes.

    Example:
        >>> ServeConfig.parse({"model": "/models/moe", "model_id": "moe"}).device
        'cpu'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="checkpoint folder or hub name")
    model_id: str = Field(min_length=1, description="name under which clients ask for the model")
    device: Literal["cpu", "gpu"] = Field("cpu", description="what a rank runs on")
    data_parallel_size: int = Field(
        1, ge=1, le=64, description="ranks of a gang; each holds its shard of the experts"
    )
    num_replicas: int = Field(1, ge=1, le=64, description="gangs; each holds the whole model")
    request_router: Literal["default", "experts"] = Field(
        "default", description="`experts`: to the gang whose requests want the same experts"
    )
    sere: Policy | None = Field(
        None, description="re-routing policy, or the path of its YAML file; null = stock vLLM"
    )
    auto: AutoConfig | None = Field(None, description="target and levels of the mode `auto`")
    starts_auto: bool = Field(False, description="`mode: auto` of `sere`")
    startup: Startup = Field(
        default_factory=Startup, description="keys written under `sere` beside the policy"
    )
    engine: dict[str, Any] = Field(
        default_factory=dict, description="further vLLM engine arguments, such as max_model_len"
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="environment variables of the engines"
    )
    artifacts: str | None = Field(
        None, description="folder, on the policy actor's node, of artifacts that may be swapped in"
    )
    max_artifact_bytes: int = Field(64 << 20, ge=1, le=1 << 30, description="size limit of one")
    metrics_interval_s: float | None = Field(
        10.0,
        ge=1,
        le=15,  # Ray forgets a gauge that was not set for 20 s
        description="seconds between two exports of an engine's counters as metrics; null = none",
    )
    score: ScoreConfig | None = Field(
        default_factory=lambda: ScoreConfig.model_validate({}),
        description="how many answers are scored by the exact model, and limits; null = none",
    )
    access: AccessConfig = Field(
        default_factory=lambda: AccessConfig.model_validate({}),
        description="keys, and limits by key",
    )
    limits: Limits = Field(
        default_factory=lambda: Limits.model_validate({}),
        description="limits on the time of requests and answers, and on connections",
    )

    @field_validator("engine")
    @classmethod
    def _own_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in ("data_parallel_size", "additional_config"):
            if key in value:
                raise ValueError(f"{key} is set by the keys data_parallel_size and sere")
        return value

    @field_validator("env")
    @classmethod
    def _no_back_doors(cls, value: dict[str, str]) -> dict[str, str]:
        for name in BACK_DOORS:
            if name in value:
                raise ValueError(f"{name} lets clients run code in the engines; leave it out")
        return value

    @model_validator(mode="before")
    @classmethod
    def _split_key(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        if "startup" in value:
            raise ValueError("startup: write its keys under `sere`, beside the policy")
        if "starts_auto" in value:
            raise ValueError("starts_auto: write `mode: auto` under `sere`")
        if value.get("sere") is None:
            return value
        key = read_key_file(value["sere"])
        starts_auto = False
        if isinstance(key, Mapping) and key.get("mode") == AUTO:
            starts_auto, key = True, {**key, "mode": "off"}
        policy, startup = parse_key(key)
        return {**value, "sere": policy, "startup": startup, "starts_auto": starts_auto}

    @model_validator(mode="after")
    def _one_gpu_a_replica(self) -> Self:
        for key in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = self.engine.get(key, 1)
            if self.device == "gpu" and size != 1:
                raise ValueError(
                    f"engine.{key} = {size!r}: a replica has one GPU; use data_parallel_size, "
                    "whose ranks share the experts, or vLLM's own server with the 'sere' key"
                )
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        if self.starts_auto and self.auto is None:
            raise ValueError("sere.mode = 'auto': give target and levels under `auto`")
        if self.auto is not None and self.sere is None:
            raise ValueError("auto: needs a policy under `sere`, whose keys its levels change")
        if self.auto is not None and self.sere is not None and not self.sere.files:
            raise ValueError(
                "auto: its levels are of a rule that reads an artifact, and the policy under "
                "`sere` names no file; give similarity there"
            )
        if self.auto is not None and self.engine.get("disable_log_stats"):
            raise ValueError("auto: needs the engine's token times; leave disable_log_stats out")
        if self.metrics_interval_s is not None and self.engine.get("disable_log_stats"):
            raise ValueError(
                "engine.disable_log_stats: metrics need vLLM's statistics; leave it out, or set "
                "metrics_interval_s: null"
            )
        return self

    @model_validator(mode="after")
    def _has_experts_to_place_by(self) -> Self:
        if self.request_router == "experts":
            if self.num_replicas == 1:
                raise ValueError(
                    "request_router = 'experts': all ranks of a gang read the same experts, so "
                    "one gang leaves nothing to choose; set num_replicas to 2 or more, or leave "
                    "request_router out"
                )
            if self.sere is None:
                raise ValueError(
                    "request_router = 'experts': needs a policy under `sere`, by which engines "
                    "count experts; `mode: off` keeps every answer exact"
                )
        return self

    @model_validator(mode="after")
    def _can_score_if_told_to(self) -> Self:
        if "score" not in self.model_fields_set or self.score is None or not self.score.share:
            return self
        reason = "needs a policy under `sere`" if self.sere is None else self.why_not_scored
        if reason is not None:
            raise ValueError(f"score: {reason}; leave score out, or that")
        return self

    @model_validator(mode="after")
    def _auto_has_its_scores(self) -> Self:
        if self.auto is not None and self.auto.max_score is not None and self.scoring is None:
            reason = self.why_not_scored or "score is null, or its share 0"
            raise ValueError(
                f"auto.max_score = {self.auto.max_score}: nothing is scored ({reason})"
            )
        return self

    @property
    def why_not_scored(self) -> str | None:
        """Why engines of these arguments cannot be scored; None = they can."""
        return unscorable_engine(self.engine)

    @property
    def scoring(self) -> ScoreConfig | None:
        """How answers are scored; None = not, also where that is only the default."""
        if self.score is None or not self.score.share or self.sere is None:
            return None
        return None if self.why_not_scored else self.score

    @property
    def engine_key(self) -> dict[str, Any]:
        """The value of vLLM's ``sere`` key; empty without a policy."""
        if self.sere is None:
            return {}
        return {**self.sere.model_dump(), **self.startup.model_dump(exclude_unset=True)}

    @classmethod
    def parse(cls, value: object) -> "ServeConfig":
        """Validate a mapping, such as ``args`` of a deployment file.

        Raises:
            SereError: one line for each mistake.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise SereError("; ".join(_line(e) for e in error.errors())) from None


def _line(error: ErrorDetails) -> str:
    """Key, value and mistake; no value that holds others, ``env`` with its tokens among them."""
    where = ".".join(map(str, error["loc"])) or "args"
    value = error["input"]
    shown = not isinstance(value, Mapping | BaseModel) and error["loc"][:1] != ("env",)
    return f"{where} = {value!r}: {error['msg']}" if shown else f"{where}: {error['msg']}"
