"""Settings of rules as the evaluator takes them, those that engines do not serve included."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.artifact.statistics import ALL_NAMES
from sere_ray.artifact.strength import Strength
from sere_ray.policy.bound import BoundPolicy
from sere_ray.policy.key import check_beside_start
from sere_ray.policy.policy import RULE_NAMES, Policy
from sere_ray.policy.startup import Startup
from sere_ray.rules import RULES
from sere_ray.util.errors import PolicyError, SereError

EXACT = "exact"
"""Name of the row that changes nothing."""


def _as_budget(value: object) -> int | tuple[int, ...] | None:
    """A number of experts, or one for each layer."""
    several = isinstance(value, list | tuple)
    numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if value is None:
        return None
    if not numbers or not all(type(n) is int and n >= 1 for n in numbers):
        raise PydanticCustomError("experts", "must be a whole number above 0, or a list of them")
    return tuple(numbers) if several else numbers[0]


Budget = Annotated[
    int | tuple[int, ...] | None,
    PlainValidator(_as_budget, json_schema_input_type=int | list[int] | None),
]


AnyRule = Literal[
    "none",
    "sere",
    "topk",
    "oea",
    "xshare",
    "lynx",
    "k1k2",
    "ace",
    "exfold",
    "mone",
    "margin",
    "spare",
]


class BoundSetting(BoundPolicy):
    """A setting with the numbers that it has for one model."""

    masks: str | None = None
    """File of learned masks."""


class Setting(Policy):
    """A policy of any rule: those that engines serve, and published ones to compare with."""

    rule: AnyRule = Field(  # type: ignore[assignment]  # wider
        "sere", description="which rule re-routes"
    )
    experts: Budget = Field(
        None, description="n: how many experts are kept: a number, or a list, one per layer"
    )
    max_per_rank: int | None = Field(
        None, ge=1, description="how many of them one expert-parallel rank may hold; null = any"
    )
    alpha: float | None = Field(None, gt=0.0, description="bins per unit of the gate's logit")
    base: float | None = Field(None, gt=1.0, description="a bin counts base times the next one")
    depth: int | None = Field(None, ge=1, description="the last bin")
    normalise_over: int | None = Field(
        None, ge=1, description="k2: over how many best scores a row's weight is shared out"
    )
    rcr_scale: float | None = Field(
        None, ge=0.0, description="what the router's view counts beside the spectral one"
    )
    lda: bool | None = Field(
        None, description="repair the outputs of the layers with LDA, fitted on --tune-data"
    )

    def for_model(
        self,
        *,
        top_k: int,
        strengths: Mapping[str, Strength] | None = None,
        where: str = "sere",
    ) -> BoundSetting:
        """As of a policy, and which masks come first."""
        bound = super().for_model(top_k=top_k, strengths=strengths, where=where)
        return BoundSetting(**dict(bound), masks=self.masks)

    def check_layers(self, count: int, where: str = "sere") -> None:
        """Refuse a list of another length than the model has MoE layers.

        Raises:
            PolicyError: names both numbers.
        """
        super().check_layers(count, where)
        if isinstance(self.experts, tuple) and len(self.experts) != count:
            raise PolicyError(
                f"{where}.experts = {list(self.experts)}: has {len(self.experts)} numbers, this "
                f"model has {count} MoE layers; give one number, or one for each layer"
            )


def looks_at_ranks(keys: dict[str, Any]) -> bool:
    """Whether what a setting does depends on where experts lie."""
    return bool(keys.get("max_per_rank") or keys.get("balance_ranks"))


def read_settings(path: Path) -> list[dict[str, Any]]:
    """Settings of a YAML or JSON file: a list of policies, ``similarity`` left out.

    Raises:
        SereError: not such a list.
        PolicyError: names the entry and the key.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SereError(f"--settings = {path}: not a readable YAML file ({error})") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SereError(
            f"--settings = {path}: must be a list of policies without 'similarity', such as "
            "[{rule: oea, select_top_k: 2}]"
        )
    for number, entry in enumerate(entries):
        as_policy(entry, where=f"{path}[{number}]")
    return entries


def as_policy(keys: dict[str, Any], where: str = "settings") -> Setting:
    """A setting as a policy; which artifact it will be used with is decided elsewhere."""
    setting = Setting.parse({"similarity": "-", **keys}, where=where)
    check_beside_start(setting, Startup(), where=where)
    return setting


def label(keys: dict[str, Any]) -> str:
    """Short name of a setting: ``S=2 rho=0.3``."""
    names = {
        "select_top_k": "S",
        "threshold": "rho",
        "min_primary_experts": "floor",
        "experts": "n",
        "runners_up": "runners-up",
        "normalise_over": "k2",
        "rcr_scale": "rcr",
    }
    shown = (key for key in keys if key != "rule" and keys[key] is not None)
    parts = [f"{names.get(key, key)}={_short(key, keys[key])}" for key in shown]
    return " ".join(parts) or EXACT


def _short(key: str, value: Any) -> Any:
    return Path(value).name if key == "masks" else value


def statistics_of(rule: str) -> tuple[str, ...]:
    """The statistics that a rule reads and calibration makes."""
    return tuple(name for name in RULES[rule].statistics if name in ALL_NAMES)


def rules_of(artifact: SimilarityArtifact, among: Iterable[str] = RULES) -> tuple[str, ...]:
    """Rules that change something and read nothing which an artifact lacks."""
    return tuple(r for r in among if r != "none" and not artifact.lacking(statistics_of(r)))


def check_rules(names: tuple[str, ...], *, served: bool = False, option: str = "--rules") -> None:
    """Refuse a name that no rule has.

    Args:
        names: of the option.
        served: refuse rules that engines do not serve, too.
        option: which the message names.

    Raises:
        SereError: names it.
    """
    for name in names:
        if name not in RULES:
            raise SereError(
                f"{option}: {name!r} is none of {', '.join(RULE_NAMES if served else RULES)}"
            )
        if served and name not in RULE_NAMES:
            raise SereError(
                f"{option}: {name!r} is compared by `sere-ray evaluate` only; engines serve "
                f"{' and '.join(RULE_NAMES)}"
            )
        if name == "none":
            raise SereError(
                f"{option}: 'none' has no settings of its own; name it in --settings, with masks "
                "and level"
            )
