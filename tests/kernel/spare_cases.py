"""Batches for ``spare.cuh``: those of ``margin_cases.py`` with statistics of stand-ins."""

import torch
from hypothesis import strategies as st

from .margin_cases import KNOBS, MarginCase, draw_batch, make_margin_case

# (E, K): as for margin; more than one group of 32 stand-ins, or fewer; the most that kernels take.
SHAPES = [(128, 8), (60, 4), (64, 6), (256, 8), (9, 3), (33, 16), (300, 5), (4, 4), (1024, 32)]
# (E, K, groups)
GATED_SHAPES = [(256, 8, 8), (48, 4, 3), (9, 3, 1), (160, 8, 1)]
SPARE_KNOBS = {
    "tau": [0.0, 0.0005, 0.004, 0.02, 0.1, 1.0],
    "runners_up": KNOBS["runners_up"],
    "lead": [None, 0.0, 0.37, 1.0],
    "limit": [None, 0.0, 0.3, 0.8, 1.0],
    "protect": [None, False, True],
    "most": KNOBS["most"],
    "guard": KNOBS["guard"],
}
KINDS_OF_LOSS = ("even", "tied", "similar", "foreign", "chain")


def make_statistics(experts: int, kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Scales of both signs, some 0, and losses.

    Args:
        experts: E.
        kind: ``even`` over 0 to 1; ``tied``, of few values; ``similar``, all below a half;
            ``foreign``, all 1 but a few; ``chain``, each expert stands in for the next alone.
        seed: of everything random.
    """
    g = torch.Generator().manual_seed(seed)
    loss = torch.rand((experts, experts), generator=g)
    if kind == "tied":
        loss = (4 * loss).round() / 4
    elif kind == "similar":
        loss = loss / 2
    elif kind == "foreign":
        loss = torch.where(loss < 0.9, 1.0, loss)
    elif kind == "chain":
        loss = torch.ones_like(loss)
        loss[range(1, experts), range(experts - 1)] = 0.0
    scale = 2.5 * torch.rand((experts, experts), generator=g) - 0.5
    scale[torch.rand((experts, experts), generator=g) < 0.1] = 0.0
    return {"directed_loss": loss.fill_diagonal_(1.0), "directed_scale": scale.fill_diagonal_(1.0)}


def make_spare_case(*, losses: str = "even", seed: int, experts: int, **given) -> MarginCase:
    """As :func:`make_margin_case`, with statistics of :func:`make_statistics`."""
    case = make_margin_case(seed=seed, experts=experts, **given)
    return case._replace(rule="spare", statistics=make_statistics(experts, losses, seed))


@st.composite
def spare_cases(draw, rows=None, **fixed):
    """Random ones of a shape."""
    knobs = {name: draw(st.sampled_from(values)) for name, values in SPARE_KNOBS.items()}
    batch = draw_batch(draw, rows, fixed, losses=st.sampled_from(KINDS_OF_LOSS))
    given = {name: value for name, value in knobs.items() if value is not None}
    return make_spare_case(**batch, **given)
