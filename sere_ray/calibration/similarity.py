"""Similarity of experts from sums over token chunks.

A_i ``[N, H]`` is expert i's raw output for all N tokens. Every streaming metric here is a
function of one E x E Gram matrix ``G_ij = <f(A_i), f(A_j)>`` of a feature vector f per expert.
Gram matrices of disjoint chunks add up, so nothing grows with N, and the sums of several
processes merge in any order. Products are float64: distances of near-identical experts are small
differences of large numbers.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from sere_ray.calibration.routed import RoutedSums, check_groups
from sere_ray.util.errors import SereError

Metric = Literal["frobenius", "cosine", "cka", "cka-exact"]
METRICS: tuple[Metric, ...] = get_args(Metric)

EXACT_LIMIT_BYTES = 4 * 2**30
_COLUMNS_BYTES = 64 * 2**20  # at most, of a float64 slice of the features
_GPU_BLOCKS = 64  # columns of a slice in parts: E x E sums alone would keep few processors busy


def working_bytes(device: torch.device) -> int:
    """How many bytes of float32 are computed at a time.

    On a CPU they should stay in its cache: that saved a third of the time on the demo model
    (measured once, in no result file). Both numbers are small beside any model.
    """
    return 4 * 2**20 if device.type == "cpu" else 256 * 2**20


def in_blocks(columns: Tensor, blocks: int) -> Tensor:
    """``[blocks, E, D / blocks]`` of ``[E, D]``; columns of zeros are added where D asks for it."""
    padded = pad(columns, (0, -columns.shape[1] % blocks))
    return padded.view(len(columns), blocks, -1).transpose(0, 1)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of ``[E', D]`` and ``[E, D]``; on a GPU summed over parts of D."""
    if left.device.type == "cpu":
        return left @ right.T
    return (in_blocks(left, _GPU_BLOCKS) @ in_blocks(right, _GPU_BLOCKS).mT).sum(dim=0)


