"""The step-time benchmark without an engine: shapes, floor, router, rows, result file, picture."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from sere_ray import assets
from sere_ray.bench import step_time
from sere_ray.bench.arms import arms
from sere_ray.bench.engines import Engines, write_config
from sere_ray.bench.floor import WeightBytes, count_weights, mean_context, step_bytes
from sere_ray.bench.kernel_profile import kernel_rows
from sere_ray.bench.models import PUBLIC, get_model
from sere_ray.bench.plot import draw
from sere_ray.bench.routing import (
    SIGMA,
    Gate,
    check_rows_differ,
    expert_scales,
    simulate_union,
    skew_gates,
)
from sere_ray.bench.step_time import ROW_KEY, Bench, StepTimePlan, measure
from sere_ray.bench.synthetic_masks import synthetic_masks
from sere_ray.calibration.synthetic import synthetic_artifact
from sere_ray.util.errors import SereError
from sere_ray.util.results import check_continues, load_result, write_result


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr(step_time, "on_gpu", lambda: False)


class Block(nn.Module):
    """A layer in vLLM's names: E experts of hidden 8 and width 4, stacked, and a gate."""

    def __init__(self, experts=6):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.gate = nn.Linear(8, experts, bias=False)
        self.mlp.experts = nn.Module()
        self.mlp.experts.w13_weight = nn.Parameter(torch.zeros(experts, 8, 8))
        self.mlp.experts.w2_weight = nn.Parameter(torch.zeros(experts, 8, 4))


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(10, 8)
        self.model.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 10, bias=False)


@pytest.mark.parametrize(
    ("name", "kv_bytes", "layers", "experts", "top_k"),
    [
        ("qwen3-30b-a3b", 2 * 4 * 128 * 48 * 2, 48, 128, 8),
        ("qwen1.5-moe-a2.7b", 2 * 16 * 128 * 24 * 2, 24, 60, 4),
        ("deepseek-v2-lite", 576 * 27 * 2, 26, 64, 6),
    ],
)
def test_public_shapes(tmp_path, name, kv_bytes, layers, experts, top_k):
    model = get_model(name)
    assert model.kv_bytes_per_token == kv_bytes
    assert (model.num_experts, model.top_k) == (experts, top_k)
    artifact = synthetic_artifact(write_config(model, tmp_path))
    assert len(artifact.layers) == layers
    assert artifact.metadata.architecture == PUBLIC[name]["architectures"][0]
    assert (artifact.metadata.num_experts, artifact.metadata.top_k) == (experts, top_k)


def test_weights_that_a_step_reads():
    counted = count_weights(TinyModel().to(torch.bfloat16))
    # two layers, each an expert of 8 x 8 and 8 x 4; gates and lm_head; no input embedding
    assert counted == WeightBytes(per_expert=2 * (64 + 32) * 2, other=(2 * 6 * 8 + 10 * 8) * 2)


def test_floor_counts_experts_weights_and_context():
    weights = WeightBytes(per_expert=1000, other=50_000)
    size = step_bytes(weights, experts_read=2.5, batch=4, context=100, kv_per_token=7)
    assert size == 2500 + 50_000 + 2800
    # a prompt of 10: the steps that make tokens 3, 4, 5, 6 see 12, 13, 14, 15 tokens
    assert mean_context(10, 4) == 13.5


def test_skewed_router_reads_what_was_published():
    gate = Gate(128, 8)
    assert simulate_union(gate, 16, SIGMA, layers=60) == pytest.approx(50, abs=1.5)
    assert simulate_union(gate, 16, 0, layers=60) == pytest.approx(82.4, abs=1.5)
    check_rows_differ(gate, 16, 0, named=80)
    with pytest.raises(SereError, match=r"16 rows named 8.0 experts a layer, simulated are 8[123]"):
        check_rows_differ(gate, 16, 0, named=8)


def test_a_gate_with_groups_chooses_within_the_best_of_them():
    gate = Gate(8, 3, groups=4, groups_taken=2)
    scores = np.array([[5.0, 0, 3, 3, 4, 0, 1, 1], [1, 0, 0, 1, 2, 2, 0, 9]])
    # Groups of two: the sums of the first row are 5, 6, 4, 2; of the second 1, 1, 4, 9.
    assert [sorted(row) for row in gate.choose(scores).tolist()] == [[0, 2, 3], [4, 5, 7]]
    assert simulate_union(get_model("deepseek-v3-fp8").gate, 1, 0, layers=5) == 8


