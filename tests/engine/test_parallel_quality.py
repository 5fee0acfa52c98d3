"""What several CPU ranks think is what one thinks: log-probabilities along given answers."""

import random

import numpy as np
import pytest
import torch

from sere_ray.engine.control import set_policy
from sere_ray.policy.policy import Policy
from sere_ray.util.ports import free_port
from tests.engine import forced
from tests.engine.conftest import prompts, running_engine, sere_key
from tests.engine.ranks import run_forced, run_ranks
from tests.models import TOP_K

pytestmark = pytest.mark.engine
REQUESTS = prompts(16, seed=3, length=(5, 30))
POSITIONS = 64


def answers():
    rng = random.Random(4)
    return [[rng.randrange(10, 900) for _ in range(POSITIONS)] for _ in REQUESTS]


def policies(folder):
    key = sere_key(folder, min_primary_experts=0, select_top_k=TOP_K)
    return [key, {**key, "select_top_k": 1}]


def of_one_engine(folder, dtype, settings, **options):
    """Per policy ``[requests, positions, vocabulary]``."""
    found = []
    options |= {"dtype": dtype, **forced.OPTIONS}
    with running_engine(folder, settings[0], **options) as engine:
        for policy in settings:
            set_policy(engine, Policy.parse(policy))
            found.append(forced.log_probs(engine, REQUESTS, answers()))
    return found


def of_tensor_parallel_ranks(folder, dtype, settings, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    return of_one_engine(folder, dtype, settings, **options)


def of_data_parallel_ranks(folder, dtype, dispatch, settings):
    first, second = slice(0, 9), slice(9, None)
    options = {"sere": {**settings[0], "dispatch": dispatch}, "enable_expert_parallel": True}
    options |= {"dtype": dtype, "distributed_executor_backend": "uni"}
    split = [[rows[first], rows[second]] for rows in (REQUESTS, answers())]
    ranks = run_ranks(run_forced, free_port(), folder, options, settings, *split)
    return [torch.from_numpy(np.concatenate(of_ranks)) for of_ranks in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen3_moe")


@pytest.fixture(scope="module")
def alone(folder):
    """Of one engine."""
    return of_one_engine(folder, "float32", policies(folder))


def check_float32(found, alone):
    """Per policy; the first prompt token's row is of the same kind in all engines."""
    for policy, (mine, one) in enumerate(zip(found, alone, strict=True)):
        worst = (mine - one).abs().amax(-1).flatten()
        near = (worst <= 1e-3).float().mean().item()
        print(f"policy {policy}: {near:.2%} within 1e-3, worst {worst.max():.1e}")
        assert near == 1.0  # 99.9 % would do if the others were near-ties in the gate's top-k
    assert (alone[0] - alone[1]).abs().max() > 0.01, "re-routing did nothing"


@pytest.mark.parametrize("dispatch", ["allgather", "all_to_all"])
def test_data_parallel_float32(folder, alone, dispatch):
    check_float32(of_data_parallel_ranks(folder, "float32", dispatch, policies(folder)), alone)


def test_tensor_parallel_float32(folder, alone, monkeypatch):
    settings = policies(folder)
    check_float32(of_tensor_parallel_ranks(folder, "float32", settings, monkeypatch), alone)


@pytest.fixture(scope="module")
def rounded(folder):
    """Of one engine in bf16, at S = K."""
    return of_one_engine(folder, "bfloat16", policies(folder)[:1])[0]


def kl(exact, other):
    """Mean over positions of KL(exact || other), nats: ``[requests]``."""
    return (exact.exp() * (exact - other)).sum(-1).mean(-1)


def check_bf16(mine, one, exact):
    """Several ranks lose no more to bf16 than one does: the mean difference of their KL to
    float32 has zero in its 95 % bootstrap interval over the requests, or is below zero.

    At S = K only: re-routed, one rounded near-tie moves the primary set of a whole batch, so its
    requests are no independent samples.
    """
    of_ranks, of_one = kl(exact, mine).numpy(), kl(exact, one).numpy()
    difference = of_ranks - of_one
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(difference), size=(2000, len(difference)))
    low, high = np.quantile(difference[drawn].mean(1), [0.025, 0.975])
    print(
        f"KL to float32 {of_ranks.mean():.1e}, of one rank {of_one.mean():.1e}, "
        f"difference {difference.mean():.1e} [{low:.1e}, {high:.1e}]"
    )
    assert of_one.mean() < 0.01
    assert low <= 0


@pytest.mark.nightly
def test_data_parallel_bf16(folder, rounded, alone):
    found = of_data_parallel_ranks(folder, "bfloat16", "all_to_all", policies(folder)[:1])
    check_bf16(found[0], rounded, alone[0])


@pytest.mark.nightly
def test_tensor_parallel_bf16(folder, rounded, alone, monkeypatch):
    found = of_tensor_parallel_ranks(folder, "bfloat16", policies(folder)[:1], monkeypatch)
    check_bf16(found[0], rounded, alone[0])
