"""Files of masks with random routers, for tests of what is done with them."""

import torch

from sere_ray.masks.artifact import Level, MasksArtifact, MasksMetadata


def make_masks(shapes, fingerprints, *, top_k, levels=2, seed=0, **changes):
    """Masks whose level L keeps about 3 / 4, then 1 / 2 of the slots of random rows.

    Args:
        shapes: decoder layer index -> ``(E, H)``.
        fingerprints: decoder layer index -> that of the gate.
        top_k: K.
        levels: how many.
        seed: of the routers.
        changes: other metadata.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for level in range(1, levels + 1):
        of_level = {}
        for layer, (experts, width) in sorted(shapes.items()):
            mask = torch.randn(experts, width, generator=generator)
            # experts that this level never masks
            mask[torch.rand(experts, generator=generator) < 1 - level / levels] = 0.0
            of_level[layer] = mask
        weights[level] = of_level
    metadata = {
        "model_id": "m",
        "num_experts": next(iter(shapes.values()))[0],
        "top_k": top_k,
        "router_fingerprint": fingerprints,
        "levels": [
            Level(knob=n, slots_kept=1 - n / 10, experts_kept=1 - n / 20, kl_mean=n / 100)
            for n in range(1, levels + 1)
        ],
        "keep_first": True,
        "penalty": "rows",
        "batch": 4,
        "balance": 0.0,
        "tokens": 64,
        "dataset": "text.jsonl",
        "date": "2026-12-01T00:00:00+00:00",
    }
    return MasksArtifact(weights, MasksMetadata(**(metadata | changes)))
