"""Real vLLM engines on a GPU, full CUDA graphs on: the same promises as on a CPU."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from sere_ray.bench.engines import write_config
from sere_ray.bench.models import get_model, with_layers
from sere_ray.bench.weights import draw_weights
from sere_ray.calibration.synthetic import synthetic_artifact
from sere_ray.engine.control import read_counters, set_policy
from sere_ray.engine.gpu import routing
from sere_ray.engine.gpu.own_rows import OwnRows
from sere_ray.engine.gpu.state import CudaState
from sere_ray.engine.vllm_internals import fill_dummy_weights
from sere_ray.policy.policy import Policy
from sere_ray.rules import PADDING, REROUTABLE, count, sere
from sere_ray.util.errors import UnsupportedError
from tests.engine.conftest import (
    generate,
    prompts,
    running_engine,
    sere_key,
    state_of,
)
from tests.engine.gpu_ranks import NO_MULTICAST, with_stand_ins
from tests.kernel.margin_cases import GPU_MATH, by_reference
from tests.models import TOP_K

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
COUNTERS = ("experts_before", "experts_after", "slots_rerouted", "critical_kept")
COMPILED = {
    "enforce_eager": False,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]},
    "kv_cache_memory_bytes": 1 << 28,
}
"""As vLLM runs by default: piecewise graphs for mixed steps, full ones for decode steps."""
GRAPHS = {
    **COMPILED,
    "compilation_config": {
        "mode": 0,  # no torch.compile: engines start in seconds
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
    },
}

DRAFTS = {
    **GRAPHS,
    "compilation_config": {
        **GRAPHS["compilation_config"],
        "cudagraph_capture_sizes": [4, 8, 16, 32, 48, 64],
    },
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
}
"""Four rows of each request that decodes."""


def tokens_of(folder, policies, **options):
    """Stock's greedy answers, and those of each policy with its counters."""
    options = {**GRAPHS, **options}
    with running_engine(folder, **options) as engine:
        stock, _ = generate(engine, prompts())
    key = sere_key(folder, min_primary_experts=0)
    found = {}
    with running_engine(folder, key, **options) as engine:
        for name, changes in policies.items():
            set_policy(engine, Policy.parse({**key, **changes}))
            read_counters(engine, reset=True)
            answers, _ = generate(engine, prompts())
            found[name] = answers, read_counters(engine)["decode_only"]
    return stock, found


POLICIES = {
    "S=K": {"select_top_k": TOP_K},
    "observe": {"mode": "observe"},
    "off": {"mode": "off"},
    "S=1": {},
}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_moe_64", "qwen2_moe", "deepseek_v2"])
def test_stock_tokens_and_fewer_experts(checkpoint, architecture):
    stock, found = tokens_of(checkpoint(architecture), POLICIES)
    for name in ("S=K", "observe", "off"):
        assert found[name][0] == stock, name
    answers, counts = found["S=1"]
    assert answers != stock
    assert counts["steps"] == 11
    assert counts["decode_rows"] == 8 * 11
    for before, after in zip(counts["experts_before"], counts["experts_after"], strict=True):
        assert 0 < after < before
    same = found["S=K"][1]
    assert same["experts_after"] == same["experts_before"] == found["observe"][1]["experts_before"]
    assert not any(found["off"][1]["experts_before"])


def test_margin_reads_fewer_and_keeps_stocks_tokens_where_it_keeps_all(checkpoint):
    """Live switches between the two rules, too: one engine runs all of them."""
    margin = {"rule": "margin", "select_top_k": None, "tau": 1.0}
    stock, found = tokens_of(
        checkpoint("qwen3_moe_64"),
        {
            "S=1": {},
            "all kept": {**margin, "min_primary_experts": 64},
            "observe": {**margin, "mode": "observe"},
            "firsts": margin,
            "S=K": {"select_top_k": TOP_K},
        },
    )
    for name in ("all kept", "observe", "S=K"):
        assert found[name][0] == stock, name
    counts = {name: of_policy for name, (_, of_policy) in found.items()}
    assert counts["all kept"]["experts_after"] == counts["all kept"]["experts_before"]
    assert not any(counts["all kept"]["slots_rerouted"])
    for name in ("firsts", "observe"):
        assert sum(counts[name]["experts_after"]) < sum(counts[name]["experts_before"])
        assert sum(counts[name]["slots_rerouted"]) > 0
    assert found["firsts"][0] != stock


