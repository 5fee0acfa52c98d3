"""Recorded experts: ids after the rule, distinct, and the weights that a trainer makes of them.

vLLM's CPU build cannot record (its connector wants the V2 runner, that wants Triton), so an engine
here is given vLLM's own capturer by hand; ``test_gpu_recording.py`` has the whole.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sere_ray import merge_repeated, reroute
from sere_ray.engine.control import calls_of
from sere_ray.engine.recording import distinct, recording_distinct, tell_dropped_apart
from sere_ray.rules import EXACT, REROUTABLE
from sere_ray.util.ports import free_port
from tests.engine.conftest import prompts, random_artifact, running_engine, sere_key, state_of
from tests.engine.ranks import _choose_rank, run_ranks
from tests.engine.replay import weights_of_margin, weights_of_sere, weights_of_spare
from tests.models import NUM_EXPERTS

MARGIN = {"rule": "margin", "select_top_k": None, "tau": 0.02, "min_primary_experts": 0}
SPARE = {**MARGIN, "rule": "spare", "lead": 0.5, "limit": 0.6, "protect": False}
POLICIES = {
    "sere": {"min_primary_experts": 0},
    "margin": MARGIN,
    "spare": SPARE,
    "exact": {"mode": "off"},
}


# --- ids and their types --------------------------------------------------------------------------


def random_rows(rows=6, experts=32, top_k=8):
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(rows, experts, generator=generator).softmax(dim=-1)
    weights, ids = scores.topk(top_k)
    similarity = torch.rand(experts, experts, generator=generator).fill_diagonal_(1.0)
    return ids, weights, similarity


def test_distinct_ids_are_those_after_merging():
    ids, weights, similarity = random_rows()
    repeated = reroute(ids, weights, similarity, select_top_k=1)
    merged, _ = merge_repeated(repeated, weights)
    assert torch.equal(distinct(repeated), merged)
    assert torch.equal(distinct(merged), merged)
    assert (merged == -1).any()
    assert torch.equal(distinct(ids), ids)


def capturer_of(num_experts, sere=None, **options):
    """vLLM's, without an engine around it."""
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCapturer

    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: 2,
        get_num_experts=lambda: num_experts,
        get_num_experts_per_tok=lambda: 2,
        hf_text_config=SimpleNamespace(model_type="any"),
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(data_parallel_rank=0, tensor_parallel_size=1),
        additional_config={} if sere is None else {"sere": sere},
    )
    capturer = object.__new__(RoutedExpertsCapturer)
    init = getattr(RoutedExpertsCapturer.__init__, "_sere_ray_original", None)
    tell_dropped_apart(init or RoutedExpertsCapturer.__init__, capturer, 8, config)
    return capturer


@pytest.mark.parametrize(
    ("num_experts", "sere", "dropped"),
    [(16, {}, 255), (255, {}, 255), (256, {}, 65535), (257, {}, 65535), (256, None, 255)],
)
def test_a_dropped_slot_is_no_expert(num_experts, sere, dropped, monkeypatch):
    """It is the largest number of its type; without the key vLLM's types stay."""
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer

    context = SimpleNamespace(dp_metadata=None)
    monkeypatch.setattr(routed_experts_capturer, "get_forward_context", lambda: context)
    capturer = capturer_of(num_experts, sere)
    ids = torch.tensor([[num_experts - 1, num_experts - 1], [0, num_experts - 1]])
    recording_distinct(lambda topk_ids: capturer.capture(1, topk_ids))(ids)
    found = capturer.snapshot_routing_data(2)[:, 1].numpy()
    assert found.tolist() == [[num_experts - 1, dropped], [0, num_experts - 1]]
    assert found.dtype == capturer.output_dtype_name


# --- what engines record --------------------------------------------------------------------------


class Recorded:
    """Rows that a rank's engine recorded, and what its rule was given, step by step."""

    def __init__(self, engine):
        from sere_ray.engine.cpu.state import CpuState

        self.state, self.steps, self.calls = state_of(engine), [], []
        self.capturer = engine.collective_rpc(bind_capturer)[0]
        choose = CpuState.choose

        def record(state, layer, ids, weights, logits, hidden):
            new = choose(state, layer, ids, weights, logits, hidden)
            kinds = state.row_kind[: len(ids)].clone()
            self.calls.append((layer, ids.clone(), weights.clone(), logits.clone(), kinds, *new))
            return new

        self.state.choose = record.__get__(self.state)

    def run(self, engine, requests, tokens):
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        for number, request in enumerate(requests):
            engine.llm_engine.add_request(f"{len(self.steps)}-{number}", request, sampling)
        while engine.llm_engine.has_unfinished_requests():
            self.calls.clear()
            engine.llm_engine.step()
            rows = self.state.rows
            if self.calls and rows:
                # As vLLM's connector does with the rows of requests.
                ids = self.capturer.snapshot_routing_data(rows).numpy().astype("int64")
                self.steps.append((torch.from_numpy(ids), [
                    (layer, *(x[:rows] for x in tensors)) for layer, *tensors in self.calls
                ]))  # fmt: skip
        found, self.steps = self.steps, []
        return found


