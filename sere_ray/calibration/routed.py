"""Statistics of experts over the tokens that chose them: sums that add up over chunks and workers.

u and v are raw outputs of experts, before the gate's weights. Sums are float64.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.artifact.statistics import GROUPS
from sere_ray.rules.exfold import UNSEEN
from sere_ray.util.errors import SereError

RIDGE = 1e-3
"""Of ExFold's published code, added to the sum of squares a scale is divided by."""
LARGEST_SCALE = 4.0
"""Of the same: scales are clipped to -4..4."""
_PREFIX = "routed."


class RoutedSums:
    """What some groups of statistics keep of the tokens seen so far, for one layer.

    Args:
        groups: names of :data:`sere_ray.artifact.statistics.GROUPS`.
    """

    def __init__(self, groups: tuple[str, ...]) -> None:
        self.groups = groups
        self.sums: dict[str, Tensor] = {}

    def update(self, outputs: Tensor, choice: Tensor, weights: Tensor) -> None:
        """Add one chunk.

        Args:
            outputs: ``[E, n, H]`` raw outputs of all experts.
            choice: ``[n, K]`` expert ids.
            weights: ``[n, K]`` of the gate.
        """
        token = torch.arange(len(choice), device=choice.device)[:, None]
        chosen = outputs[choice, token].float()  # [n, K, H]
        self._add("chosen", choice, torch.ones_like(choice, dtype=torch.float64), len(outputs))
        if "stand_ins" in self.groups:
            self._add_pairs(chosen, choice, len(outputs))
        if "directed" in self.groups:
            self._add_directed(outputs, chosen, choice, weights)
        if "novices" in self.groups:
            flat = chosen.flatten(0, 1).double()
            self._add("weight", choice, weights.double(), len(outputs))
            self._add("output", choice, flat, len(outputs))
            self._add("square", choice, flat.square(), len(outputs))

    def _add_pairs(self, chosen: Tensor, choice: Tensor, num_experts: int) -> None:
        """ExFold's sums over pairs (u, v) of a token, each weighted by |u|."""
        dots = (chosen @ chosen.mT).double()  # [n, K, K]
        squares = dots.diagonal(dim1=1, dim2=2)
        norms = squares.sqrt()
        pair = choice[:, :, None] * num_experts + choice[:, None, :]
        terms = {
            "dot": dots * norms[:, :, None],
            "target": squares[:, None, :] * norms[:, :, None],
            "source": (squares * norms)[:, :, None].expand(dots.shape),
        }
        for name, term in terms.items():
            self._add(name, pair, term, num_experts**2)
        self._add("norm", choice, norms, num_experts)

    def _add_directed(
        self, outputs: Tensor, chosen: Tensor, choice: Tensor, weights: Tensor
    ) -> None:
        """Sums over tokens that chose u, of every v, each weighted by the squared weight of u."""
        every = outputs.float().transpose(0, 1)  # [n, E, H]
        counts = weights.double().square()[..., None]  # [n, K, 1]
        dots = (chosen @ every.mT).double() * counts  # [n, K, E]
        squares = every.square().sum(dim=-1).double()[:, None] * counts
        own = chosen.square().sum(dim=-1).double() * counts[..., 0]
        self._add("directed_dot", choice, dots.flatten(0, 1), len(outputs))
        self._add("directed_target", choice, squares.flatten(0, 1), len(outputs))
        self._add("directed_source", choice, own, len(outputs))

    def _add(self, name: str, index: Tensor, values: Tensor, size: int) -> None:
        """Add to a named sum: numbers in the shape of ``index``, or a row ``[H]`` for each."""
        index = index.flatten()
        values = values.flatten() if values.numel() == len(index) else values
        if name not in self.sums:
            self.sums[name] = values.new_zeros((size, *values.shape[1:]))
        self.sums[name].index_add_(0, index, values)

    def merge(self, other: Self) -> Self:
        """The sums over both sets of tokens; neither operand changes."""
        merged = type(self)(self.groups)
        for part in (self, other):
            for name, tensor in part.sums.items():
                known = merged.sums.get(name)
                merged.sums[name] = tensor.cpu() if known is None else known + tensor.cpu()
        return merged

    def statistics(self, tokens: int) -> dict[str, Tensor]:
        """The tensors of an artifact, float32 on the CPU.

        Args:
            tokens: how many were seen.
        """
        if not self.sums:
            return {}
        self.sums = {name: tensor.cpu() for name, tensor in self.sums.items()}
        found: dict[str, Tensor] = {}
        if "stand_ins" in self.groups:
            found |= self._stand_ins()
        if "directed" in self.groups:
            found |= self._directed()
        if "novices" in self.groups:
            found |= self._novices(tokens)
        return {name: tensor.float() for name, tensor in found.items()}

    def _stand_ins(self) -> dict[str, Tensor]:
        """s(u, v) = sum |u|<u, v> / (sum |u||v|^2 + ridge), and what of sum |u|^3 it leaves."""
        chosen = self.sums["chosen"]
        shape = (len(chosen), len(chosen))
        dot, target, source = (self.sums[n].view(shape) for n in ("dot", "target", "source"))
        seen = source > 0
        scale = (dot / (target + RIDGE)).clamp(-LARGEST_SCALE, LARGEST_SCALE)
        loss = _left_over(scale, dot, target, source).where(seen, UNSEEN)
        norm = self.sums["norm"] / chosen.clamp(min=1)
        usual = norm[chosen > 0].median()  # an expert that nobody chose is taken for a usual one
        return {
            "output_norm": torch.where(chosen > 0, norm, usual),
            "stand_in_scale": torch.where(seen, scale, 0.0).fill_diagonal_(1.0),
            "stand_in_loss": loss.fill_diagonal_(UNSEEN),
        }

    def _directed(self) -> dict[str, Tensor]:
        """s(u, v) = sum w^2 <u,v> / sum w^2 |v|^2, and what of sum w^2 |u|^2 it leaves over."""
        dot, target = self.sums["directed_dot"], self.sums["directed_target"]
        source = self.sums["directed_source"][:, None]
        seen = (source > 0) & (target > 0)
        scale = torch.where(seen, dot / target.where(seen, target.new_ones(())), 0.0)
        scale = scale.clamp(-LARGEST_SCALE, LARGEST_SCALE)
        loss = _left_over(scale, dot, target, source).where(seen, 1.0)
        return {
            "directed_scale": scale.fill_diagonal_(1.0),
            "directed_loss": loss.clamp(max=1).fill_diagonal_(1.0),
        }

    def _novices(self, tokens: int) -> dict[str, Tensor]:
        """Mean output, and ||sqrt(unbiased variance)||_2 times the mean weight over all tokens."""
        chosen = self.sums["chosen"][:, None]
        mean = self.sums["output"] / chosen.clamp(min=1)
        about = self.sums["square"] - chosen * mean.square()
        spread = (about / (chosen - 1).clamp(min=1)).clamp(min=0).sqrt()
        score = torch.linalg.vector_norm(spread, dim=1) * self.sums["weight"] / tokens
        return {"output_mean": mean, "novice_score": score}


