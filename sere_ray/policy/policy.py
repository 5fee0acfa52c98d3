"""The re-routing policy: one validated description, the same everywhere it is written.

It is the value of ``--additional-config '{"sere": {...}}'`` of vLLM, of a deployment file and of
a result file; instead of it there may be the path of a YAML file of these keys, such as
`sere-ray tune` writes. Key names and defaults are those of docs/quality.md. Beside the policy,
vLLM's key may hold what an engine takes at its start and keeps (``key.py``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sere_ray.artifact.strength import Strength
from sere_ray.policy.bound import OWN_FIELDS, BoundPolicy, Mode, Union
from sere_ray.policy.explain import explain
from sere_ray.policy.loss import stages_of, without_the_other, wrong_with_loss
from sere_ray.policy.named_files import FILE_KEYS, does_without_similarity, wrong_with_masks
from sere_ray.policy.row_ranges import MOST, RowRange, RowRanges, refuse
from sere_ray.policy.startup import Startup
from sere_ray.policy.tau import Tau
from sere_ray.rules import RULES
from sere_ray.util.errors import PolicyError

RuleName = Literal["none", "sere", "margin", "spare"]
"""What engines compute."""
RULE_NAMES: tuple[RuleName, ...] = get_args(RuleName)
RULE_KEYS = frozenset(key for rule in RULES.values() for key in rule.keys)
"""Keys that not every rule has, those of rules that engines do not compute among them."""


class Policy(BaseModel):
    """How a deployment re-routes.

    Example:
        >>> Policy.parse({"similarity": "demo.safetensors", "select_top_k": 2}).mode
        'on'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    masks: str | None = Field(
        None, min_length=1, description="path of learned masks that come before the rule"
    )
    level: int | None = Field(
        None, ge=0, le=MOST, description="of the masks; 1 is the lightest, 0 masks nothing"
    )
    rule: RuleName = Field(
        "sere",
        description="which rule re-routes; others are compared by `sere-ray evaluate` only",
    )
    select_top_k: int | None = Field(
        None, ge=1, le=MOST, description="S: slots of a row that are never re-routed; <= K"
    )
    threshold: float | None = Field(
        None, ge=0.0, le=1.0, description="rho: least similarity of a stand-in, 0..1; null = any"
    )
    min_primary_experts: int | None = Field(
        None, ge=0, le=MOST, description="m: least size of the primary set; null = K of the model"
    )
    union: Union = Field(
        "global",
        description="rows the primary set is taken over: of all ranks, or of each rank its own",
    )
    mode: Mode = Field(
        "on", description="off = exact; observe = exact, but count what `on` would read"
    )
    tau: Tau = Field(
        None, description="least demand of a kept expert, 0..1: a number, or a list, one per layer"
    )
    loss: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="in place of tau: what the worst task loses, by `sere-ray strength`",
    )
    guard: bool | None = Field(
        None,
        description="with loss: what would give up more demand than was measured stays exact",
    )
    beta: float | None = Field(
        None, ge=0.0, le=1.0, description="1 = weights renormalised, 0 = the gate's scale"
    )
    fill: float | None = Field(
        None, ge=0.0, le=1.0, description="factor of the weight of a stand-in"
    )
    runners_up: int | None = Field(
        None, ge=1, le=MOST, description="how many unchosen experts a chosen one is compared with"
    )
    balance_ranks: bool | None = Field(
        None, description="whether tau counts what the busiest expert-parallel rank reads"
    )
    lead: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="demand of: 1 = lead over runners-up, 0 = weight; null = by layer",
    )
    limit: float | None = Field(
        None, ge=0.0, le=1.0, description="most that a stand-in leaves over; null = by layer"
    )
    protect: bool | None = Field(
        None, description="every row keeps its first choice; null = by layer"
    )
    by_rows: RowRanges = Field(
        None,
        description="other values of the rule's keys for steps of few re-routable rows: a list "
        "such as [{up_to: 8, tau: 0.01}]",
    )
    # The last field: whether it may be left out depends on others.
    similarity: str | None = Field(
        None,
        min_length=1,
        validate_default=True,
        description="path of the similarity artifact",
    )

    @field_validator("similarity")
    @classmethod
    def _check_similarity(cls, value: str | None, others: ValidationInfo) -> str | None:
        if value is None and not does_without_similarity(
            others.data.get("rule", "sere"), others.data
        ):
            about = cls.model_fields["similarity"].description
            text = f"similarity is missing: give it ({about})"
            raise PydanticCustomError("rule_key", "{text}", {"text": text})
        return value

    @model_validator(mode="after")
    def _check_rule_keys(self) -> Self:
        """Each rule has its own keys; null stands for a key that is not given."""
        takes, text = RULES[self.rule], None
        for key in [key for key in type(self).model_fields if key in RULE_KEYS]:
            value = getattr(self, key)
            if value is None and key in takes.required and not (key == "tau" and self.loss):
                about = type(self).model_fields[key].description
                other = ", or loss in its place" if "loss" in takes.keys else ""
                text = f"{key} is missing: give it ({about}){other}"
            elif value is not None and key not in takes.keys:
                own = f", only {', '.join(takes.keys)}" if takes.keys else ""
                text = f"{key} = {value!r}: rule {self.rule!r} has no such key{own}; leave it out"
            if text:
                raise PydanticCustomError("rule_key", "{text}", {"text": text})
        wrong = wrong_with_loss(self.rule, dict(self)) or wrong_with_masks(self.rule, dict(self))
        if text := wrong:
            raise PydanticCustomError("rule_key", "{text}", {"text": text})
        for number, entry in enumerate(self.by_rows or ()):
            self._check_range(number, entry)
        return self

    def _check_range(self, number: int, entry: RowRange) -> None:
        allowed = RULES[self.rule].keys
        for key, value in entry.keys:
            if key not in allowed:
                message = f"an entry takes up_to and, of rule {self.rule!r}, {', '.join(allowed)}"
                raise refuse(f".{number}.{key}", value, message)
        try:
            self._of_range(entry, where=f"by_rows.{number}")
        except PolicyError as error:
            raise PydanticCustomError("rule_key", "{text}", {"text": str(error)}) from None

    def _of_range(self, entry: RowRange, where: str = "sere") -> Self:
        """The policy of the steps of an entry."""
        return self.parse({**self.model_dump(exclude={"by_rows"}), **dict(entry.keys)}, where=where)

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
            raise PolicyError(
                "; ".join(explain(e, where, cls, _AT_START) for e in error.errors())
            ) from None

    def changed(self, changes: Mapping[str, Any], *, where: str = "sere") -> Self:
        """This policy with other values of some keys.

        Where these name another rule, keys that it does not have are left out, ``by_rows`` among
        them: nobody asked for them under this rule.

        Args:
            changes: the keys that are written anew.
            where: name of the mapping in error messages.

        Raises:
            PolicyError: as for :meth:`parse`.
        """
        kept = self.model_dump()
        rule = changes.get("rule", self.rule)
        if rule != self.rule and rule in RULE_NAMES:
            others = RULE_KEYS.difference(RULES[rule].keys)
            kept = {key: kept[key] for key in kept if key not in others and key != "by_rows"}
        return self.parse({**without_the_other(kept, changes), **changes}, where=where)

    def for_model(
        self,
        *,
        top_k: int,
        strengths: Mapping[str, Strength] | None = None,
        where: str = "sere",
    ) -> BoundPolicy:
        """Check the policy against a model's K and fill the default floor; turn `loss` into tau.

        Args:
            top_k: K.
            strengths: of the artifact, for a policy with `loss`.
            where: name of the policy in error messages.

        Raises:
            PolicyError: ``select_top_k`` is larger than K, or `loss` beyond what was measured.
            ArtifactError: the artifact does not say what `loss` means.
        """
        if self.select_top_k is not None and self.select_top_k > top_k:
            raise PolicyError(
                f"{where}.select_top_k = {self.select_top_k}: this model chooses K = {top_k} "
                f"experts per token, so 1..{top_k} is allowed ({top_k} changes nothing)"
            )
        floor = top_k if self.min_primary_experts is None else self.min_primary_experts
        keys = [key for key in RULES[self.rule].keys if key not in (*OWN_FIELDS, "loss")]
        others = ((key, getattr(self, key)) for key in keys)
        bound = BoundPolicy(
            mode=self.mode,
            rule=self.rule,
            select_top_k=self.select_top_k or top_k,
            threshold=self.threshold,
            min_primary_experts=floor,
            union=self.union,
            level=self.level or 0,
            knobs=tuple((key, value) for key, value in others if value is not None),
        )
        places = ((f"{where}.by_rows.{i}", entry) for i, entry in enumerate(self.by_rows or ()))
        ranges = [
            (e.up_to, self._of_range(e).for_model(top_k=top_k, strengths=strengths, where=place))
            for place, e in places
        ]
        stages = stages_of(self.rule, self.loss, strengths or {}, str(self.similarity), where)
        return bound.in_stages(stages).in_ranges(ranges)

    def check_layers(self, count: int, where: str = "sere") -> None:
        """Refuse a list of another length than the model has MoE layers.

        Raises:
            PolicyError: names both numbers.
        """
        if isinstance(self.tau, tuple) and len(self.tau) != count:
            raise PolicyError(
                f"{where}.tau = {list(self.tau)}: has {len(self.tau)} numbers, this model has "
                f"{count} MoE layers; give one number, or one for each layer"
            )
        for number, entry in enumerate(self.by_rows or ()):
            self._of_range(entry).check_layers(count, f"{where}.by_rows.{number}")

    @property
    def similarity_path(self) -> Path | None:
        """The artifact's path with ``~`` expanded; None = there is none."""
        return self.files.get("similarity")

    @property
    def files(self) -> dict[str, Path]:
        """The files it names by their key, with ``~`` expanded."""
        named = ((key, getattr(self, key)) for key in FILE_KEYS)
        return {key: Path(path).expanduser() for key, path in named if path is not None}


_AT_START = tuple(Startup.model_fields)
