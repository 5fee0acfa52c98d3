"""The comparison rules and ``margin`` once more, in plain Python: what tests hold them to."""

import dataclasses
import math

import numpy as np

from sere_ray.rules.gate import PLAIN
from tests.rules import rivals_oracle
from tests.rules.plain import ranked

REROUTABLE, PADDING = 1, 0


def apply(name, ids, weights, scores, kinds, layer):
    """Per row the ids and weights of a rule."""
    rows = [
        kind == REROUTABLE and all(0 <= e < layer.num_experts for e in row)
        for kind, row in zip(kinds, ids, strict=True)
    ]
    if name == "none":
        return list(zip(ids, weights, strict=True))
    if name == "topk":
        return [
            _truncate(*row, layer.select_top_k) if change else row
            for row, change in zip(zip(ids, weights, strict=True), rows, strict=True)
        ]
    anyway = {
        e
        for row, change, kind in zip(ids, rows, kinds, strict=True)
        for e in row
        if not change and kind != PADDING and 0 <= e < layer.num_experts
    }
    chosen = [
        (i, w, p) for i, w, p, change in zip(ids, weights, scores, rows, strict=True) if change
    ]
    whole = {**rivals_oracle.RULES, "spare": _spare}
    if name in whole:
        changed = iter(whole[name](chosen, anyway, layer))
        return [
            next(changed) if change else (i, w)
            for i, w, change in zip(ids, weights, rows, strict=True)
        ]
    kept = anyway | _KEPT[name](chosen, anyway, layer)
    if name != "margin":
        layer = dataclasses.replace(layer, beta=1.0, fill=1.0, gate=PLAIN)
    return [
        _refill(i, w, p, kept, layer) if change else (i, w)
        for i, w, p, change in zip(ids, weights, scores, rows, strict=True)
    ]


def _truncate(ids, weights, size):
    best = ranked(ids, weights)[:size]
    scale = sum(weights) / sum(weights[slot] for slot in best)
    return (
        [e if slot in best else -1 for slot, e in enumerate(ids)],
        [w * scale if slot in best else 0.0 for slot, w in enumerate(weights)],
    )


def _first(rows, count):
    return {ids[slot] for ids, weights, _ in rows for slot in ranked(ids, weights)[:count]}


def _fill_up(kept, candidates, worth, count):
    """``kept`` and the candidates of most worth until there are ``count``."""
    for e in sorted(candidates - kept, key=lambda e: (-worth[e], e)):
        if len(kept) >= count:
            break
        kept = kept | {e}
    return kept


def _oea(rows, anyway, layer):
    return _first(rows, layer.select_top_k)


def _xshare(rows, anyway, layer):
    everyone = range(layer.num_experts)
    worth = [sum(p[e] for _, _, p in rows) for e in everyone]
    kept = anyway | _first(rows, 1)
    if layer.max_per_rank is None:
        return _fill_up(kept, set(everyone), worth, layer.experts)
    for e in sorted(set(everyone) - kept, key=lambda e: (-worth[e], e)):
        on_its_rank = sum(_rank(layer, other) == _rank(layer, e) for other in kept)
        if len(kept) < layer.experts and on_its_rank < layer.max_per_rank:
            kept = kept | {e}
    return kept


def _rank(layer, e):
    return 0 if layer.owner is None else int(layer.owner[e])


def _lynx(rows, anyway, layer):
    worth = [0.0] * layer.num_experts
    for ids, _, p in rows:
        best = max(math.log(p[e]) for e in ids)
        for e in ids:
            level = math.floor(layer.alpha * (math.log(p[e]) - best))
            worth[e] += layer.base ** min(max(level, -layer.depth), 0)
    return _fill_up(anyway | _first(rows, 1), set(range(layer.num_experts)), worth, layer.experts)


def _units(values, scale):
    """Scaled, within 2^28 of 0."""
    with np.errstate(all="ignore"):
        found = [float(np.float32(value) * scale) for value in values]
    return [0 if math.isnan(x) else round(min(max(x, -(2.0**28)), 2.0**28)) for x in found]


