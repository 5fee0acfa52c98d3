"""Speculative decoding on a GPU, full CUDA graphs on: the same promises as on a CPU."""

from collections import deque

import pytest

from sere_ray.engine.control import read_counters, set_policy
from sere_ray.engine.gpu import patches
from sere_ray.engine.gpu.state import CudaState
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, REROUTABLE
from tests.drafts import add_mtp_layer, build_eagle_head
from tests.engine.conftest import generate, prompts, running_engine, sere_key, state_of
from tests.engine.test_gpu import DRAFTS, GRAPHS, POLICIES, tokens_of
from tests.engine.test_speculation import ASK, answers, repetitive
from tests.models import TOP_K

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
GRAPHS_OF_DRAFTS = {**GRAPHS, "compilation_config": DRAFTS["compilation_config"]}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_moe_64"])
def test_stock_tokens_and_fewer_experts(checkpoint, architecture):
    margin = {"rule": "margin", "select_top_k": None, "tau": 1.0}
    policies = {**POLICIES, "all kept": {**margin, "min_primary_experts": 64}, "firsts": margin}
    if architecture == "qwen3_moe":
        policies["all kept"]["min_primary_experts"] = 16
    stock, found = tokens_of(checkpoint(architecture), policies, **DRAFTS)
    for name in ("S=K", "observe", "off", "all kept"):
        assert found[name][0] == stock, name
    for name in ("S=1", "firsts"):
        counts = found[name][1]
        assert sum(counts["experts_after"]) < sum(counts["experts_before"])
    for _, counts in found.values():
        assert 0 < counts["draft_rows"] <= 3 / 4 * counts["decode_rows"]


class Steps:
    """Row kinds of every step beside an oracle, which knows what the scheduler sent.

    A request decodes once all tokens that it was sent with are computed.
    """

    def __init__(self, scheduler, exact):
        self.scheduler, self.exact = scheduler, exact
        self.sent, self.target, self.seen, self.wanted = deque(), {}, [], []
        self.batch, self.drafts = None, []
        self.preempted = 0

    def schedule(self, original):
        def recorded(*args, **kwargs):
            output = original(*args, **kwargs)
            self.preempted += len(output.preempted_req_ids or ())
            kinds = {}
            for new in output.scheduled_new_reqs:
                tokens = new.prefill_token_ids or new.prompt_token_ids
                self.target[new.req_id] = len(tokens)
                kinds[new.req_id] = EXACT
            cached = output.scheduled_cached_reqs
            for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
                assert name not in cached.resumed_req_ids
                decodes = computed >= self.target[name] and not self.is_exact(name)
                kinds[name] = REROUTABLE if decodes else EXACT
            if output.num_scheduled_tokens:
                self.sent.append((kinds, output))
            return output

        return recorded

    def is_exact(self, name):
        return name.rpartition("-")[0] in self.exact

    def begin_batch(self, original):
        def recorded(state, batch):
            self.batch = batch
            original(state, batch)

        return recorded

    def begin(self, original):
        def recorded(state, kinds, *args):
            if self.sent:
                wanted, output = self.sent.popleft()
                rows = output.num_scheduled_tokens
                self.seen.append(kinds.tolist())
                self.wanted.append(
                    [wanted[name] for name in self.batch.req_ids for _ in range(rows[name])]
                )
                self.drafts.append(len(output.scheduled_spec_decode_tokens))
            original(state, kinds, *args)

        return recorded


def test_row_kinds_are_those_of_an_oracle(checkpoint):
    """Chunked prompts beside decodes, rejected drafts, too few blocks, some exact requests."""
    folder, requests = checkpoint("qwen3_moe"), repetitive(10, length=70)
    exact = {str(number) for number in range(0, 10, 3)}
    options = {
        **DRAFTS,
        "block_size": 16,
        "num_gpu_blocks_override": 44,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
    }

    with running_engine(folder, **options) as engine:
        stock = answers(engine, requests, exact)
    key = sere_key(folder, min_primary_experts=0)
    with running_engine(folder, key, **options) as engine, pytest.MonkeyPatch.context() as patch:
        scheduler = engine.llm_engine.engine_core.engine_core.scheduler
        steps = Steps(scheduler, exact)
        patch.setattr(scheduler, "schedule", steps.schedule(scheduler.schedule))
        patch.setattr(patches, "_begin_step", steps.begin_batch(patches._begin_step))
        patch.setattr(CudaState, "begin_step", steps.begin(CudaState.begin_step))
        read_counters(engine)
        rerouted = answers(engine, requests, exact)
        counters = read_counters(engine)
    assert steps.seen == steps.wanted
    both = [EXACT in kinds and REROUTABLE in kinds for kinds in steps.seen]
    assert any(is_mixed and drafts for is_mixed, drafts in zip(both, steps.drafts, strict=True))
    assert steps.preempted > 0
    counted = [counters[kind] for kind in ("decode_only", "mixed")]
    reroutable = sum(kinds.count(REROUTABLE) for kinds in steps.seen)
    assert sum(kind["decode_rows"] for kind in counted) == reroutable
    assert 0 < sum(kind["draft_rows"] for kind in counted) < reroutable
    assert rerouted != stock


@pytest.mark.parametrize("method", ["mtp", "eagle", "draft_model"])
def test_a_draft_models_layers_are_left_alone(checkpoint, tmp_path, method):
    if method == "mtp":
        model = add_mtp_layer(checkpoint("deepseek_v3"), tmp_path)
        key = sere_key(checkpoint("deepseek_v3"), min_primary_experts=0)
        speculates = {"method": "mtp", "num_speculative_tokens": 3}
    else:
        model = checkpoint("qwen3_moe")
        draft = build_eagle_head(model, tmp_path) if method == "eagle" else model
        key = sere_key(model, min_primary_experts=0)
        speculates = {"method": method, "model": str(draft), "num_speculative_tokens": 3}
    options = {**GRAPHS_OF_DRAFTS, "speculative_config": speculates}
    requests = prompts(6, seed=1)

    def served(engine, **sampling):
        return generate(engine, requests, tokens=30, **sampling)[0]

    with running_engine(model, **options) as engine:
        stock = served(engine)
    with running_engine(model, key, **options) as engine:
        state = state_of(engine)
        runner = engine.collective_rpc(lambda worker: worker.model_runner)[0]
        drafter = runner.speculator.model
        routers = [m.router for m in drafter.modules() if hasattr(m, "router")]
        assert len(routers) == {"mtp": 1, "eagle": 0, "draft_model": 4}[method]
        assert not any(type(router).__name__.startswith("Rerouting") for router in routers)
        assert len(state.attached) == len(state.layers)
        for changes in ({"select_top_k": TOP_K}, {"mode": "observe"}, {"mode": "off"}):
            set_policy(engine, Policy.parse({**key, **changes}))
            assert served(engine) == stock, changes
        set_policy(engine, Policy.parse(key))
        read_counters(engine)
        assert served(engine) != stock
        counts = read_counters(engine)["decode_only"]
        assert served(engine, extra_args=ASK) == stock
    assert 0 < counts["draft_rows"] <= 3 / 4 * counts["decode_rows"]
    assert sum(counts["experts_after"]) < sum(counts["experts_before"])