def bind_capturer(worker):
    """What ``AuxOutputWorkerConnector`` does in a V2 runner."""
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
        RoutedExpertsCapturer,
        bind_routed_experts_capturer,
    )

    rows = worker.vllm_config.scheduler_config.max_num_batched_tokens
    capturer = RoutedExpertsCapturer(max_num_batched_tokens=rows, vllm_config=worker.vllm_config)
    bind_routed_experts_capturer(worker.model_runner.model, capturer)
    return capturer


def key_with_statistics(folder, path):
    """The key of an engine whose artifact holds what every rule reads."""
    generator = torch.Generator().manual_seed(4)
    artifact = random_artifact(folder)

    def of_pairs(least, most):
        shape = (NUM_EXPERTS, NUM_EXPERTS)
        return least + (most - least) * torch.rand(shape, generator=generator)

    artifact = replace(
        artifact,
        statistics={
            layer: {"directed_loss": of_pairs(0, 1), "directed_scale": of_pairs(-0.5, 1.5)}
            for layer in artifact.layers
        },
    )
    artifact.save(path)
    return sere_key(folder, similarity=str(path))


def check_steps(steps, state, *, one_rank):
    """Every recorded row against the rule on the same gate's choice.

    Returns:
        How many rows were exact, re-routed, and dropped a slot.
    """
    bound, similarity = state.bound, state.similarity
    seen = torch.zeros(3, dtype=torch.int64)
    for recorded, calls in steps:
        for layer, ids, weights, logits, kinds, new_ids, new_weights in calls:
            found = recorded[:, layer]
            found = found.masked_fill(found == 255, -1)
            # Distinct, and the experts that were handed the row with a weight.
            assert torch.equal(found, distinct(found))
            given = distinct(new_ids.long())
            assert torch.equal(found, given)
            if bound.mode == "off" or (one_rank and bound.rule == "sere"):
                wanted = ids
                if bound.mode != "off" and REROUTABLE in kinds:
                    rule = {"row_kind": kinds, "select_top_k": bound.select_top_k}
                    rule["min_primary_experts"] = bound.min_primary_experts
                    wanted = reroute(ids, weights, similarity[layer], **rule)
                merged = merge_repeated(wanted, weights, row_kind=kinds)[0].long()
                assert torch.equal(found.sort(dim=1).values, merged.sort(dim=1).values)
            assert torch.equal(found[kinds == EXACT], ids[kinds == EXACT].long())
            # A trainer has ids, and its own gate.
            if bound.mode == "off" or bound.rule == "sere":
                replayed = weights_of_sere(found, ids.long(), weights, similarity[layer])
            elif bound.rule == "spare":
                statistics = state.statistics[layer]
                replayed = weights_of_spare(found, ids.long(), weights, statistics, bound)
            else:
                replayed = weights_of_margin(found, ids.long(), weights, logits, bound)
            served = torch.zeros(len(ids), NUM_EXPERTS + 1)
            columns = new_ids.long().where(new_ids >= 0, torch.tensor(NUM_EXPERTS))
            served.scatter_add_(1, columns, new_weights.float())
            torch.testing.assert_close(replayed, served[:, :NUM_EXPERTS], rtol=1e-5, atol=1e-6)
            rerouted = (found != ids).any(dim=1)
            dropped = (found < 0).any(dim=1)
            seen += torch.tensor([(kinds == EXACT).sum(), rerouted.sum(), dropped.sum()])
    return seen.tolist()


def record_rank(rank, port, folder, options, requests):
    """What a rank of an engine recorded under each policy; checked in the process itself."""
    if port is not None:
        _choose_rank(rank, port)
    seen = {}
    with running_engine(folder, max_num_batched_tokens=64, max_num_seqs=8, **options) as engine:
        recorded = Recorded(engine)
        for name, changes in POLICIES.items():
            calls_of(engine).set_policy({**options["sere"], **changes})
            steps = recorded.run(engine, requests[rank], tokens=9)
            state = recorded.state
            assert state.bound.mode == changes.get("mode", "on")
            one_rank = port is None
            seen[name] = check_steps(steps, state, one_rank=one_rank)
    return seen


@pytest.mark.engine
def test_recorded_ids_are_those_of_the_rule(checkpoint, tmp_path):
    """Chunked prefill beside decode; rules that change while the engine runs."""
    folder = checkpoint("qwen3_moe")
    requests = prompts(12, seed=1, length=(3, 90))
    key = key_with_statistics(folder, tmp_path / "whole.safetensors")
    seen = record_rank(0, None, folder, {"sere": key}, [requests])
    assert all(seen["sere"]), "exact rows, re-routed ones, and some that dropped a slot"
    assert all(seen["margin"][:2])
    assert all(seen["spare"])
    assert seen["exact"][1:] == [0, 0]


@pytest.mark.engine
def test_recorded_ids_of_data_parallel_ranks(checkpoint, tmp_path):
    folder = checkpoint("qwen3_moe")
    key = key_with_statistics(folder, tmp_path / "whole.safetensors")
    options = {"sere": key, "enable_expert_parallel": True, "dtype": "float32"}
    options["distributed_executor_backend"] = "uni"
    requests = [prompts(6, seed=1, length=(3, 90)), prompts(6, seed=2, length=(3, 90))]
    for seen in run_ranks(record_rank, free_port(), folder, options, requests):
        assert all(seen["sere"]), "rows with a slot that another one took over"
        assert all(seen["margin"][:2])
        assert all(seen["spare"])
        assert seen["exact"][1:] == [0, 0]