def _left_over(scale: Tensor, dot: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """What ``scale`` times v leaves over of u, as a share; NaN where ``source`` is 0.

    Args:
        scale: ``[E, E]``.
        dot: ``[E, E]``, a weighted sum over tokens of <u, v>.
        target: ``[E, E]``, the same of the square of v.
        source: of the square of u; broadcasts.
    """
    return (source - 2 * scale * dot + scale.square() * target).clamp(min=0) / source


def stacked(layers: list[RoutedSums | None]) -> dict[str, NDArray[Any]]:
    """The sums of all layers as arrays ``[1, layers, ...]``: a row of a Ray data set."""
    parts = [layer.sums for layer in layers if layer is not None]
    return {
        f"{_PREFIX}{name}": torch.stack([part[name].cpu() for part in parts])[None].numpy()
        for name in (parts[0] if parts else {})
    }


def one_of_stacked(row: Mapping[str, NDArray[Any]], position: int) -> dict[str, Tensor]:
    """The sums of one layer of such a row, which may have other fields, too."""
    return {
        name.removeprefix(_PREFIX): torch.tensor(values[0][position])
        for name, values in row.items()
        if name.startswith(_PREFIX)
    }


def check_groups(groups: tuple[str, ...]) -> None:
    """Refuse a name that no group has.

    Raises:
        SereError: names it.
    """
    for group in groups:
        if group not in GROUPS:
            raise SereError(f"--statistics: {group!r} is none of {', '.join(GROUPS)}")
