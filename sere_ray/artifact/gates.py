"""Where a mixture-of-experts block keeps its gate, and how two gates are told to be the same: one
answer for calibration and for engines."""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from sere_ray.util.errors import ArtifactError

if TYPE_CHECKING:  # the policy actor compares fingerprints, and does without torch
    from torch import Tensor, nn

_NAMES = ("gate", "router")
"""Of the gate beside a block's experts, in transformers and in vLLM."""


def find_gate(block: "nn.Module") -> "nn.Module | None":
    """The gate beside a block's experts; None where there is none under a known name.

    Args:
        block: the module that holds the experts, of transformers or of vLLM.
    """
    from torch import nn

    found = (getattr(block, name, None) for name in _NAMES)
    return next((gate for gate in found if isinstance(gate, nn.Module)), None)


def gate_weight(gate: "nn.Module") -> "Tensor | None":
    """The weight ``[E, H]`` of a gate: its own, or that of its only matrix (Hunyuan's ``gate.wg``,
    Granite's ``router.layer``); None where it has another number of them."""
    from torch import Tensor

    weights = [getattr(module, "weight", None) for module in gate.modules()]
    matrices = [w for w in weights if isinstance(w, Tensor) and w.dim() == 2]
    return matrices[0] if len(matrices) == 1 else None


HASH_LENGTH = 32
"""Hexadecimal digits of a fingerprint's hash, which was all of it in artifacts of format 1."""
_SKETCH = 16
_TOLERANCE = 2.0**-22
"""float16 moves numbers below 2^-14 by at most 2^-25, at random, and a sketch by about 2^-26.
Numbers of a gate that was trained on differ by 2^-13 and more."""


def router_fingerprint(weight: "Tensor") -> str:
    """What tells a gate ``[E, H]`` from those of other fine-tunes, whatever type holds it.

    A hash of its bf16 values, ``-``, and a sketch: 16 sums of these values with random signs over
    the square root of their number. Quantised builds leave gates alone, so the hash is theirs, too;
    builds in float16 move the smallest values, which the sketch forgives.
    """
    import torch

    values = weight.detach().to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(values.view(torch.int16).numpy().tobytes()).hexdigest()
    numbers = values.flatten().double().numpy()
    # RandomState's stream is frozen: every version of numpy draws the same signs.
    signs = np.random.RandomState(0).randint(0, 2, (_SKETCH, len(numbers)), np.int8) * 2 - 1
    sums = (signs @ numbers / np.sqrt(len(numbers))).astype("<f4")
    return f"{digest[:HASH_LENGTH]}-{base64.b64encode(sums.tobytes()).decode()}"


def same_gate(first: str, second: str) -> bool:
    """Whether two fingerprints are of the same gate; one may be of format 1, a hash alone."""
    if first[:HASH_LENGTH] == second[:HASH_LENGTH]:
        return True
    sketches = [_sketch_of(fingerprint) for fingerprint in (first, second)]
    if any(len(sketch) != _SKETCH for sketch in sketches):
        return False
    return bool(np.abs(sketches[0] - sketches[1]).max() <= _TOLERANCE)


def other_gates(
    first: Mapping[int, str], second: Mapping[int, str], layers: Iterable[int]
) -> Iterator[tuple[str, str | None, str | None]]:
    """What differs, and both short forms, of each layer whose fingerprints are of two gates.

    Args:
        first: fingerprint by layer; a layer may be missing.
        second: the other side's.
        layers: to compare.
    """
    for layer in layers:
        gates = [prints.get(layer, "") for prints in (first, second)]
        if not same_gate(*gates):
            short, other = (gate[:HASH_LENGTH] or None for gate in gates)
            yield f"router fingerprint of layer {layer}", short, other


def check_gate(
    layer: int, weight: "Tensor", expected: Mapping[int, str], *, path: str, other: str
) -> None:
    """Refuse a gate that is not the one which a file was made for.

    Args:
        layer: decoder layer index.
        weight: ``[E, H]`` of the loaded model.
        expected: fingerprint of each layer, of the file's metadata.
        path: of the file, for the message.
        other: what a difference means and what to do, for the message.

    Raises:
        ArtifactError: the fingerprint differs, or the file has none of this layer.
    """
    of_file, found = expected.get(layer, ""), router_fingerprint(weight)
    if not same_gate(of_file, found):
        raise ArtifactError(
            f"{path}: router fingerprint of layer {layer} is {of_file[:HASH_LENGTH] or 'missing'}, "
            f"but the loaded model has {found[:HASH_LENGTH]}; {other}"
        )


def _sketch_of(fingerprint: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Empty where there is none."""
    try:
        content = base64.b64decode(fingerprint[HASH_LENGTH + 1 :], validate=True)
        return np.frombuffer(content, "<f4").astype(np.float64)
    except ValueError:
        return np.zeros(0)
