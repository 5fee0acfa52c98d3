"""What a data-parallel rank of a GPU engine does for ``test_gpu_expert_parallel.py``."""

import os
import random
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

PRIME = 1_000_003
OPTIONS = {
    "dtype": "bfloat16",
    "enable_expert_parallel": True,
    "distributed_executor_backend": "uni",
    # In one process with its engine core, a rank that drains its queue runs no pass, and the others
    # wait for it: with uneven requests vLLM's in-process engines need one pass per step.
    "async_scheduling": False,
    "enforce_eager": False,
    "max_num_batched_tokens": 64,  # prompts in chunks, so that steps are mixed
    "max_num_seqs": 11,
    "compilation_config": {
        "mode": 0,  # no torch.compile: engines start in seconds
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
    },
    "kv_cache_memory_bytes": 1 << 28,
}
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}
"""NVLink multicast stays off: a program that ends badly in it can take a host's GPUs along."""


def choose_rank(rank):
    from tests.engine.ranks import _choose_rank

    _choose_rank(rank, 0)
    os.environ.update(VLLM_USE_FLASHINFER_SAMPLER="0", **NO_MULTICAST)


@contextmanager
def engine_of(folder, key, port, *, before=False, **options):
    """An engine of this rank, on ports of its own: a second one would meet an old store."""
    from sere_ray.bench.rank_engines import before_dispatch
    from sere_ray.engine.vllm_internals import forget_environment
    from tests.engine.conftest import running_engine

    forget_environment()
    os.environ["VLLM_DP_MASTER_PORT"] = str(port)
    with (
        before_dispatch() if before else nullcontext(),
        running_engine(folder, key, **{**OPTIONS, **options}) as engine,
    ):
        yield engine


@contextmanager
def own_gemms():
    """Engines that are started inside use ``gate_up.py``, for which small models have no tiles."""
    from sere_ray.engine.gpu import fused_experts
    from sere_ray.engine.gpu.gate_up import Tile

    tiles, measured = (
        fused_experts.Tiles(Tile(16, 16, 64), Tile(16, 16, 64)),
        fused_experts.tiles_for,
    )
    fused_experts.tiles_for = lambda *_, **__: tiles
    try:
        yield
    finally:
        fused_experts.tiles_for = measured


class Recorder:
    """What the gathered launches of a pass read and wrote, copied on the device in the graphs."""

    def __init__(self):
        self.buffers, self.passes, self.running, self.full = {}, [], None, True

    def install(self):
        from sere_ray.engine.gpu.state import CudaState
        from sere_ray.kernel import across_ranks

        for name in ("reroute_gathered", "reroute_gathered_and_align"):
            setattr(across_ranks, name, self.around(getattr(across_ranks, name)))
        begin = CudaState.begin_pass

        def begin_pass(state, table, sizes):
            self.finish()
            begin(state, table, sizes)
            self.running = state, state.bound.model_dump(), table.copy(), list(sizes)

        CudaState.begin_pass = begin_pass

    def around(self, launch):
        def recorded(kernel, ids, weights, layer, placement, **options):
            rows, key = ids.shape[0], layer.tables.neighbours.data_ptr()
            if key not in self.buffers:
                shape = (256, ids.shape[1])
                self.buffers[key] = tuple(
                    torch.full(shape, -9, dtype=kind, device=ids.device)
                    for kind in (torch.int32, torch.float32, torch.int32)
                )
            before, weight, after = self.buffers[key]
            before[:rows].copy_(ids)
            weight[:rows].copy_(weights)
            result = launch(kernel, ids, weights, layer, placement, **options)
            after[:rows].copy_(ids)
            return result

        return recorded

    def finish(self):
        """Take over the pass that was launched last, in stream order."""
        if self.running is None:
            return
        (state, policy, table, sizes), self.running = self.running, None
        rows, taken, sums = sum(sizes), {}, []
        for layer in state.layers:
            buffers = self.buffers.get(state.rule.tables[layer].neighbours.data_ptr())
            if buffers is None:
                return  # another engine's, or the profile pass
            after = buffers[2][:rows].long()
            places = torch.arange(1, after.numel() + 1, device=after.device).view_as(after)
            sums.append(((after + 2) * places % PRIME).sum())
            if self.full or len(self.passes) % 50 == 0:
                taken[layer] = tuple(buffer[:rows].clone() for buffer in buffers)
        self.passes.append((policy, table, sizes, torch.stack(sums), taken))

    def take(self):
        """Everything since the last time, as numpy: policy, kinds, sizes, checksums, layers."""
        from sere_ray.engine.gpu.rank_words import read_words

        self.finish()
        found = []
        for policy, table, sizes, sums, taken in self.passes:
            kinds = [read_words(column).kinds.tolist() for column in table.T]
            layers = {i: tuple(t.cpu().tolist() for t in tensors) for i, tensors in taken.items()}
            found.append((policy, kinds, sizes, sums.tolist(), layers))
        self.passes.clear()
        return found


