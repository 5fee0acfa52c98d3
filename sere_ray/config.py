"""The re-routing policy: one validated description, the same everywhere it is written.

It is the value of ``--additional-config '{"sere": {...}}'`` of vLLM, of a deployment file and of
a result file. Key names and defaults are those of the specification (docs/rule.md). Beside the
policy, vLLM's key may hold what an engine takes at its start and keeps: :class:`Startup`.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sere_ray.errors import PolicyError

Mode = Literal["off", "observe", "on"]
Union = Literal["global", "local"]
Dispatch = Literal["allgather", "all_to_all"]


class Policy(BaseModel):
    """How a deployment re-routes.

    Example:
        >>> Policy.parse({"similarity": "demo.safetensors", "select_top_k": 2}).mode
        'on'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    similarity: str = Field(min_length=1, description="path of the similarity artifact")
    select_top_k: int = Field(ge=1, description="S: slots of a row that are never re-routed; <= K")
    rule: Literal["sere"] = Field("sere", description="which rule re-routes")
    threshold: float | None = Field(
        None, ge=0.0, le=1.0, description="rho: least similarity of a stand-in, 0..1; null = any"
    )
    min_primary_experts: int | None = Field(
        None, ge=0, description="m: least size of the primary set; null = K of the model"
    )
    union: Union = Field(
        "global",
        description="rows the primary set is taken over: of all ranks, or of each rank its own",
    )
    mode: Mode = Field(
        "on", description="off = exact; observe = exact, but count what `on` would read"
    )
    prefer_local_rank: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="how much less similar a stand-in may be if it is on a rank that the row "
        "visits anyway, 0..1; null = the most similar, wherever it is",
    )

    @classmethod
    def parse(cls, value: object, *, where: str = "sere") -> Self:
        """Validate a mapping.

        Args:
            value: what the user wrote.
            where: name of the mapping in error messages.

        Raises:
            PolicyError: for each mistake the key, the value, what is allowed, what to do.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise PolicyError(
                f"{where} = {value!r}: must be a mapping of policy keys, "
                f'for example {{"similarity": "FILE", "select_top_k": 2}}'
            )
        try:
            return cls.model_validate(dict(value))
        except ValidationError as error:
            raise PolicyError("; ".join(_explain(e, where, cls) for e in error.errors())) from None

    def for_model(self, *, top_k: int, where: str = "sere") -> "BoundPolicy":
        """Check the policy against a model's K and fill the default floor.

        Raises:
            PolicyError: ``select_top_k`` is larger than K.
        """
        if self.select_top_k > top_k:
            raise PolicyError(
                f"{where}.select_top_k = {self.select_top_k}: this model chooses K = {top_k} "
                f"experts per token, so 1..{top_k} is allowed ({top_k} changes nothing)"
            )
        floor = top_k if self.min_primary_experts is None else self.min_primary_experts
        return BoundPolicy(
            mode=self.mode,
            select_top_k=self.select_top_k,
            threshold=self.threshold,
            min_primary_experts=floor,
            union=self.union,
            prefer_local_rank=self.prefer_local_rank,
        )

    @property
    def similarity_path(self) -> Path:
        """The artifact's path with ``~`` expanded."""
        return Path(self.similarity).expanduser()


class Startup(BaseModel):
    """What the ``sere`` key of an engine may hold beside the policy; no policy can change it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dispatch: Dispatch = Field(
        default="allgather",
        description="how rows reach other ranks under data and expert parallelism: every row to "
        "all of them, or each only to those that hold its experts",
    )
    check_ranks: bool = Field(
        default=False,
        description="for debugging, slow: in every layer the ranks compare where each expert's "
        "slots go, and all raise if two of them differ",
    )


def parse_key(value: object, *, where: str = "sere") -> tuple[Policy, Startup]:
    """Validate the value of vLLM's ``sere`` key: a policy, and what an engine takes at its start.

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
        raise PolicyError("; ".join(_explain(e, where, Startup) for e in error.errors())) from None
    return Policy.parse(policy, where=where), startup


class BoundPolicy(BaseModel):
    """The numbers of a policy for one model: what the rule is called with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode
    select_top_k: int
    threshold: float | None
    min_primary_experts: int
    union: Union = "global"
    prefer_local_rank: float | None = None


def _explain(error: Any, where: str, model: type[BaseModel]) -> str:
    path = ".".join([where, *(str(part) for part in error["loc"])])
    key = str(error["loc"][0]) if error["loc"] else ""
    keys = list(model.model_fields)
    if key not in keys and key in Startup.model_fields:
        return (
            f"{path} = {error['input']!r}: is taken when an engine starts and is no part of a "
            "policy; leave it out here"
        )
    if key not in keys:
        near = difflib.get_close_matches(key, [*keys, *Startup.model_fields], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return (
            f"{path} = {error['input']!r}: unknown key; {hint}allowed keys: {', '.join(keys)}; "
            f"at the start of an engine also {', '.join(Startup.model_fields)}"
        )
    about = model.model_fields[key].description
    if error["type"] == "missing":
        return f"{path} is missing: give it ({about})"
    message = error["msg"][0].lower() + error["msg"][1:]
    if key == "mode" and isinstance(error["input"], bool):
        message += ", in quotes: YAML reads a bare on or off as a boolean"
    return f"{path} = {error['input']!r}: {message} ({about})"