def test_a_lone_request_is_exact_under_margin(checkpoint):
    folder = checkpoint("qwen3_moe_64")
    with running_engine(folder, **GRAPHS) as engine:
        stock, _ = generate(engine, prompts(1))
    key = {"similarity": sere_key(folder)["similarity"], "rule": "margin", "tau": 1.0}
    with running_engine(folder, key, **GRAPHS) as engine:
        assert generate(engine, prompts(1))[0] == stock


def test_random_fp8_experts(checkpoint, tmp_path):
    """vLLM quantises the gates too, so only random weights go with online quantisation."""
    folder = checkpoint("qwen3_moe")
    similarity = tmp_path / "synthetic.safetensors"
    synthetic_artifact(folder).save(similarity)
    options = {**GRAPHS, "quantization": "fp8", "load_format": "dummy"}
    with running_engine(folder, **options) as engine:
        stock, _ = generate(engine, prompts())
    key = {"similarity": str(similarity), "select_top_k": TOP_K, "min_primary_experts": 0}
    with running_engine(folder, key, **options) as engine:
        assert generate(engine, prompts())[0] == stock
        set_policy(engine, Policy.parse({**key, "select_top_k": 1}))
        read_counters(engine, reset=True)
        generate(engine, prompts())
        counts = read_counters(engine)["decode_only"]
    assert sum(counts["experts_after"]) < sum(counts["experts_before"])


def test_quantised_gates_are_refused(checkpoint):
    folder = checkpoint("qwen3_moe")
    with (
        pytest.raises(UnsupportedError, match=r"gate of layer .* is quantised"),
        running_engine(folder, sere_key(folder), quantization="fp8", **GRAPHS),
    ):
        pass


@dataclass
class Recorder:
    """Copies of what each layer saw, taken on the device inside the captured graphs.

    A step's copies are cloned when the next one begins, in stream order, so that a host that
    runs ahead (async scheduling) reads nothing half-written.
    """

    rows: int = 1024
    buffers: dict = field(default_factory=dict)
    steps: list = field(default_factory=list)
    running: tuple | None = None
    chosen: int = 0
    """Launches that computed the gate's top-k, too."""

    def around(self, original):
        from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

        def recorded(owner, *args):
            if original.__name__ == "align":
                held, rule = owner.deferred, owner.rule
                if held is None:
                    return original(owner, *args)
                layer, ids, weights = held.layer, held.topk_ids, held.topk_weights
                logits, mask_logits = held.logits, held.mask_logits
            else:
                held, rule = None, owner.rule
                layer, ids, weights, logits, mask_logits = (*args, None)[:5]
            rows = ids.shape[0]
            if layer not in self.buffers:
                shape = (self.rows, ids.shape[1])
                self.buffers[layer] = tuple(
                    torch.full(shape, -9, dtype=kind, device=ids.device)
                    for kind in (torch.int32, torch.float32, torch.int32, torch.float32)
                )
                shape = (self.rows, rule.num_experts)
                scores = torch.zeros(shape, dtype=torch.float32, device=ids.device)
                self.buffers[layer] += (scores, scores.clone())
            before, weight, after, weight_after, scores, of_masks = self.buffers[layer]
            if logits is not None:
                scores[:rows].copy_(logits)
            if mask_logits is not None:
                of_masks[:rows].copy_(mask_logits)
            if held and held.chooses:  # not chosen yet: let vLLM's own kernel choose
                gate = held.logits
                chosen = fused_topk(gate, gate, ids.shape[1], held.renormalize)
                before[:rows].copy_(chosen[1])
                weight[:rows].copy_(chosen[0])
                self.chosen += 1
            else:
                before[:rows].copy_(ids)
                weight[:rows].copy_(weights)
            result = original(owner, *args)
            after[:rows].copy_(ids)
            weight_after[:rows].copy_(weights)
            return result

        return recorded

    def begin(self, original):
        def recorded(state, kinds, *drafts):
            self.finish()
            weights = state.row_weights(*drafts) if drafts else None
            self.running = kinds.copy(), state.bound, state.step_kind(kinds), weights
            original(state, kinds, *drafts)

        return recorded

    def finish(self):
        if self.running:
            copies = {
                layer: tuple(tensor.clone() for tensor in tensors)
                for layer, tensors in self.buffers.items()
            }
            self.steps.append((*self.running, copies))
        self.running = None


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    for owner, name in ((CudaState, "align"), (OwnRows, "reroute")):
        monkeypatch.setattr(owner, name, recorder.around(getattr(owner, name)))
    monkeypatch.setattr(CudaState, "begin_step", recorder.begin(CudaState.begin_step))
    return recorder