def test_gates_are_scaled_in_place_by_layer():
    model = TinyModel()
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    before = [gate.detach().clone() for gate in gates]
    assert skew_gates(model) == 2
    for layer, (gate, old) in enumerate(zip(gates, before, strict=True)):
        scales = torch.from_numpy(expert_scales(6, layer)).float()
        torch.testing.assert_close(gate.detach(), old * scales[:, None])
    with pytest.raises(SereError, match=r"layers\.N\.mlp\.gate"):
        skew_gates(nn.Linear(2, 2))


def plan(**changes):
    fields = {"model": get_model("demo"), "batches": [1, 2], "repeats": 3, "tokens": 4, **changes}
    return StepTimePlan(**fields)


def test_arms_by_name():
    settings = arms("a.safetensors", get_model("demo"))
    assert [arm.name for arm in plan().timed(settings)] == [arm.name for arm in settings[:-3]]
    assert [arm.name for arm in settings[-3:]] == ["margin", "margin-24", "spare"]
    chosen = plan(arms=("S=1", "off")).timed(settings)
    assert [arm.name for arm in chosen] == ["stock", "off", "S=1"]
    names = "stock, off, observe, S=4, S=2, S=1, margin, margin-24, spare"
    with pytest.raises(SereError, match=f"'S=3' is none of {names}"):
        plan(arms=("S=3",)).timed(settings)


def test_masks_are_there_from_the_start_on_and_followed_in_two_arms():
    settings = arms("a.safetensors", get_model("demo"), "m.safetensors")
    policies = {arm.name: arm.policy for arm in settings if arm.policy}
    assert {policy.masks for policy in policies.values()} == {"m.safetensors"}
    levels = {name: policy.level for name, policy in policies.items() if policy.level}
    assert levels == {"masks": 1, "masks+margin": 1}
    assert policies["masks"].rule == "none"
    assert "masks" in [arm.name for arm in plan(masks=0.7).timed(settings)]


def test_random_masks_keep_the_share_that_is_asked_for():
    masks = synthetic_masks(assets.MODEL, 0.75)
    rows = torch.randn(500, 128)
    shares = [(rows @ weight.T >= 0).float().mean() for weight in masks.weights[1].values()]
    assert torch.stack(shares).mean() == pytest.approx(0.75, abs=0.02)
    with pytest.raises(SereError, match=r"--masks = 0.4: must be 0.5 to 1"):
        synthetic_masks(assets.MODEL, 0.4)


def test_a_wrong_plan_is_refused_before_an_engine_starts():
    def save(content):
        raise AssertionError

    for wrong in ({"arms": ("S=9",)}, {"routers": ("skewed",)}):
        with pytest.raises(SereError, match=r"--(arms|router)"):
            measure(plan(**wrong), console=Console(), save=save)


@pytest.fixture
def bench(monkeypatch):
    """A bench of engines that take 8 ms a step, or S with re-routing, and read as many experts.

    ``margin`` reads 4 experts, 2.5 beyond a tau of 0.01 and 1 beyond 0.1.
    """

    def reads(policy):
        if policy.rule == "margin":
            return 4 if policy.tau < 0.01 else 2.5 if policy.tau < 0.1 else 1
        return policy.select_top_k

    def set_policy(engine, policy):
        engine.policy = policy

    def read_counters(engine, reset=True):
        after = [reads(engine.policy)] * 2
        return {"decode_only": {"steps": 1, "experts_before": [8, 8], "experts_after": after}}

    def decode_steps(engine, model, batch, tokens, seed):
        policy = getattr(engine, "policy", None)
        step = reads(policy) if policy and policy.mode == "on" else 8 - getattr(engine, "slower", 0)
        yield from (number * step / 1e3 for number in range(tokens + 1))

    for function in (set_policy, read_counters, decode_steps):
        monkeypatch.setattr(step_time, function.__name__, function)

    def make(plan, floor=None):
        stock = {
            name: SimpleNamespace(slower=i) for i, name in enumerate(plan.model.stock_back_ends)
        }
        engines = Engines(stock, SimpleNamespace(), [])
        kernels = {name: name.title() for name in (*stock, "sere")}
        return Bench(plan, engines, arms("a.safetensors", plan.model), kernels, floor)

    return make


def test_rows(bench):
    chosen = plan(arms=("off", "S=2"))
    rows = step_time._measure_batch(
        bench(chosen, lambda batch, experts: batch * experts),
        "uniform",
        2,
        random.Random(0),
        lambda: None,
    )
    assert [row["arm"] for row in rows] == ["stock", "off", "S=2"]
    assert [row["step_ms"] for row in rows] == [8, 8, 2]
    assert [row["step_ms_mean"] for row in rows] == [8, 8, 2]
    assert [row["speedup"] for row in rows] == [1, 1, 4]
    assert [row["experts_read"] for row in rows] == [8, 8, 2]  # stock's from `observe`, not timed
    assert [row["floor_ms"] for row in rows] == [16, 16, 4]
    assert {row["repeats"] for row in rows} == {3}


