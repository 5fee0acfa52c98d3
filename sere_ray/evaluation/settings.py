"""Which settings of a rule are compared: grids, from strong re-routing to light, or a file."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from sere_ray.policy.policy import RULE_NAMES, Policy
from sere_ray.rules import RULES
from sere_ray.util.errors import SereError

EXACT = "exact"
"""Name of the row that changes nothing."""
_BUDGETS = 9
"""How many budgets of kept experts are tried at a batch size."""
_TAUS = (0.0, 0.0001, 0.0003, 0.001, 0.002, 0.004, 0.006, 0.01, 0.02, 0.04, 0.1, 1.0)
_LYNX = ({"alpha": 2.0, "base": 2.0}, {"alpha": 4.0, "base": 2.0})


class Setting(Policy):
    """A policy of any rule: those that engines serve, and published ones to compare with."""

    rule: Literal["sere", "topk", "oea", "xshare", "lynx", "margin"] = Field(  # type: ignore[assignment]  # wider
        "sere", description="which rule re-routes"
    )
    experts: int | None = Field(None, ge=1, description="n: how many experts are kept")
    max_per_rank: int | None = Field(
        None, ge=1, description="how many of them one expert-parallel rank may hold; null = any"
    )
    alpha: float | None = Field(None, gt=0.0, description="bins per unit of the gate's logit")
    base: float | None = Field(None, gt=1.0, description="a bin counts base times the next one")
    depth: int | None = Field(None, ge=1, description="the last bin")


def grid(rule: str, *, batch: int, num_experts: int, top_k: int) -> list[dict[str, Any]]:
    """Policy keys of the settings of a rule at a batch size, without ``similarity``.

    Published rules have no floor; ``margin`` has its default one. Budgets lie between the experts
    that B rows name with one slot and with all of them, if they choose evenly.
    """
    sizes = range(1, min(top_k, 7))
    budgets = _budgets(batch, num_experts, top_k, ranks=1)
    found: dict[str, list[dict[str, Any]]] = {
        "sere": [
            {"select_top_k": size, "threshold": rho, "min_primary_experts": 0}
            for size in sizes
            for rho in (None, 0.3)
        ],
        "topk": [{"select_top_k": size} for size in sizes],
        "oea": [{"select_top_k": size} for size in sizes],
        "xshare": [{"experts": budget} for budget in budgets],
        "lynx": [{"experts": budget, **bins} for bins in _LYNX for budget in budgets],
        "margin": [{"tau": tau} for tau in _TAUS],
    }
    return [{"rule": rule, **keys} for keys in found[rule]]


def rank_grid(
    rule: str, ranks: int, *, batch: int, num_experts: int, top_k: int
) -> list[dict[str, Any]]:
    """Further policy keys of rules that look at where experts lie, for this number of ranks."""
    caps = _budgets(batch, num_experts, top_k, ranks)
    found: dict[str, list[dict[str, Any]]] = {
        "xshare": [{"experts": num_experts, "max_per_rank": cap} for cap in caps],
        "margin": [{"tau": tau, "balance_ranks": True} for tau in _TAUS],
    }
    return [{"rule": rule, **keys} for keys in found.get(rule, []) if ranks > 1]


def _budgets(batch: int, num_experts: int, top_k: int, ranks: int) -> list[int]:
    """Numbers of experts of a rank, between one slot of each row and all of them."""
    least, most = (num_experts * (1 - (1 - k / num_experts) ** batch) for k in (1, top_k))
    between = (least + (most - least) * i / (_BUDGETS - 1) for i in range(_BUDGETS))
    return sorted({max(1, round(budget / ranks)) for budget in between})


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
    return Setting.parse({"similarity": "-", **keys}, where=where)


def label(keys: dict[str, Any]) -> str:
    """Short name of a setting: ``S=2 rho=0.3``."""
    names = {
        "select_top_k": "S",
        "threshold": "rho",
        "min_primary_experts": "floor",
        "experts": "n",
        "runners_up": "runners-up",
    }
    shown = (key for key in keys if key != "rule" and keys[key] is not None)
    parts = [f"{names.get(key, key)}={keys[key]}" for key in shown]
    return " ".join(parts) or EXACT


def check_rules(names: tuple[str, ...], *, served: bool = False) -> None:
    """Refuse a name that no rule has.

    Args:
        names: of ``--rules``.
        served: refuse rules that engines do not serve, too.

    Raises:
        SereError: names it.
    """
    for name in names:
        if name not in RULES:
            raise SereError(
                f"--rules: {name!r} is none of {', '.join(RULE_NAMES if served else RULES)}"
            )
        if served and name not in RULE_NAMES:
            raise SereError(
                f"--rules: {name!r} is compared by `sere-ray evaluate` only; engines serve "
                f"{' and '.join(RULE_NAMES)}"
            )