MARGIN = {"rule": "margin", "select_top_k": None, "threshold": None, "tau": 0.02}
BY_SERE = [
    {},
    {"select_top_k": 1},
    {"select_top_k": TOP_K},
    {"threshold": None},
    {"by_rows": [{"up_to": 5, "select_top_k": 1}, {"up_to": 8, "threshold": None}]},
]
BY_MARGIN = [
    MARGIN,
    {"select_top_k": 1},
    {**MARGIN, "tau": [1.0, 0.0, 0.05, 0.01], "beta": 1.0, "min_primary_experts": 0},
    {**MARGIN, "runners_up": 3, "fill": 1.0, "mode": "observe"},
    {**MARGIN, "by_rows": [{"up_to": 7, "tau": [0.0, 1.0, 0.0, 0.1], "fill": 1.0}]},
]

SPARE = {**MARGIN, "rule": "spare", "tau": 0.1}
BY_SPARE = [
    SPARE,
    {**SPARE, "lead": 0.4, "limit": 0.3, "protect": True},
    MARGIN,
    {**SPARE, "limit": 0.0, "tau": [1.0, 0.0, 0.05, 0.01], "min_primary_experts": 0},
    {"select_top_k": 1},
    {**SPARE, "by_rows": [{"up_to": 7, "tau": [0.0, 1.0, 0.0, 0.1], "protect": True}]},
]


def for_layers(change, layers):
    """A change of policy whose lists have as many numbers as the model has layers."""
    if isinstance(change, list):
        is_by_layer = all(isinstance(number, float) for number in change)
        return change[:layers] if is_by_layer else [for_layers(part, layers) for part in change]
    if isinstance(change, dict):
        return {name: for_layers(value, layers) for name, value in change.items()}
    return change


def recount(bound, position, tables, gate, before, weights, logits, row_kind, row_weight):
    """Ids, weights and counters of a layer, by the reference."""
    similarity, statistics = tables
    if bound.rule != "sere":
        layer = bound.of_layer(position, len(similarity), None, None, statistics)
        layer, given = replace(layer, gate=gate), (before, weights, logits, row_kind)
        return by_reference(*given, layer, GPU_MATH, row_weight, rule=bound.rule)
    arguments = {
        "row_kind": row_kind,
        "select_top_k": bound.select_top_k,
        "threshold": bound.threshold,
        "min_primary_experts": bound.min_primary_experts,
    }
    wanted = sere.reroute(before, weights, similarity, **arguments)
    rerouting = sere.find_rerouting(before, weights, similarity, **arguments)
    return wanted, weights, count(rerouting, before, wanted, row_kind)