def test_stock_is_its_fastest_back_end(bench):
    chosen = plan(arms=("S=2",), model=get_model("gpt-oss-120b"))
    rows = step_time._measure_batch(bench(chosen), "uniform", 2, random.Random(0), lambda: None)
    assert [row["arm"] for row in rows] == ["stock", "stock, marlin", "S=2"]
    assert [row["step_ms"] for row in rows] == [8, 7, 2]
    assert [row["speedup"] for row in rows] == [0.875, 1, 3.5]
    assert [row["experts_kernel"] for row in rows] == ["Auto", "Marlin", "Sere"]
    assert {row["stock_experts_kernel"] for row in rows} == {"Marlin"}


def test_a_budget_is_kept_with_the_smallest_tau(bench):
    row = step_time._measure_batch(
        bench(plan(arms=("margin-24",))), "uniform", 2, random.Random(0), lambda: None
    )[-1]
    assert (row["arm"], row["tau"], row["experts_read"]) == ("margin-24", 0, 4)


def test_margin_is_timed_with_a_tau_that_reads_like_s2(bench):
    row = step_time._measure_batch(
        bench(plan(arms=("margin",))), "uniform", 2, random.Random(0), lambda: None
    )[-1]
    assert row["arm"] == "margin"
    assert 0.07 < row["tau"] < 0.1
    assert (row["experts_read"], row["step_ms"]) == (2.5, 2.5)


def test_rows_are_saved_after_every_batch(bench):
    saved = []
    step_time._measure(bench(plan()), Console(quiet=True), lambda rows: saved.append(len(rows)))
    assert saved == [6, 12]
    assert (
        "floor_ms"
        not in step_time._measure_batch(
            bench(plan()), "uniform", 1, random.Random(0), lambda: None
        )[0]
    )


def test_appended_rows_replace_their_like(tmp_path):
    path = tmp_path / "result.json"

    def row(batch, value):
        return {"model": "m", "router": "uniform", "batch": batch, "arm": "S=1", "step_ms": value}

    write_result(
        path, {"copy_gb_per_s": [1.0], "rows": [row(1, 5), row(2, 6)]}, command=["one", "run"]
    )
    onto = load_result(path)
    check_continues(onto)
    more = {"copy_gb_per_s": [2.0], "rows": [row(2, 7), row(4, 8)]}
    for _ in range(2):  # saved after every batch: the same rows come again
        write_result(path, more, command=["two"], onto=onto, row_key=ROW_KEY)
    merged = load_result(path)
    assert merged["command"] == "one run && two"
    assert merged["copy_gb_per_s"] == [1.0, 2.0]
    assert [(r["batch"], r["step_ms"]) for r in merged["rows"]] == [(1, 5), (2, 7), (4, 8)]
    with pytest.raises(SereError, match="--append: the file's commit is 'other'"):
        check_continues({**onto, "commit": "other"})


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}'])
def test_what_is_no_result_file(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(SereError, match=r"result\.json"):
        load_result(path)


def test_kernels_of_a_profile():
    def event(name, microseconds, count, device="CUDA"):
        return SimpleNamespace(
            key=name,
            self_device_time_total=microseconds,
            count=count,
            device_type=SimpleNamespace(name=device),
        )

    events = [event("small", 100.0, 20), event("launch", 9e9, 1, "CPU"), event("x" * 999, 5e4, 480)]
    first, second = kernel_rows(events)
    assert (first["ms_per_step"], first["calls_per_step"], len(first["name"])) == (5, 48, 160)
    assert second == {"name": "small", "ms_per_step": 0.01, "calls_per_step": 2}


def test_picture(tmp_path, bench):
    saved = []
    step_time._measure(bench(plan(), lambda *_: 1.0), Console(quiet=True), saved.append)
    path = tmp_path / "result.json"
    write_result(path, {"rows": json.loads(json.dumps(saved[-1]))})
    document = load_result(path)
    draw(document, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw(document, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(SereError, match=r"\.png or \.svg"):
        draw(document, tmp_path / "a.pdf")
    with pytest.raises(SereError, match="not a result of"):
        draw({**document, "rows": [{"model": "m"}]}, tmp_path / "b.png")