class Sums(ABC):
    """What a metric keeps of the tokens seen so far, for one layer."""

    chunk_tokens: ClassVar[int] = 1024
    """Most tokens of a chunk; a metric that depends on the chunking gets exactly that many."""
    fixed_chunks: ClassVar[bool] = False
    """Whether the result depends on how tokens are cut into chunks."""
    min_tokens: ClassVar[int] = 1
    """A chunk of fewer tokens is dropped."""

    def __init__(self, num_experts: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=device)
        self.tokens = 0
        self.routed: RoutedSums | None = None
        """Further statistics, where they were asked for; not with ``fixed_chunks``."""

    @abstractmethod
    def update(self, outputs: Tensor) -> None:
        """Add one chunk of raw outputs ``[E, n, H]`` of all experts."""

    def _add(self, features: Tensor, weight: int = 1, *, from_first: bool = False) -> None:
        """Add ``weight`` times the Gram matrix of float32 features ``[E, D]``.

        Args:
            features: some columns at a time are copied to float64, always to the same memory: on
                a CPU, more or fresh memory costs as much as half of the products.
            weight: of this matrix.
            from_first: subtract the features of expert 0 from all.
        """
        count, half = len(features), len(features) // 2
        limit = min(_COLUMNS_BYTES, working_bytes(features.device))
        width = min(max(1, limit // (8 * count)), features.shape[1])
        memory = torch.empty(count * width, dtype=torch.float64, device=features.device)
        for columns in torch.split(features, width, dim=1):
            doubled = memory[: columns.numel()].view(columns.shape).copy_(columns)
            if from_first:
                doubled -= doubled[0].clone()
            self.gram[:half].add_(_products(doubled[:half], doubled), alpha=weight)
            self.gram[half:, half:].add_(_products(doubled[half:], doubled[half:]), alpha=weight)
        self.gram[half:, :half] = self.gram[:half, half:].T  # G is symmetric

    def merge(self, other: Self) -> Self:
        """The sums over both sets of tokens; associative, neither operand changes."""
        merged = type(self)(len(self.gram), self.gram.device)
        merged.gram = self.gram + other.gram.to(self.gram.device)
        merged.tokens = self.tokens + other.tokens
        if self.routed is not None and other.routed is not None:
            merged.routed = self.routed.merge(other.routed)
        return merged

    def similarity(self) -> Tensor:
        """The matrix: ``[E, E]`` float32 on the CPU, symmetric, in [0, 1], diagonal 1.

        Raises:
            SereError: no chunk was long enough to count.
        """
        if self.tokens < self.min_tokens:
            raise SereError(
                f"calibration saw {self.tokens} usable tokens, this metric needs at least "
                f"{self.min_tokens}; give more text"
            )
        matrix = self._matrix().cpu()
        matrix = ((matrix + matrix.T) / 2).clamp(0.0, 1.0).float()
        return matrix.fill_diagonal_(1.0)

    @abstractmethod
    def _matrix(self) -> Tensor:
        """``[E, E]`` float64 from the sums; the diagonal is overwritten."""


class FrobeniusSums(Sums):
    """S_ij = 1 - d_ij / max d with d_ij = ||A_i - A_j||_F (SERE, arXiv 2602.07616).

    Streams by d_ij^2 = G_ii + G_jj - 2 G_ij. A threshold on S is relative to the layer. If all
    experts are equal, S = 1.
    """

    def update(self, outputs: Tensor) -> None:
        """Add one chunk of raw outputs ``[E, n, H]`` of all experts."""
        # Distances do not change if one expert's output is subtracted from all of them, and
        # what experts have in common no longer eats digits; equal experts give exactly 0.
        self._add(outputs.float().flatten(1), from_first=True)
        self.tokens += outputs.shape[1]

    def _matrix(self) -> Tensor:
        norms = self.gram.diagonal()
        squares = norms[:, None] + norms[None, :] - 2 * self.gram
        distance = squares.fill_diagonal_(0).clamp_min(0).sqrt()
        largest = distance.max()
        if not largest > 0:
            return torch.ones_like(distance)
        matrix: Tensor = 1 - distance / largest
        return matrix


class CosineSums(Sums):
    """S_ij = (mean over tokens of cos(A_i[t], A_j[t]) + 1) / 2; a zero output has cosine 0."""

    def update(self, outputs: Tensor) -> None:
        """Add one chunk of raw outputs ``[E, n, H]`` of all experts."""
        rows = outputs.float()
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        unit = rows / length.masked_fill(length == 0, 1)
        self._add(unit.flatten(1))
        self.tokens += outputs.shape[1]

    def _matrix(self) -> Tensor:
        return (self.gram / self.tokens + 1) / 2


class CkaSums(Sums):
    """Minibatch linear CKA (Nguyen, Raghu, Kornblith 2021, arXiv 2010.15327, eq. 2 and 3).

    S_ij = H_ij / sqrt(H_ii H_jj), H_ij = sum over chunks of n (n - 3) HSIC_1(K_i, K_j), with
    K_i = A_i A_i^T ``[n, n]`` and HSIC_1 the unbiased estimator of Song et al. 2012. In the form
    of Szekely and Rizzo 2014, n (n - 3) HSIC_1(K, L) = <U(K), U(L)>, where U sets the diagonal to
    0 and, off it, subtracts row and column sums / (n - 2) and adds the total / ((n - 1)(n - 2)).
    U is a projection, so with diagonals of 0, row sums k, l and totals s, t,
    <U(K), U(L)> = <K, L> - 2 k l / (n - 2) + s t / ((n - 1)(n - 2)): K is needed only in tiles.
    Chunks have 1,024 tokens, so that the factor n (n - 3) cancels; a short last chunk counts by its
    number of token pairs, and one of fewer than 4 tokens not at all.
    """

    fixed_chunks = True
    min_tokens = 4

    def update(self, outputs: Tensor) -> None:
        """Add one chunk of raw outputs ``[E, n, H]`` of all experts."""
        count = outputs.shape[1]
        # U does not depend on the mean token; without it float32 products are precise enough.
        centred = outputs.float() - outputs.mean(dim=1, keepdim=True, dtype=torch.float32)
        size = max(1, math.isqrt(working_bytes(outputs.device) // (4 * len(outputs))))
        for top in range(0, count, size):
            for left in range(top, count, size):
                tile = centred[:, top : top + size] @ centred[:, left : left + size].mT
                if left == top:
                    tile.diagonal(dim1=1, dim2=2).zero_()
                self._add(tile.flatten(1), weight=1 if left == top else 2)  # K is symmetric
        # a full row of the centred kernel sums to 0: without its diagonal, to minus that
        rows = -centred.square().sum(dim=2).double()
        total = rows.sum(dim=1)
        self.gram -= rows @ rows.T * (2 / (count - 2))
        self.gram += total[:, None] * total / ((count - 1) * (count - 2))
        self.tokens += count

    def _matrix(self) -> Tensor:
        norm = self.gram.diagonal().sqrt()
        scale = norm[:, None] * norm[None, :]
        return torch.where(scale > 0, self.gram / scale, 0.0)


class CkaExact(Sums):
    """Linear CKA over all tokens at once, ||A_j^T A_i||_F^2 / (||A_i^T A_i||_F ||A_j^T A_j||_F).

    A is centred over tokens (Kornblith et al. 2019). Holds every output, so it is for small
    models: see :func:`check_exact_fits`.
    """

    def __init__(self, num_experts: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_experts, device)
        self.outputs: list[Tensor] = []

    def update(self, outputs: Tensor) -> None:
        """Keep one chunk of raw outputs ``[E, n, H]`` of all experts."""
        self.outputs.append(outputs.float().cpu())
        self.tokens += outputs.shape[1]

    def merge(self, other: Self) -> Self:
        """Sums that hold the outputs of both, in this order."""
        merged = super().merge(other)
        merged.outputs = self.outputs + other.outputs
        return merged

    def _matrix(self) -> Tensor:
        outputs = torch.cat(self.outputs, dim=1)
        outputs -= outputs.double().mean(dim=1, keepdim=True)
        count = len(outputs)
        squares = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            left = outputs[i].double().T
            for j in range(i, count):
                squares[i, j] = squares[j, i] = (left @ outputs[j].double()).square().sum()
        norm = squares.diagonal().sqrt()
        scale = norm[:, None] * norm[None, :]
        return torch.where(scale > 0, squares / scale, 0.0)


_SUMS: dict[str, type[Sums]] = {
    "frobenius": FrobeniusSums,
    "cosine": CosineSums,
    "cka": CkaSums,
    "cka-exact": CkaExact,
}


def make_sums(
    metric: str,
    num_experts: int,
    device: torch.device | str = "cpu",
    statistics: tuple[str, ...] = (),
) -> Sums:
    """Empty sums of a metric, and of groups of further statistics.

    Raises:
        SereError: there is no such metric or group, or both do not go together.
    """
    if metric not in _SUMS:
        raise SereError(f"metric = {metric!r}: must be one of {', '.join(_SUMS)}")
    check_groups(statistics)
    sums = _SUMS[metric](num_experts, device)
    if statistics and sums.fixed_chunks:
        raise SereError(
            f"metric = {metric!r}: looks at chunks of tokens without their choices, which "
            "--statistics needs; use frobenius or cosine"
        )
    sums.routed = RoutedSums(statistics) if statistics else None
    return sums


def check_exact_fits(layers: int, num_experts: int, tokens: int, hidden_size: int) -> None:
    """Refuse ``cka-exact`` where the float32 outputs of all layers would exceed 4 GiB.

    Raises:
        SereError: names the size and what to do.
    """
    size = layers * num_experts * tokens * hidden_size * 4
    if size > EXACT_LIMIT_BYTES:
        raise SereError(
            f"metric = 'cka-exact' would hold {size / 2**30:.1f} GiB ({layers} layers x "
            f"{num_experts} experts x {tokens} tokens x {hidden_size} x 4 bytes), at most "
            f"{EXACT_LIMIT_BYTES / 2**30:.0f} GiB is allowed; use 'cka' or fewer tokens"
        )