@pytest.mark.parametrize(
    ("architecture", "changes", "graphs"),
    [
        ("qwen3_moe", BY_SERE, COMPILED),
        ("qwen3_moe_64", BY_SERE, GRAPHS),
        ("deepseek_v2", BY_SERE, GRAPHS),
        pytest.param("qwen3_moe", BY_MARGIN, GRAPHS, id="margin"),
        pytest.param("qwen3_moe_64", BY_MARGIN, GRAPHS, id="margin_with_top_k"),
        pytest.param("deepseek_v2", BY_MARGIN, GRAPHS, id="margin_behind_groups"),
        pytest.param("deepseek_v3", BY_MARGIN, GRAPHS, id="margin_behind_a_bias"),
        pytest.param("qwen3_moe", BY_SPARE, GRAPHS, id="spare"),
        pytest.param("qwen3_moe_64", BY_SPARE, GRAPHS, id="spare_with_top_k"),
        pytest.param("deepseek_v3", BY_SPARE, GRAPHS, id="spare_behind_a_bias"),
        pytest.param("qwen3_moe", BY_SERE, DRAFTS, id="drafts"),
        pytest.param("qwen3_moe_64", BY_MARGIN, DRAFTS, id="margin_with_drafts"),
    ],
)
def test_counters_and_ids_match_a_recount(checkpoint, recorder, architecture, changes, graphs):
    """Chunked prefill beside decode, graphs, padding, async scheduling, rules that change."""
    folder = checkpoint(architecture)
    key = sere_key(folder, select_top_k=2, threshold=0.9, min_primary_experts=3)
    if changes is BY_SPARE:
        key["similarity"] = with_stand_ins(folder, "recount")
    options = {**graphs, "max_num_batched_tokens": 64, "max_num_seqs": 11}
    with running_engine(folder, key, **options) as engine:
        state = state_of(engine)
        recorder.finish()
        read_counters(engine, reset=True)
        recorder.steps.clear()
        core, requests = engine.llm_engine, prompts(24, seed=1, length=(3, 90))
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, detokenize=False)
        for number, request in enumerate(requests):
            core.add_request(str(number), request, sampling)
        step = 0
        while core.has_unfinished_requests():
            core.step()
            step += 1
            if step % 5 == 0:
                change = for_layers(changes[step // 5 % len(changes)], len(state.artifact.layers))
                policy = {**key, **change}
                set_policy(engine, Policy.parse(policy))
        recorder.finish()
        counters = read_counters(engine)
        artifact = state.artifact
    layers = counters["layers"]
    recount_of = np.zeros((2, len(layers), len(COUNTERS)), dtype=np.int64)
    totals = np.zeros((2, 2), dtype=np.int64)
    graphed = 0
    for kinds, bound, kind, draft_weights, copies in recorder.steps:
        if REROUTABLE not in kinds:
            continue
        reroutable = np.count_nonzero(kinds == REROUTABLE)
        bound = bound.for_rows(reroutable)
        totals[kind] += (1, reroutable)
        for position, layer in enumerate(layers):
            before, weights, after, weights_after, logits, _ = (t.cpu() for t in copies[layer])
            rows = len(kinds)
            # Rows behind a step's are a graph's padding, or left from a larger step.
            graphed += bool((before[rows] == -1).all())
            row_kind = torch.from_numpy(kinds)
            assert PADDING not in kinds
            row_weight = None if draft_weights is None else torch.from_numpy(draft_weights)
            given = (before[:rows], weights[:rows], logits[:rows], row_kind, row_weight)
            tables = artifact.layers[layer], artifact.statistics.get(layer)
            wanted, wanted_weights, counts = recount(
                bound, position, tables, state.gates.known[layer], *given
            )
            recount_of[kind, position] += [int(number) for number in counts[: len(COUNTERS)]]
            if bound.mode == "observe":
                wanted, wanted_weights = before[:rows], weights[:rows]
            assert torch.equal(after[:rows], wanted)
            changed = (before[:rows] != wanted).any(dim=1) & (bound.rule != "sere")
            assert torch.equal(weights[:rows][~changed], weights_after[:rows][~changed])
            torch.testing.assert_close(weights_after[:rows], wanted_weights, rtol=1e-5, atol=1e-8)
    assert bool(recorder.chosen) == (architecture == "qwen3_moe_64")
    if not architecture.startswith("deepseek"):  # gates with groups leave padding rows their ids
        assert graphed, "no step was padded to a graph's size"
    for kind, name in enumerate(("decode_only", "mixed")):
        assert totals[kind, 0] > 0, name
        found = counters[name]
        assert (found["steps"], found["decode_rows"]) == tuple(totals[kind])
        for position, counter in enumerate(COUNTERS):
            assert found[counter] == recount_of[kind, :, position].tolist(), (name, counter)
    drafts = sum(counters[name]["draft_rows"] for name in ("decode_only", "mixed"))
    if graphs is DRAFTS:
        assert drafts < totals[:, 1].sum() < drafts + 24 * (9 - 1)  # some were accepted
    else:
        assert (totals[:, 1].sum(), drafts) == (24 * (9 - 1), 0)


GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_local_experts": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4"},
}


