"""Speculative decoding: verify rows are re-routed, everything else is what it was."""

import random
from unittest import mock

import numpy as np
import pytest

from sere_ray.engine.control import read_counters, set_policy
from sere_ray.engine.cpu.state import CpuState
from sere_ray.engine.row_kinds import draft_positions
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, REROUTABLE
from tests.drafts import add_mtp_layer, build_eagle_head
from tests.engine.conftest import generate, prompts, running_engine, sere_key, state_of
from tests.models import TOP_K

pytestmark = pytest.mark.engine
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
SPECULATES = {"speculative_config": NGRAM}
ASK = {"sere_tier": "exact"}


def repetitive(count, length=24, seed=0):
    """Prompts that say the same again and again, so that n-grams are found in them."""
    rng = random.Random(seed)
    return [
        {"prompt_token_ids": ([rng.randrange(10, 900) for _ in range(5)] * length)[: length + row]}
        for row in range(count)
    ]


def test_drafts_are_numbered():
    kinds = np.array([REROUTABLE, EXACT, REROUTABLE], dtype=np.int8)
    positions = draft_positions(kinds, np.array([0, 3, 6, 7]))
    assert positions.dtype == np.int8
    assert positions.tolist() == [0, 1, 2, 0, 0, 0, 0]
    nothing = np.zeros(0, dtype=np.int8)
    assert draft_positions(nothing, np.array([0])).tolist() == []


def test_tokens_of_stock_and_fewer_experts(checkpoint):
    folder, requests = checkpoint("qwen3_moe"), repetitive(8)
    with running_engine(folder, **SPECULATES) as engine:
        stock, _ = generate(engine, requests, tokens=40)
    key, found = sere_key(folder, min_primary_experts=0), {}
    policies = {
        "S=K": {"select_top_k": TOP_K},
        "observe": {"mode": "observe"},
        "off": {"mode": "off"},
        "margin": {"rule": "margin", "select_top_k": None, "tau": 0.05},
        "all kept": {
            "rule": "margin",
            "select_top_k": None,
            "tau": 1.0,
            "min_primary_experts": 16,
        },
        "S=1": {},
    }
    with running_engine(folder, key, **SPECULATES) as engine:
        for name, changes in policies.items():
            set_policy(engine, Policy.parse({**key, **changes}))
            read_counters(engine)
            answers, _ = generate(engine, requests, tokens=40)
            found[name] = answers, read_counters(engine)["decode_only"]
    for name in ("S=K", "observe", "off", "all kept"):
        assert found[name][0] == stock, name
    for name in ("S=1", "margin"):
        answers, counts = found[name]
        assert answers != stock
        assert sum(counts["experts_after"]) < sum(counts["experts_before"])
        assert sum(counts["slots_rerouted"]) > 0
    for _, counts in found.values():
        assert 0 < counts["draft_rows"] < counts["decode_rows"]
        tokens = 8 * 39  # the first token of every answer comes from a prompt row
        assert counts["decode_rows"] - counts["draft_rows"] < tokens <= counts["decode_rows"]


class Steps:
    """Row kinds of every step beside an oracle, which knows what the scheduler knows."""

    def __init__(self, engine, exact):
        core = engine.llm_engine.engine_core.engine_core
        self.scheduler, self.exact = core.scheduler, exact
        self.runner = engine.collective_rpc(lambda worker: worker.model_runner)[0]
        self.seen, self.wanted, self.drafts, self.preempted = [], [], [], 0
        self.waits = None

    def schedule(self, original):
        def recorded(*args, **kwargs):
            before = {name: r.num_output_tokens for name, r in self.scheduler.requests.items()}
            output = original(*args, **kwargs)
            self.waits = output, before
            self.preempted += len(output.preempted_req_ids or ())
            return output

        return recorded

    def kinds_wanted(self):
        output, answered = self.waits
        found = []
        for name in self.runner.input_batch.req_ids:
            rows = output.num_scheduled_tokens[name]
            drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
            is_exact = name.rpartition("-")[0] in self.exact or name in self.exact
            decodes = answered[name] > 0 and rows - drafts == 1 and not is_exact
            found += [REROUTABLE if decodes else EXACT] * rows
        return found

    def begin(self, original):
        def recorded(state, kinds, *args):
            if self.waits:
                self.seen.append(kinds.tolist())
                self.wanted.append(self.kinds_wanted())
                self.drafts.append(
                    sum(map(len, self.waits[0].scheduled_spec_decode_tokens.values()))
                )
                self.waits = None
            original(state, kinds, *args)

        return recorded


def answers(engine, requests, exact):
    """Tokens by request; those of the set ``exact`` ask for exact routing."""
    from vllm import SamplingParams

    core, found = engine.llm_engine, {}
    for number, request in enumerate(requests):
        sampling = SamplingParams(
            max_tokens=50,
            temperature=0,
            ignore_eos=True,
            extra_args=ASK if str(number) in exact else None,
        )
        core.add_request(str(number), request, sampling)
    while core.has_unfinished_requests():
        for output in core.step():
            found[output.request_id] = tuple(output.outputs[0].token_ids)
    return found