def _allowed(ids, layer):
    size = layer.gate.group_size or layer.num_experts
    return {e for e in range(layer.num_experts) if e // size in {own // size for own in ids}}


def _ranks(ids, p, gate):
    """Score units, and what the gate ranks by in these units."""
    with np.errstate(all="ignore"):
        scale = np.float32(2**22) / np.float32(max(p[e] for e in ids))
    units = _units(p, scale)
    if gate.bias is None:
        return units, units
    if gate.scoring == "softmax":
        scale = np.float32(sum(units))
    return units, [u + b for u, b in zip(units, _units(gate.bias.tolist(), scale), strict=True)]


def _demand(rows, layer):
    worth = [0] * layer.num_experts
    for ids, weights, p in rows:
        first = ids[weights.index(max(weights))]
        units, ranks = _ranks(ids, p, layer.gate)
        others = sorted((ranks[e] for e in _allowed(ids, layer) if e not in ids), reverse=True)
        others = others[: layer.runners_up]
        count = max(len(others), 1)
        total = np.float32(max(sum(units[e] for e in ids), 1)) * np.float32(count)
        for e in ids:
            lead = np.float32(max(count * ranks[e] - sum(others), 0)) / total
            lead = min(lead, np.float32(2))
            if layer.lead is not None and layer.lead < 1:
                share = np.float32(units[e]) / np.float32(max(sum(units[e] for e in ids), 1))
                lead = np.float32(layer.lead) * lead + np.float32(1 - layer.lead) * share
            counts = 8 if _drops_first(layer) and e == first else 1
            worth[e] += counts * round(float(lead * lead * np.float32(2**20)))
    return worth


def _drops_first(layer):
    return layer.balance_ranks and layer.gate.is_plain


def _margin(rows, anyway, layer):
    worth = _demand(rows, layer)
    named = {e for ids, _, _ in rows for e in ids}
    first, least = anyway | _first(rows, 1), round(layer.tau * 2**20)
    kept = first | {e for e in named if worth[e] > least}
    if layer.balance_ranks:
        first = anyway if _drops_first(layer) else first
        worth = [min(w, 2**20 + 1) for w in worth]
        kept = first | (_levels(first, worth, least, layer) & named)
    kept = _fill_up(kept, named, worth, max(layer.min_primary_experts, 1))
    return _guarded(kept, named, worth, layer)


def _guarded(kept, named, worth, layer):
    """Everything that is named, where more is given up than ever in calibration."""
    lost = sum(worth[e] for e in named - kept)
    return kept | named if layer.guard and layer.most is not None and lost > layer.most else kept


def _levels(first, worth, least, layer):
    """Experts of the levels that stay; a level has the n-th expert of every rank."""
    ranks = {}
    for e in sorted(range(layer.num_experts), key=lambda e: (e not in first, -worth[e], e)):
        ranks.setdefault(_rank(layer, e), []).append(e)
    stay = set()
    for n in range(max(map(len, ranks.values()))):
        level = {of_rank[n] for of_rank in ranks.values() if n < len(of_rank)}
        if level & first or sum(worth[e] for e in level) > least:
            stay |= level
    return stay


def _spare(rows, anyway, layer):
    """From the most demanded to the least: kept unless a kept one stands in well enough."""
    least_losses = sorted(map(min, layer.statistics["directed_loss"].tolist()))
    stands_in = least_losses[(len(least_losses) - 1) // 2] < 0.5
    usual = {"lead": 0.0, "limit": 1.0, "protect": False}
    if not stands_in:
        usual = {"lead": 1.0, "limit": 0.0, "protect": True}
    left_out = {k: v for k, v in usual.items() if getattr(layer, k) is None}
    layer = dataclasses.replace(layer, **left_out, balance_ranks=False)
    named = {e for ids, _, _ in rows for e in ids} | anyway
    must = anyway | (_first(rows, 1) if layer.protect else set())
    worth = [min(w, 2**20) for w in _demand(rows, layer)]
    least, loss = round(layer.tau * 2**20), layer.statistics["directed_loss"].tolist()
    kept = set()
    for e in sorted(named, key=lambda e: (e not in must, -worth[e], e)):
        losses = [
            round(min(max(loss[e][v], 0.0), 1.0) * 256) for v in kept if loss[e][v] <= layer.limit
        ]
        if e in must or worth[e] * min([256, *losses]) > least * 256:
            kept.add(e)
    kept = _fill_up(kept, named, worth, max(layer.min_primary_experts, 1))
    kept = _guarded(kept, named, worth, layer)
    return [_stand_in(*row, kept, layer) for row in rows]


def _stand_in(ids, weights, p, kept, layer):
    loss, scale = (layer.statistics[f"directed_{n}"].tolist() for n in ("loss", "scale"))
    slots = []
    for u, w in zip(ids, weights, strict=True):
        v = u if u in kept else min(sorted(kept), key=lambda v, u=u: loss[u][v])
        factor = 1.0 if u in kept else scale[u][v] if loss[u][v] <= layer.limit else 0.0
        slots.append((v, w * factor) if factor else (-1, 0.0))
    if all(e < 0 for e, _ in slots):
        best = max(sorted(kept), key=lambda e: p[e])
        slots[0] = (best, sum(weights))
    return rivals_oracle.merged(slots)


_KEPT = {"oea": _oea, "xshare": _xshare, "lynx": _lynx, "margin": _margin}


def _refill(ids, weights, p, kept, layer):
    if all(e in kept for e in ids):
        return ids, weights
    ranks = p if layer.gate.is_plain else _ranks(ids, p, layer.gate)[1]
    own = sorted((e for e in ids if e in kept), key=lambda e: (-ranks[e], e))
    others = (kept & _allowed(ids, layer)) - set(ids)
    taken = (own + sorted(others, key=lambda e: (-ranks[e], e)))[: len(ids)]
    shares = [p[e] if e in ids else layer.fill * p[e] for e in taken]
    scale = sum(shares) ** layer.beta * sum(p[e] for e in ids) ** (1 - layer.beta)
    if sum(shares) == 0:
        shares, scale = [1.0] * len(taken), len(taken)
    dropped = len(ids) - len(taken)
    return (
        taken + [-1] * dropped,
        [share * sum(weights) / scale for share in shares] + [0.0] * dropped,
    )
