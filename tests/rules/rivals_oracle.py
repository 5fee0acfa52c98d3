"""ExFold, k1 of k2, ACE and MoNE once more, row by row in plain Python."""

from tests.rules.plain import ranked

UNSEEN = 1e30


def exfold(rows, anyway, layer):
    """Rows are (ids, weights, scores); returns new (ids, weights)."""
    norms = layer.statistics["output_norm"].tolist()
    scale = layer.statistics["stand_in_scale"].tolist()
    loss = layer.statistics["stand_in_loss"].tolist()
    importance = {}
    for ids, weights, _ in rows:
        for e, w in zip(ids, weights, strict=True):
            importance[e] = importance.get(e, 0.0) + w * norms[e]
    kept = set(anyway)
    for e in sorted(importance, key=lambda e: (-importance[e], e)):
        if len(kept) >= layer.experts:
            break
        kept.add(e)
    out = []
    for ids, weights, _ in rows:
        slots = []
        for u, w in zip(ids, weights, strict=True):
            v = u if u in kept else min(sorted(kept), key=lambda v, u=u: loss[u][v])
            factor = 1.0 if u in kept else scale[u][v] if loss[u][v] < UNSEEN else 0.0
            slots.append((v, w * factor) if factor else (-1, 0.0))
        out.append(merged(slots))
    return out


def merged(slots):
    """Slots of one expert become one: the heaviest, of equal ones the first, has their sum."""
    ids, weights = [e for e, _ in slots], [w for _, w in slots]
    for e in {e for e in ids if e >= 0 and ids.count(e) > 1}:
        same = [i for i, other in enumerate(ids) if other == e]
        best = max(same, key=lambda i: (weights[i], -i))
        total = sum(weights[i] for i in same)
        for i in same:
            ids[i], weights[i] = (e, total) if i == best else (-1, 0.0)
    return ids, weights


def k1k2(rows, anyway, layer):
    out = []
    for ids, weights, p in rows:
        if layer.select_top_k >= len(ids):
            out.append((ids, weights))
            continue
        best = ranked(ids, weights)[: layer.select_top_k]
        mass = sum(sorted(p, reverse=True)[: layer.normalise_over])
        out.append(
            (
                [e if i in best else -1 for i, e in enumerate(ids)],
                [p[e] / mass * sum(weights) if i in best else 0.0 for i, e in enumerate(ids)],
            )
        )
    return out


def ace(rows, anyway, layer):
    views = [layer.statistics[name].tolist() for name in ("ace_gsp", "ace_rcr")]
    out = []
    for ids, weights, _ in rows:
        shares = []
        for view in views:
            worth = [w * view[e] for e, w in zip(ids, weights, strict=True)]
            shares.append([x / (sum(worth) + 1e-8) for x in worth])
        best = {weights.index(max(weights))}
        for i in range(len(ids)):
            low = shares[0][i] < layer.tau and layer.rcr_scale * shares[1][i] < layer.tau
            best |= set() if low else {i}
        scale = sum(weights) / sum(weights[i] for i in best)
        out.append(
            (
                [e if i in best else -1 for i, e in enumerate(ids)],
                [w * scale if i in best else 0.0 for i, w in enumerate(weights)],
            )
        )
    return out


def mone(rows, anyway, layer):
    score = layer.statistics["novice_score"].tolist()
    kept = sorted(range(len(score)), key=lambda e: (-score[e], e))[: layer.experts]
    return [
        (
            [e if e in kept else -1 for e in ids],
            [w if e in kept else 0.0 for e, w in zip(ids, weights, strict=True)],
        )
        for ids, weights, _ in rows
    ]


RULES = {"exfold": exfold, "k1k2": k1k2, "ace": ace, "mone": mone}