def with_stand_ins(folder, name):
    """A checkpoint's artifact with random statistics for ``spare``, saved anew; the file."""
    from sere_ray.artifact.similarity import SimilarityArtifact
    from tests.engine.conftest import artifact_path
    from tests.kernel.spare_cases import make_statistics

    artifact = SimilarityArtifact.load(artifact_path(folder))
    statistics = {
        index: make_statistics(len(matrix), "even", index)
        for index, matrix in artifact.layers.items()
    }
    path = folder.with_suffix(f".directed-{name}.safetensors")
    replace(artifact, statistics=statistics).save(path)
    return str(path)


def reports_of(exercise, checkpoint, *further, engines, time_limit):
    """What ``exercise`` reports of both ranks; the second has fewer requests, and idles."""
    from sere_ray.bench.expert_parallel import PORTS_OF_ENGINE
    from sere_ray.util.ports import free_ports
    from tests.engine.conftest import prompts, sere_key
    from tests.engine.ranks import run_ranks

    folder = checkpoint("qwen3_moe")
    key = sere_key(folder, min_primary_experts=0)
    requests = [prompts(8, seed=1), prompts(5, seed=2)]
    arguments = (free_ports(engines, apart=PORTS_OF_ENGINE), folder, key, requests, [30, 12])
    return run_ranks(exercise, *arguments, *further, time_limit=time_limit)


def under(engine, policy, requests, tokens):
    """What an engine answers under a policy, and what it counts meanwhile."""
    from sere_ray.engine.control import calls_of, read_counters
    from tests.engine.conftest import generate

    calls_of(engine).set_policy(policy)
    read_counters(engine, reset=True)
    return generate(engine, requests, tokens=tokens)[0], read_counters(engine)


def exercise(rank, ports, folder, key, requests, tokens):
    """Engines one after the other; what each answered and counted, and passes of some."""
    choose_rank(rank)
    from tests.engine.conftest import generate, state_of

    recorder, report = Recorder(), {}

    def answers(engine, name, policy):
        recorder.take()
        given, counters = under(engine, policy, requests[rank], tokens[rank])
        report[name] = {"answers": given, "counters": counters}

    with engine_of(folder, None, ports[0]) as engine:
        report["stock"] = generate(engine, requests[rank], tokens=tokens[rank])[0]
    recorder.install()
    with engine_of(folder, key, ports[1]) as engine:
        for name, changes in {
            "S=K": {"select_top_k": 4},
            "off": {"mode": "off"},
            "observe": {"mode": "observe"},
            "critical": {"threshold": 0.9, "min_primary_experts": 3},
            "S=1": {},
        }.items():
            answers(engine, name, {**key, **changes})
            if name in ("critical", "S=1"):
                report[name]["passes"] = recorder.take()
        recorder.full = False
        switch_policies(engine, rank, key)
        report["switches"] = recorder.take()
    recorder.full = True
    with engine_of(folder, key, ports[2], before=True) as engine:
        answers(engine, "before", key)
        union = state_of(engine).union
        assert union.way == "before"
        report["before"]["exchanges"] = int(union.peers.number) if union.peers else 0
    with own_gemms(), engine_of(folder, key, ports[4]) as engine:
        answers(engine, "S=K, own GEMMs", {**key, "select_top_k": 4})
        answers(engine, "S=1, own GEMMs", key)
    local = {**key, "union": "local"}
    with own_gemms(), engine_of(folder, local, ports[3]) as engine:
        answers(engine, "local observe", {**local, "mode": "observe"})
        answers(engine, "local", local)
    return report