@pytest.fixture(scope="module")
def busy(checkpoint):
    """Chunked prompts beside decodes, too few blocks, some exact requests; S = 1 and stock."""
    folder, requests = checkpoint("qwen3_moe"), repetitive(10, length=70)
    exact = {str(number) for number in range(0, 10, 3)}
    options = {
        **SPECULATES,
        "dtype": "float32",
        "block_size": 32,
        "num_gpu_blocks_override": 24,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
    }

    with running_engine(folder, **options) as engine:
        stock = answers(engine, requests, exact)
    key = sere_key(folder, min_primary_experts=0)
    with running_engine(folder, key, **options) as engine, pytest.MonkeyPatch.context() as patch:
        steps = Steps(engine, exact)
        patch.setattr(steps.scheduler, "schedule", steps.schedule(steps.scheduler.schedule))
        patch.setattr(CpuState, "begin", steps.begin(CpuState.begin))
        read_counters(engine)
        rerouted = answers(engine, requests, exact)
        counters = read_counters(engine)
    return stock, rerouted, steps, counters, exact


def test_row_kinds_are_those_of_an_oracle(busy):
    *_, steps, counters, _ = busy
    assert steps.seen == steps.wanted
    both = [EXACT in kinds and REROUTABLE in kinds for kinds in steps.seen]
    assert any(is_mixed and drafts for is_mixed, drafts in zip(both, steps.drafts, strict=True))
    assert steps.preempted > 0
    counted = [counters[kind] for kind in ("decode_only", "mixed")]
    reroutable = [kinds.count(REROUTABLE) for kinds in steps.seen]
    assert sum(kind["decode_rows"] for kind in counted) == sum(reroutable)
    assert sum(kind["steps"] for kind in counted) == sum(map(bool, reroutable))
    assert 0 < sum(kind["draft_rows"] for kind in counted) < sum(steps.drafts)


def test_exact_requests_get_tokens_of_stock(busy):
    stock, rerouted, _, _, exact = busy
    assert {name: rerouted[name] for name in exact} == {name: stock[name] for name in exact}
    assert rerouted != stock


def test_blocks_of_rerouted_rows_are_not_found_by_exact_requests(checkpoint):
    folder, first = checkpoint("qwen3_moe"), prompts(6, seed=3, length=(70, 90))
    options = {**SPECULATES, "enable_prefix_caching": True, "block_size": 32}

    def cached(engine, requests, **sampling):
        _, outputs = generate(engine, requests, tokens=8, **sampling)
        return [output.num_cached_tokens for output in outputs]

    with running_engine(folder, sere_key(folder, min_primary_experts=0), **options) as engine:
        answers, _ = generate(engine, first, tokens=64)
        second = [
            {"prompt_token_ids": [*request["prompt_token_ids"], *answer, 7, 8, 9]}
            for request, answer in zip(first, answers, strict=True)
        ]
        assert all(tokens >= 96 for tokens in cached(engine, second))
        assert cached(engine, second, extra_args=ASK) == [0] * 6
        assert all(tokens >= 96 for tokens in cached(engine, second, extra_args=ASK))


# --- draft models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mtp", "eagle", "draft_model"])
def drafting(request, checkpoint, tmp_path_factory):
    """A model, its artifact's key, and how it speculates."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "mtp":
        model = add_mtp_layer(checkpoint("deepseek_v3"), folder)
        key = sere_key(checkpoint("deepseek_v3"), min_primary_experts=0)
        return model, key, {"method": "mtp", "num_speculative_tokens": 2}
    model = checkpoint("qwen3_moe")  # as a draft model it drafts for itself, with experts
    draft = build_eagle_head(model, folder) if request.param == "eagle" else model
    speculates = {"method": request.param, "model": str(draft), "num_speculative_tokens": 3}
    return model, sere_key(model, min_primary_experts=0), speculates


def test_a_draft_models_layers_are_left_alone(drafting):
    model, key, speculates = drafting
    options, requests = {"speculative_config": speculates}, prompts(6, seed=1)

    def served(engine):
        """Tokens, and the steps that they took: other drafts would take others."""
        scheduler = engine.llm_engine.engine_core.engine_core.scheduler
        with mock.patch.object(scheduler, "schedule", wraps=scheduler.schedule) as schedule:
            return generate(engine, requests, tokens=30)[0], schedule.call_count

    with running_engine(model, **options) as engine:
        stock = served(engine)
    with running_engine(model, key, **options) as engine:
        state = state_of(engine)
        runner = engine.collective_rpc(lambda worker: worker.model_runner)[0]
        routers = [m.router for m in runner.drafter.model.modules() if hasattr(m, "router")]
        assert len(routers) == {"mtp": 1, "eagle": 0, "draft_model": 4}[speculates["method"]]
        assert not any(type(router).__name__.startswith("Rerouting") for router in routers)
        mine = [m for m in runner.model.modules() if m in list(state.attached.values())]
        assert len(mine) == len(state.attached) == len(state.layers)
        for changes in ({"select_top_k": TOP_K}, {"mode": "observe"}, {"mode": "off"}):
            set_policy(engine, Policy.parse({**key, **changes}))
            assert served(engine) == stock, changes
        set_policy(engine, Policy.parse(key))
        read_counters(engine)
        assert served(engine)[0] != stock[0]
        counts = read_counters(engine)["decode_only"]
        assert generate(engine, requests, tokens=30, extra_args=ASK)[0] == stock[0]
    assert 0 < counts["draft_rows"] < counts["decode_rows"]
    assert sum(counts["experts_after"]) < sum(counts["experts_before"])
