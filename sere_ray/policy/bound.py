"""The numbers of a policy for one model: what engines hold and the rule is called with.

:meth:`sere_ray.policy.policy.Policy.for_model` makes them from what a user wrote.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from sere_ray.artifact.strength import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from sere_ray.rules import Layer

Mode = Literal["off", "observe", "on"]
Union = Literal["global", "local"]
OWN_FIELDS = ("select_top_k", "threshold", "min_primary_experts")
"""Knobs of rules that have fields of their own in :class:`BoundPolicy`."""


class BoundPolicy(BaseModel):
    """A policy with the numbers that it has for one model, defaults filled in.

    The fields are the keys of the policy. Where it does not give them, ``select_top_k`` and
    ``min_primary_experts`` are K of the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode
    rule: str = "sere"
    """A key of :data:`sere_ray.rules.RULES`; engines serve those of ``policy.RuleName``."""
    select_top_k: int
    threshold: float | None
    min_primary_experts: int
    union: Union = "global"
    level: int = 0
    """Of the masks that come before the rule; 0 = nothing is masked."""
    knobs: tuple[tuple[str, Any], ...] = ()
    """Further knobs of the rule that were given; of ``tau`` and ``most`` one for each layer, if
    there are several."""
    by_rows: tuple[tuple[int, "BoundPolicy"], ...] = ()
    """``(most re-routable rows of a step, its numbers)``, from small steps to large ones."""

    def for_rows(self, rows: int) -> "BoundPolicy":
        """The numbers of a step.

        Args:
            rows: re-routable rows that the kept experts are chosen over.
        """
        return next((bound for up_to, bound in self.by_rows if rows <= up_to), self)

    def in_stages(self, stages: Sequence[Stage]) -> "BoundPolicy":
        """The same numbers with the taus of `loss` by rows; without any, as it is."""
        if not stages:
            return self
        parts = [self._at(stage) for stage in stages]
        ranges = tuple((s.up_to, part) for s, part in zip(stages, parts, strict=True))
        return parts[-1].model_copy(update={"by_rows": ranges[:-1]})

    def _at(self, stage: Stage) -> "BoundPolicy":
        return self.model_copy(
            update={"knobs": (*self.knobs, ("tau", stage.tau), ("most", stage.most))}
        )

    def in_ranges(self, ranges: Sequence[tuple[int, "BoundPolicy"]]) -> "BoundPolicy":
        """The same numbers, but others for steps of few rows.

        Args:
            ranges: ``(most rows, numbers)`` from few to many; both may have ``by_rows`` of their
                own, which hold as far as their range goes.
        """
        if not ranges:
            return self
        flat: list[tuple[int, BoundPolicy]] = []
        above = 0
        for up_to, part in ranges:
            flat += [(rows, numbers) for rows, numbers in part.by_rows if above < rows < up_to]
            flat.append((up_to, part.for_rows(up_to).model_copy(update={"by_rows": ()})))
            above = up_to
        flat += [(rows, numbers) for rows, numbers in self.by_rows if rows > above]
        return self.model_copy(update={"by_rows": tuple(flat)})

    def identity(self, top_k: int) -> "BoundPolicy":
        """For layers that stay exact: the same policy with a rule that changes nothing.

        Args:
            top_k: K.
        """
        exact = {"rule": "sere", "select_top_k": top_k, "threshold": None, "knobs": ()}
        return self.model_copy(
            update={**exact, "min_primary_experts": 0, "level": 0, "by_rows": ()}
        )

    def of_layer(
        self,
        position: int,
        num_experts: int,
        similarity: "Tensor | None",
        owner: "Tensor | None" = None,
        statistics: "Mapping[str, Tensor] | None" = None,
    ) -> "Layer":
        """What the rule is called with in one layer.

        Args:
            position: of the layer among the MoE layers, from 0.
            num_experts: E.
            similarity: ``[E, E]`` float32, where the rule reads it.
            owner: ``[E]`` int64, the expert-parallel rank of each expert; None = one rank.
            statistics: further tensors of the layer by name, where the rule reads them.
        """
        from sere_ray.rules import Layer  # torch is there by now

        knobs = {
            key: value[position] if isinstance(value, tuple) else value for key, value in self.knobs
        }
        return Layer(
            num_experts,
            similarity=similarity,
            owner=owner,
            statistics=statistics or {},
            select_top_k=self.select_top_k,
            threshold=self.threshold,
            min_primary_experts=self.min_primary_experts,
            **knobs,
        )
