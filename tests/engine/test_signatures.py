"""Signatures of prompts: counted by rows, bounded, alike where the experts are alike."""

import numpy as np
import pytest

from sere_ray.engine import signatures as module
from sere_ray.engine.signatures import (
    DIMENSIONS,
    PromptRows,
    PromptSignatures,
    counting,
    of_workers,
    project,
    prompt_rows,
    unit,
)


def test_rows_of_prompts():
    """A prompt in two chunks, one that ends here, an answer, one that waits, recomputed answers."""
    found = prompt_rows(
        ["chunk", "ends", "answers", "waits", "again"],
        np.array([8, 30, 12, 0, 5]),
        np.array([64, 40, 12, 9, 10]),
        np.array([0, 16, 26, 27, 27, 35]),
    )
    assert found == [
        PromptRows("chunk", 0, 16, is_whole=False),
        PromptRows("ends", 16, 26, is_whole=True),
        PromptRows("again", 27, 32, is_whole=True),
    ]


def test_a_prompt_is_counted_over_its_steps():
    counted = PromptSignatures(num_layers=2, num_experts=8)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8, (2, 3, 10, 2))  # step, layer (the last is another model's), row, slot
    with counting(counted, [PromptRows("a", 0, 6, is_whole=False)]):
        for layer in range(2):
            counted.add(layer, ids[0, layer])
    assert counted.take() == []
    both = [PromptRows("a", 2, 5, is_whole=True), PromptRows("b", 5, 10, is_whole=True)]
    with counting(counted, both):
        for layer in range(2):
            counted.add(layer, ids[1, layer])
    a, b = counted.take()
    assert (a.request, a.rows, b.request, b.rows) == ("a", 9, "b", 5)
    expected = np.zeros((2, 8), dtype=np.int64)
    for layer in range(2):
        for chosen in (ids[0, layer, :6], ids[1, layer, 2:5]):
            np.add.at(expected[layer], chosen.ravel(), 1)
    assert a.vector == project(expected, 9).tobytes()
    assert counted.take() == []


def test_a_step_without_prompts_counts_nothing():
    counted = PromptSignatures(2, 8)
    with counting(counted, []):
        counted.add(0, np.zeros((4, 2), dtype=np.int64))
    assert counted.take() == []
    with counting(None, []):
        pass


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MOST_OPEN", 4)
    monkeypatch.setattr(module, "MOST_REQUESTS", 3)
    counted = PromptSignatures(1, 8)
    for i in range(10):  # clients that hang up in their prompts
        with counting(counted, [PromptRows(f"open {i}", 0, 1, is_whole=False)]):
            counted.add(0, np.zeros((1, 2), dtype=np.int64))
    assert (len(counted._open), len(counted._rows)) == (4, 4)
    for i in range(10):
        with counting(counted, [PromptRows(f"{i}", 0, 1, is_whole=True)]):
            counted.add(0, np.zeros((1, 2), dtype=np.int64))
    assert [one.request for one in counted.take()] == ["7", "8", "9"]


@pytest.mark.parametrize("shape", [(4, 48), (48, 128), (58, 256)])
def test_the_sketch_keeps_inner_products(shape):
    """Of prompts of two kinds, whose experts are drawn by two gates, for shapes of known models."""
    rng = np.random.default_rng(0)
    gates = [rng.dirichlet(np.full(shape[1], 0.3), shape[0]) for _ in range(2)]

    def counts(gate):
        return np.stack([rng.multinomial(8 * 64, p) for p in gate])

    prompts = [counts(gates[i % 2]) for i in range(8)]
    whole = [unit(np.sqrt(c.ravel()).astype(np.float32)) for c in prompts]
    small = [project(c, 64) for c in prompts]
    errors = [
        np.dot(whole[i], whole[j]) - np.dot(small[i], small[j]) for i in range(8) for j in range(i)
    ]
    assert small[0].shape == (DIMENSIONS,)
    assert np.abs(errors).max() < (1e-5 if np.prod(shape) <= DIMENSIONS else 0.2)
    alike = min(np.dot(small[i], small[j]) for i in range(8) for j in range(i % 2, i, 2))
    others = max(np.dot(small[i], small[j]) for i in range(8) for j in range((i + 1) % 2, i, 2))
    assert alike > others + 0.2


def test_the_sketch_is_the_same_in_every_process():
    counts = np.zeros((48, 128), dtype=np.int64)
    counts[3, 7], counts[40, 100] = 9, 4
    found = project(counts, 9)
    places = np.flatnonzero(found)
    assert places.tolist() == [2, 216]
    assert found[places] == pytest.approx([2 / 13**0.5, 3 / 13**0.5])


def test_answers_of_several_workers():
    def answer(*signatures):
        return {"model": "gates", "signatures": [list(s) for s in signatures]}

    first, second = np.zeros((2, DIMENSIONS), dtype=np.float32)
    first[3], second[9] = 1, 1
    tensor = of_workers([answer(("a", 5, first.tobytes()))] * 2)
    assert tensor.signatures == [("a", 5, first.tobytes())]
    stages = of_workers([answer(("a", 5, first.tobytes())), answer(("a", 5, second.tobytes()))])
    assert stages.signatures == [("a", 5, unit(first + second).tobytes())]
    assert of_workers([None]) is None
    assert of_workers([answer(), None]) is None