@pytest.mark.parametrize(("back_end", "merges"), [("marlin", False), ("triton_unfused", True)])
def test_mxfp4_experts(tmp_path, back_end, merges):
    """vLLM's dummy weights: what is shown is which slots are merged, not what experts compute."""
    folder, similarity = tmp_path / "model", tmp_path / "random.safetensors"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GPT_OSS))
    synthetic_artifact(folder).save(similarity)
    options = {**GRAPHS, "load_format": "dummy", "skip_tokenizer_init": True}
    options["moe_backend"] = back_end
    key = {"similarity": str(similarity), "select_top_k": 1, "min_primary_experts": 0}
    with running_engine(folder, **options) as engine:
        stock, _ = generate(engine, prompts(), detokenize=False)
    with running_engine(folder, key, **options) as engine:
        margin = {"rule": "margin", "tau": 1.0, "select_top_k": None}
        for changes in ({"select_top_k": 4}, {}, margin):
            set_policy(engine, Policy.parse({**key, **changes}))
            read_counters(engine, reset=True)
            answers, _ = generate(engine, prompts(), detokenize=False)
            counts = read_counters(engine)["decode_only"]
            if changes == {"select_top_k": 4}:
                assert answers == stock
                assert not any(counts["slots_merged"])
            else:
                assert all(counts["slots_rerouted"])
                assert all(counts["slots_merged"]) if merges else not any(counts["slots_merged"])


@pytest.fixture
def drawn_weights(monkeypatch):
    """Dummy weights under which rows differ, as benchmarks draw them; vLLM's do not."""
    from vllm.model_executor import model_loader

    known = dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)
    monkeypatch.setattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", known)
    fill_dummy_weights(draw_weights)


def test_int4_answers_are_the_same_whoever_sorts(tmp_path, monkeypatch, drawn_weights):
    """Marlin's experts, which sort the slots by vLLM's function or by our launch."""
    model = with_layers(get_model("qwen3-30b-a3b-gptq"), 2)
    folder, similarity = write_config(model, tmp_path), tmp_path / "random.safetensors"
    synthetic_artifact(folder).save(similarity)
    options = {**GRAPHS, "load_format": "dummy", "skip_tokenizer_init": True}
    options["max_model_len"] = 512
    key = {"similarity": str(similarity), "select_top_k": 8, "min_primary_experts": 0}
    policies = (
        key,
        {**key, "select_top_k": 1},
        {**key, "rule": "margin", "tau": 0.02, "select_top_k": None},
    )
    with running_engine(folder, **options) as engine:
        stock, _ = generate(engine, prompts(), detokenize=False)
    asked, found = [], []
    align = CudaState.align
    monkeypatch.setattr(CudaState, "align", lambda *args: asked.append(1) or align(*args))
    for sorts in (True, False):
        if not sorts:
            monkeypatch.setattr(routing, "_sorts_own_ids", lambda runner: False)
        asked.clear()
        with running_engine(folder, key, **options) as engine:
            for policy in policies:
                set_policy(engine, Policy.parse(policy))
                found.append(generate(engine, prompts(), detokenize=False)[0])
        assert bool(asked) == sorts
    assert found[:3] == found[3:]
    assert found[0] == stock
    assert stock != found[1] != found[2]
    assert len(set(stock)) > 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("architecture", ["qwen3_moe"])
def test_tensor_and_expert_parallel(checkpoint, architecture, monkeypatch):
    for name, value in NO_MULTICAST.items():
        monkeypatch.setenv(name, value)
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    stock, found = tokens_of(checkpoint(architecture), POLICIES, **options)
    assert found["S=K"][0] == stock
    counts = found["S=1"][1]
    assert sum(counts["experts_after"]) < sum(counts["experts_before"])