DEMAND = {"select_top_k": None, "threshold": None, "tau": 1.0}
DEMAND_POLICIES = {
    "all kept": {**DEMAND, "min_primary_experts": 64},
    "observe": {**DEMAND, "mode": "observe", "min_primary_experts": 0},
    "off": {**DEMAND, "mode": "off"},
    "fewest": {**DEMAND, "min_primary_experts": 0},
}


def exercise_demand(rank, ports, folder, key, requests, tokens, rule):
    """Stock, then an engine under a rule of demand, whose policies change: answers, counters."""
    choose_rank(rank)
    from tests.engine.conftest import generate

    report = {}
    with engine_of(folder, None, ports[0]) as engine:
        report["stock"] = generate(engine, requests[rank], tokens=tokens[rank])[0]
    key = {**key, **DEMAND, "rule": rule, "similarity": with_stand_ins(folder, rank)}
    with engine_of(folder, key, ports[1]) as engine:
        for name, changes in DEMAND_POLICIES.items():
            policy = {**key, **changes}
            given, counters = under(engine, policy, requests[rank], tokens[rank])
            report[name] = {"answers": given, "counters": counters["decode_only"]}
    return report


SHARDED = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
SHARDED_POLICIES = {
    "S=K": {"select_top_k": 4},
    "observe": {"mode": "observe"},
    "off": {"mode": "off"},
    "S=1": {},
}


def exercise_sharded(rank, ports, folder, key, requests, tokens):
    """Stock with two workers a rank, then engines under ``sere`` and ``margin``."""
    choose_rank(rank)
    from tests.engine.conftest import generate

    with engine_of(folder, None, ports[0], **SHARDED) as engine:
        report = {"stock": generate(engine, requests[rank], tokens=tokens[rank])[0]}
    key = {**key, "tensor_and_data_parallel": True}
    margin = {**key, **DEMAND, "rule": "margin"}
    rules = ((key, SHARDED_POLICIES), (margin, DEMAND_POLICIES))
    for port, (of_rule, policies) in zip(ports[1:], rules, strict=True):
        with engine_of(folder, of_rule, port, **SHARDED) as engine:
            for name, changes in policies.items():
                asked = under(engine, {**of_rule, **changes}, requests[rank], tokens[rank])
                report[of_rule.get("rule", "sere"), name] = asked
    return report


BALANCED = {
    "enable_eplb": True,
    "eplb_config": {
        "num_redundant_experts": 2,
        "window_size": 8,
        "step_interval": 8,  # experts move several times within the answers
        "use_async": False,
    },
}


def exercise_balanced(rank, ports, folder, key, requests, tokens):
    """Engines with vLLM's load balancer: stock, and with the key."""
    choose_rank(rank)
    from tests.engine.conftest import generate

    report = {}
    with engine_of(folder, None, ports[0], **BALANCED) as engine:
        report["stock"] = generate(engine, requests[rank], tokens=tokens[rank])[0]
    for number, dispatch in enumerate(({}, {"union": "local"}), start=1):
        policy = {**key, **dispatch}
        with engine_of(folder, policy, ports[number], **BALANCED) as engine:
            for size in (4, 1):
                changed = {**policy, "select_top_k": size}
                name = policy.get("union", "global"), size
                report[name] = under(engine, changed, requests[rank], tokens[rank])
    return report


def switch_policies(engine, rank, key, switches=1000):
    """Each rank sets the same policies in the same order, at steps of its own."""
    from vllm import SamplingParams

    from sere_ray.engine.control import calls_of
    from tests.engine.conftest import prompts

    changes = [{}, {"select_top_k": 2}, {"threshold": 0.9}, {"mode": "off"}, {"select_top_k": 4}]
    rng, done, core = random.Random(rank), 0, engine.llm_engine
    sampling = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True, detokenize=False)
    for turn in range(3):  # 3 x 400 passes
        for number, request in enumerate(prompts(4 + 3 * rank, seed=turn)):
            core.add_request(f"{turn}-{number}", request, sampling)
        while core.has_unfinished_requests():
            core.step()
            for _ in range(min(rng.randint(0, 2), switches - done)):
                policy = {**key, **changes[done % len(changes)]}
                calls_of(engine).set_policy(policy)
                done += 1
    assert done == switches
