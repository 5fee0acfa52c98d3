"""The union over ranks of a GPU engine, without a GPU: its kernels run in the emulator.

Two ranks take turns at what vLLM lets them do in a pass. The engines themselves:
``test_gpu_expert_parallel.py``.
"""

import functools
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.engine.gpu import device_rule
from sere_ray.engine.gpu.rank_group import RankGroup
from sere_ray.engine.gpu.rank_words import read_words, write_words
from sere_ray.engine.gpu.state import CudaState
from sere_ray.engine.gpu.union import NO_ROWS
from sere_ray.kernel.across_ranks import Placement
from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.memory import STEP
from sere_ray.policy.policy import Policy
from sere_ray.policy.startup import Startup
from sere_ray.rules import EXACT, PADDING, REROUTABLE, count, sere
from sere_ray.rules.gate import PLAIN
from sere_ray.util.errors import ArtifactError, PolicyError, UnsupportedError
from sere_ray.util.ports import free_port
from tests.engine.ranks import RANKS, gloo_group, run_ranks
from tests.kernel.emulator import COMPILER, launch_packed
from tests.kernel.kernel_cases import check_aligned, check_local_alignment, library
from tests.kernel.margin_cases import EMULATED, by_reference
from tests.kernel.spare_cases import make_statistics

E, K, LAYERS, MAX_ROWS = 16, 4, (0, 2), 64
RULE = "PPPqPPPPPPPPq"
LOGITS = "PqPqq"
SIGNATURES = {
    "reroute": RULE + LOGITS,
    "reroute_and_align": RULE + LOGITS + "qPqPP",
    "route_and_align": "PPqP" + RULE + "qPqPP",
    "reroute_gathered": RULE + "PPq",
    "reroute_gathered_and_align": RULE + "PPq" + "qPqPP",
    "lowest_slot_orders": RULE + "P",
    "reroute_by_slot_orders": RULE + "PP",
    "ask_of_ranks": RULE + LOGITS + "P",
    "reroute_by_asked": RULE + LOGITS + "PPP",
    "map_to_copies": "PPqPPqPqqPPP",
}


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 64])
def test_words_are_read_as_they_were_written(rows):
    kinds = np.random.default_rng(rows).choice([REROUTABLE, EXACT], rows).astype(np.int8)
    words = write_words(7, 0xFFFFFFFE, kinds, 64)
    assert words.shape == (3 + 2,)
    assert words.dtype == np.int32
    version, checksum, found = read_words(words)
    assert (version, checksum) == (7, 0xFFFFFFFE)
    assert found.dtype == np.int8
    assert (found == kinds).all()


def sync_pass(rank, port, tokens):
    """vLLM's own agreement on a pass, with our words in it."""
    gloo_group(rank, port)
    import torch.distributed as dist
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu import dp_utils
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    from sere_ray.engine.gpu.union_patches import carried_along

    class Group:
        cpu_group = dist.group.WORLD

    dp_utils.get_dp_group = Group
    kinds = np.full(tokens[rank], REROUTABLE, np.int8)
    mine = write_words(rank, 0xFFFFFFFF - rank, kinds, 40)
    wanted = BatchExecutionDescriptor(CUDAGraphMode.NONE, tokens[rank], 1)
    real = dp_utils.dist
    with carried_along(mine, rank) as carried:
        _, agreed = dp_utils.sync_cudagraph_and_dp_padding(
            None, wanted, tokens[rank], 1, 1, RANKS, rank
        )
    assert dp_utils.dist is real
    found = [read_words(column) for column in carried().T]
    sizes = None if agreed is None else agreed.num_tokens_across_dp.tolist()
    return [(w.version, w.checksum, w.kinds.tolist()) for w in found], sizes


@pytest.mark.parametrize("tokens", [(3, 33), (0, 1), (0, 0)])
def test_words_travel_in_the_table_that_vllm_sums(tokens):
    words = [(rank, 0xFFFFFFFF - rank, [REROUTABLE] * tokens[rank]) for rank in range(RANKS)]
    expected = words, list(tokens) if any(tokens) else None
    assert run_ranks(sync_pass, free_port(), tokens) == [expected] * RANKS


def test_a_pass_without_that_sum_is_refused():
    from sere_ray.engine.gpu.union_patches import carried_along

    with (
        carried_along(write_words(0, 0, NO_ROWS, 32), 0) as carried,
        pytest.raises(UnsupportedError, match="did not agree on this pass"),
    ):
        carried()


# --- passes ---------------------------------------------------------------------------------------


@pytest.fixture
def emulated(monkeypatch, tmp_path_factory):
    """Launches run in the emulator, one at a time: it is one GPU."""
    cache, one_at_a_time = tmp_path_factory.getbasetemp() / "kernels", threading.Lock()

    def run(kernel, name, topk_ids, arguments, *, early=True, blocks=1):
        with one_at_a_time:
            values = [int(argument) for argument in arguments]
            code = library(kernel, name, 64, cache)
            signature = SIGNATURES[name] + ("Pq" if kernel.masks else "")
            launch_packed(code, name, signature, values, 64, cluster=blocks, seed=1)

    def arguments(kernel, topk_ids, new_ids, topk_weights, layer):
        step = layer.step.buffer.data_ptr()
        return (
            topk_ids.data_ptr(),
            new_ids.data_ptr(),
            topk_weights.data_ptr(),
            topk_ids.shape[0],
            layer.tables.neighbours.data_ptr(),
            layer.tables.similarity.data_ptr(),
            layer.tables.stand_ins.data_ptr(),
            layer.tables.stand_in_of.data_ptr(),
            layer.settings.data_ptr(),
            step,
            step + STEP.size,
            layer.counters.data_ptr(),
            layer.counters.stride(0),
        )

    monkeypatch.setattr(RuleKernel, "launch", run)
    monkeypatch.setattr(RuleKernel, "arguments", arguments)
    monkeypatch.setattr(RuleKernel, "load", lambda kernel, device, names: None)
    monkeypatch.setattr(device_rule, "blocks_of_margin", lambda rows, device: 2)


class Group:
    """Two data-parallel ranks of ``workers`` each, in one process: a thread each where they meet.

    Workers of a rank have ``shards`` of its rows: one each, or, with one shard, all of them.
    """

    def __init__(
        self, before_dispatch=False, copies=None, startup=None, workers=1, shards=1, **keys
    ):
        generator = torch.Generator().manual_seed(1)
        self.similarity = {i: torch.rand(E, E, generator=generator) for i in LAYERS}
        self.statistics = {i: make_statistics(E, "similar", i) for i in LAYERS}
        metadata = ArtifactMetadata(
            model_id="m",
            architecture="a",
            num_experts=E,
            top_k=K,
            router_fingerprint=dict.fromkeys(LAYERS, "0"),
            metric="random",
            date="2026-11-22",
        )
        self.key = {"similarity": "f", "select_top_k": 1, "min_primary_experts": 0, **keys}
        artifact = SimilarityArtifact(self.similarity, metadata, self.statistics)
        self.workers, self.shards, everyone = workers, shards, range(RANKS * workers)
        self.groups = [everyone if shards > 1 else everyone[i::workers] for i in range(workers)]
        self.barriers = [threading.Barrier(len(group), timeout=60) for group in self.groups]
        self.vectors = {}
        self.states = [
            CudaState(
                Policy.parse({**self.key, **(copies[rank] if copies else {})}),
                artifact if self.key["similarity"] else None,
                K,
                E,
                MAX_ROWS,
                torch.device("cpu"),
                startup=startup or Startup(),
                decoder_layers=LAYERS[-1] + 2,
                ranks=RankGroup(
                    rank=self.group(rank).index(rank),
                    num_ranks=len(self.group(rank)),
                    shards=shards,
                    exchange=functools.partial(self.exchange, rank, torch.minimum),
                    add_up=functools.partial(self.exchange, rank, torch.add),
                    connect=lambda: None,
                    before_dispatch=before_dispatch,
                ),
            )
            for rank in everyone
        ]
        for state in self.states:
            state.gates.known.update(dict.fromkeys(LAYERS, PLAIN))
        owner = (torch.arange(E) * len(everyone) // E).to(torch.uint8)
        self.placements = []
        for rank in everyone:
            mine = owner == rank
            local_ids = torch.where(mine, mine.cumsum(0) - 1, -1).int()
            self.placements.append(Placement(local_ids, owner, len(everyone)))
            self.states[rank].union.owners.update(dict.fromkeys(LAYERS, owner))

    def group(self, rank):
        """Those whose rows are gathered for a worker."""
        return self.groups[rank % self.workers]

    def exchange(self, rank, combine, numbers):
        place = 0 if self.shards > 1 else rank % self.workers
        self.vectors[rank] = numbers.clone()
        self.barriers[place].wait()
        combined = functools.reduce(combine, (self.vectors[other] for other in self.group(rank)))
        self.barriers[place].wait()
        numbers.copy_(combined)

    def run_pass(self, kinds, sizes, *, seed=0, block=16, gathers=True):
        """Returns per layer: gathered ids before, weights, ids after (of each rank)."""
        for rank, state in enumerate(self.states):
            state.union.next_kinds = np.array(kinds[rank // self.workers], dtype=np.int8)
        for place in range(self.workers):  # vLLM's sum, of the workers with this place
            states = self.states[place :: self.workers]
            table = np.stack([state.words() for state in states], axis=1)
            for state in states:
                state.begin_pass(table, list(sizes))
        return {i: self.run_layer(i, kinds, sizes, seed, block, gathers) for i in LAYERS}

    def run_layer(self, layer, kinds, sizes, seed, block, gathers):
        generator = torch.Generator().manual_seed(seed * 100 + layer)
        ids, weights, logits = [], [], []
        for rank, size in enumerate(sizes):
            length = -(-size // self.shards)
            scores = torch.zeros(length * self.shards, E)
            scores[:size] = torch.rand(size, E, generator=generator)
            for worker in range(self.workers):
                first = length * (worker % self.shards)
                of_worker = scores[first : first + length].clone()
                top = of_worker.topk(K, sorted=False)
                chosen = top.indices.int()
                chosen[len(kinds[rank]) :] = -1  # as vLLM marks padding, by the first rows' mask
                ids.append(chosen)
                weights.append(top.values.contiguous())
                logits.append(of_worker)
        before = torch.cat([ids[rank] for rank in self.groups[0]])

        def before_gather(rank):
            self.states[rank].route_layer(
                layer,
                ids[rank],
                weights[rank],
                placement=self.placements[rank] if gathers else None,
                sorts=block is not None,
                logits=logits[rank],
            )

        everyone = range(len(self.states))
        threads = [threading.Thread(target=before_gather, args=(r,)) for r in everyone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        after = []
        for rank, state in enumerate(self.states):
            gathered = torch.cat([ids[other] for other in self.group(rank)])
            all_weights = torch.cat([weights[other] for other in self.group(rank)])
            if gathers:
                state.take_gathered(gathered, all_weights)
                if block:
                    aligned = state.align(gathered, block, True)
                    check_local_alignment(gathered, aligned, block, self.placements[rank].local_ids)
            state.check_nothing_deferred()
            after.append(gathered)
        self.logits = torch.cat([logits[rank] for rank in self.groups[0]])  # of the last layer
        return before, all_weights, after


def saved(artifact):
    """What a client sends."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        artifact.save(file.name)
        return Path(file.name).read_bytes()


def padded(kinds, sizes):
    rows = [
        np.pad(np.array(k, np.int8), (0, n - len(k))) for k, n in zip(kinds, sizes, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows))


def rule_of(policy, rows):
    """The numbers for a step of so many re-routable rows."""
    own = next((e for e in policy.get("by_rows", ()) if rows <= e["up_to"]), {})
    names = ("select_top_k", "threshold", "min_primary_experts")
    return {name: {**policy, **own}.get(name) for name in names}


D, X = REROUTABLE, EXACT
PASSES = {
    "full": ([[D] * 8, [D] * 8], [8, 8]),
    "padded": ([[D] * 3, [D] * 7], [8, 8]),
    "mixed": ([[D] * 3 + [X] * 5, [D] * 2], [8, 8]),
    "uneven": ([[D] * 3, [D] * 30 + [X] * 4], [3, 34]),
    "an idle rank": ([[D] * 5, []], [8, 8]),
    "the other": ([[], [D] * 5], [1, 5]),
    "prompts only": ([[X] * 5, [X] * 2], [5, 2]),
    "nobody": ([[], []], [8, 8]),
}
BY_ROWS = [{"up_to": 6, "select_top_k": 2}, {"up_to": 12, "threshold": 0.9}]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernel with")


@needs_compiler
@pytest.mark.parametrize("way", ["gathered", "unsorted", "before", "elsewhere"])
@pytest.mark.parametrize(
    "keys", [{}, {"threshold": 0.9, "min_primary_experts": 3}, {"by_rows": BY_ROWS}]
)
def test_one_union_whatever_the_way(emulated, way, keys):
    group = Group(before_dispatch=way == "before", **keys)
    options = {"block": None if way == "unsorted" else 16, "gathers": way != "elsewhere"}
    sums = {name: np.zeros((len(LAYERS), 4), np.int64) for name in ("decode_only", "mixed")}
    steps, decode_rows = dict.fromkeys(sums, 0), dict.fromkeys(sums, 0)
    for seed, (kinds, sizes) in enumerate(PASSES.values()):
        row_kind = padded(kinds, sizes)
        name = "mixed" if EXACT in row_kind else "decode_only"
        active = REROUTABLE in row_kind
        steps[name] += active
        decode_rows[name] += int((row_kind == REROUTABLE).sum())
        passed = group.run_pass(kinds, sizes, seed=seed, **options)
        for position, (layer, (before, weights, after)) in enumerate(passed.items()):
            similarity = group.similarity[layer]
            rule = rule_of(group.key, int((row_kind == REROUTABLE).sum()))
            new = before
            if active:
                arguments = (before, weights, similarity)
                new = sere.reroute(*arguments, row_kind=row_kind, **rule)
                rerouting = sere.find_rerouting(*arguments, row_kind=row_kind, **rule)
                counts = count(rerouting, before, new, row_kind)
                sums[name][position] += [int(n) for n in counts]
            for of_rank in after:
                assert torch.equal(of_rank, new)
    reports = [state.read_counters(reset=True) for state in group.states]
    for name, expected in sums.items():
        for report in reports:
            assert report[name]["steps"] == steps[name]
            assert report[name]["steps_counted"] == steps[name]
            for column in (0, 1, 3):
                field = ("experts_before", "experts_after", "", "critical_kept")[column]
                assert report[name][field] == expected[:, column].tolist()
            if options["gathers"]:
                gathered = report["gathered"][name]
                assert gathered["steps"] == steps[name]
                assert gathered["experts_read"] == expected[:, 1].tolist()
                busiest = np.array(gathered["busiest_read"])
                assert (busiest <= expected[:, 1]).all()
                assert (2 * busiest >= expected[:, 1]).all()
            if way in ("gathered", "unsorted"):
                assert report[name]["experts_max_rank_before"] == gathered["busiest_before"]
                assert report[name]["experts_max_rank_after"] == gathered["busiest_read"]
            else:
                assert report[name]["experts_max_rank_after"] is None
            assert report[name]["bytes_dispatched_after"] is None
        slots = zip(*(report[name]["slots_rerouted"] for report in reports), strict=True)
        assert list(map(sum, slots)) == expected[:, 2].tolist()
        assert sum(report[name]["decode_rows"] for report in reports) == decode_rows[name]
    cleared = group.states[0].read_counters(reset=False)
    assert cleared["decode_only"]["steps"] == 0
    assert not any(cleared["gathered"]["decode_only"]["experts_read"])


@needs_compiler
def test_local_union_is_that_of_the_own_rows_and_counts_what_all_read(emulated):
    group = Group(union="local", by_rows=BY_ROWS)
    kinds, sizes = PASSES["padded"]  # 3 and 7 rows
    row_kind = padded(kinds, sizes)
    slots = np.zeros(RANKS, np.int64)
    for position, (layer, (before, weights, after)) in enumerate(
        group.run_pass(kinds, sizes).items()
    ):
        parts = []
        for rank in range(RANKS):
            rows = slice(rank * 8, rank * 8 + 8)
            part = sere.reroute(
                before[rows],
                weights[rows],
                group.similarity[layer],
                row_kind=row_kind[rows],
                **rule_of(group.key, len(kinds[rank])),
            )
            slots[rank] += int((part != before[rows]).sum())
            parts.append(part)
        new = torch.cat(parts)
        for of_rank in after:
            assert torch.equal(of_rank, new)
        read = new[row_kind != PADDING].unique()
        busiest = read.div(E // 2, rounding_mode="floor").bincount().max()
        for state in group.states:
            gathered = state.read_counters(reset=False)["gathered"]["decode_only"]
            assert gathered["experts_read"][position] == len(read)
            assert gathered["busiest_read"][position] == int(busiest)
    for rank, state in enumerate(group.states):
        report = state.read_counters(reset=False)
        assert sum(report["decode_only"]["slots_rerouted"]) == slots[rank]


MARGIN = {"rule": "margin", "select_top_k": None, "tau": 0.05, "min_primary_experts": 2}
SPARE = {**MARGIN, "rule": "spare", "tau": 0.2, "limit": 0.1, "lead": 0.5, "protect": False}


BALANCED = {**MARGIN, "balance_ranks": True}


@needs_compiler
@pytest.mark.parametrize(
    ("keys", "union", "gathers"),
    [
        (keys, union, gathers)
        for keys in (MARGIN, SPARE, BALANCED)
        for union in (("global",) if keys is BALANCED else ("global", "local"))
        for gathers in (True, False)
    ],
)
def test_ids_and_weights_change_before_they_are_sent(emulated, union, gathers, keys):
    group, slots = Group(union=union, **keys), 0
    bound = group.states[0].bound
    for seed, (kinds, sizes) in enumerate(PASSES.values()):
        row_kind, first = padded(kinds, sizes), sizes[0]
        before, weights, after = group.run_pass(kinds, sizes, seed=seed, gathers=gathers)[2]
        ranks = [slice(0, first), slice(first, None)]
        # weights were changed in place: the logits give them again
        given = group.logits.gather(1, before.long().clamp(min=0))
        wanted, of_ranks = [], []
        for rows in ranks if union == "local" else [slice(None)]:
            arguments = (before[rows], given[rows], group.logits[rows], row_kind[rows])
            last = len(LAYERS) - 1
            owner = group.placements[0].owner.long()
            knobs = bound.of_layer(last, E, None, owner, group.statistics[LAYERS[last]])
            ids, new_weights, counts = by_reference(*arguments, knobs, EMULATED, rule=keys["rule"])
            wanted.append(ids)
            of_ranks.append(counts)
            known = row_kind[rows] != PADDING
            torch.testing.assert_close(weights[rows][known], new_weights[known])
        for of_rank in after:
            assert torch.equal(of_rank, torch.cat(wanted))
        found = np.array([state.own.counters.sum(0)[1].tolist() for state in group.states])
        for state in group.states:
            state.own.counters.zero_()
        of_ranks = np.array(of_ranks)
        assert (found[:, :2] == of_ranks[:, :2]).all()
        assert found[:, 2].sum() == of_ranks[:, 2].sum()
        slots += of_ranks[:, 2].sum()
    assert slots > 20


@needs_compiler
@pytest.mark.parametrize("rule", [{}, {"rule": "margin", "select_top_k": None, "tau": 0.5}])
def test_layers_that_a_table_routes_stay_exact(emulated, rule):
    """Under either rule, over all ranks; their experts are counted alike before and after."""
    group, exact = Group(**rule), LAYERS[0]
    for state in group.states:
        del state.gates.known[exact]
        state.gates.exact.add(exact)
        state.rule.note_gates(state.gates.known, state.gates.exact)
    passed = group.run_pass(*PASSES["full"])
    for layer, (before, _, after) in passed.items():
        for of_rank in after:
            assert torch.equal(of_rank, before) == (layer == exact)
    for state in group.states:
        before, after, changed = (int(n) for n in state.read_layer_counters()[:, 0, :3].sum(0))
        assert before == after > 0
        assert changed == 0


@needs_compiler
def test_a_gate_without_scores_refuses_margin(emulated, has_words):
    state = Group(union="local").states[0]
    margin = {"similarity": "f", "rule": "margin", "tau": 0.1, "union": "local"}
    logits = torch.zeros(3, E)
    assert state.scores_of(0, logits) is logits
    state.note_gate(0, SimpleNamespace(scoring_func="sigmoid"))  # no router of vLLM's
    assert state.scores_of(0, logits) is None
    with pytest.raises(UnsupportedError) as caught:
        state.set_policy(margin)
    has_words(str(caught.value), "sere.rule = 'margin'", "known scores", "layer 0", "rule = 'sere'")
    running = Group(union="local", rule="margin", select_top_k=None, tau=0.1).states[0]
    with pytest.raises(UnsupportedError, match="needs a gate"):
        running.scores_of(2, logits.half())


@needs_compiler
def test_what_follows_from_statistics_follows_the_artifact(emulated, has_words):
    """Rules that take turns in one engine, then another artifact, then one without statistics."""
    group = Group(**SPARE)
    layers = {i: matrix.clone().fill_diagonal_(1.0) for i, matrix in group.similarity.items()}
    artifact = replace(group.states[0].artifact, layers=layers)
    rest = (K, E, MAX_ROWS, torch.device("cpu"))
    nothing = dict.fromkeys(("lead", "limit", "protect"))
    by_layer, by_margin = {**group.key, **nothing}, {**group.key, **nothing, **MARGIN}
    by_sere = {**by_margin, "rule": "sere", "select_top_k": 1, "tau": None}
    foreign = {i: make_statistics(E, "foreign", i) for i in LAYERS}
    other = replace(artifact, statistics=foreign)
    state = CudaState(Policy.parse(group.key), artifact, *rest)
    for key in (by_margin, by_sere, by_layer):
        state.set_policy(key)
        expected = CudaState(Policy.parse(key), artifact, *rest)
        assert torch.equal(state.rule.settings.buffer, expected.rule.settings.buffer)
    before = state.rule.settings.buffer.clone()
    state.set_policy(by_layer, saved(other))
    expected = CudaState(Policy.parse(by_layer), other, *rest)
    assert torch.equal(state.rule.settings.buffer, expected.rule.settings.buffer)
    assert not torch.equal(state.rule.settings.buffer, before)
    for layer in LAYERS:
        for found, wanted in zip(
            state.rule.tables[layer], expected.rule.tables[layer], strict=True
        ):
            assert torch.equal(found, wanted)
    with pytest.raises(ArtifactError) as caught:
        state.set_policy(by_layer, saved(replace(artifact, statistics={})))
    has_words(str(caught.value), "'spare'", "--statistics directed")
    bare = CudaState(Policy.parse(by_sere), replace(artifact, statistics={}), *rest)
    with pytest.raises(PolicyError) as caught:
        bare.set_policy(by_sere, saved(other))
    has_words(str(caught.value), "directed_loss", "restart")


@needs_compiler
@pytest.mark.parametrize("block", [8, 48])
def test_slots_of_a_lone_rank_are_sorted_where_blocks_are_a_power_of_two(emulated, block):
    """Marlin's blocks of 48 are sorted by vLLM, behind ids that are re-routed all the same."""
    lone, similarity = Group(), Group().similarity
    state = CudaState(
        Policy.parse(lone.key), lone.states[0].artifact, K, E, MAX_ROWS, torch.device("cpu")
    )
    rows = 12
    logits = torch.rand(rows, E, generator=torch.Generator().manual_seed(3))
    top = logits.topk(K)
    ids, weights = top.indices.int(), top.values.contiguous()
    kinds = torch.full((rows,), REROUTABLE, dtype=torch.int8)
    wanted = sere.reroute(
        ids, weights, similarity[LAYERS[0]], row_kind=kinds, select_top_k=1, min_primary_experts=0
    )
    assert not torch.equal(wanted, ids)
    state.begin_step(kinds.numpy())
    state.reroute(LAYERS[0], ids, weights, None, sorts=True)
    aligned = state.align(ids, block)
    assert torch.equal(ids, wanted)
    if block == 48:
        assert aligned is None
    else:
        check_aligned(ids, aligned, block, E)
    state.check_nothing_deferred()


@needs_compiler
def test_policies_switch_in_the_same_pass_on_all_ranks(emulated):
    group = Group()
    kinds, sizes = PASSES["full"]
    first, second = group.states
    off = {**group.key, "mode": "off"}
    first.set_policy(off)
    changed = [not torch.equal(b, a[0]) for b, _, a in group.run_pass(kinds, sizes).values()]
    assert all(changed), "the other rank was not told yet"
    second.set_policy(off)
    for before, _, after in group.run_pass(kinds, sizes).values():
        for of_rank in after:
            assert torch.equal(of_rank, before)
    assert [list(state.versions.told) for state in group.states] == [[1], [1]]


@needs_compiler
def test_a_step_of_one_rank_has_the_numbers_for_its_rows(emulated):
    group = Group()
    artifact, key = group.states[0].artifact, {**group.key, "by_rows": BY_ROWS}
    rest = (artifact, K, E, MAX_ROWS, torch.device("cpu"))
    state = CudaState(Policy.parse(key), *rest)
    for kinds in ([D] * 3 + [X] * 20, [D] * 9, [D] * 20, [D], [X]):
        state.begin_step(np.array(kinds, dtype=np.int8))
        rule = rule_of(key, kinds.count(D))
        expected = CudaState(Policy.parse({**group.key, **rule}), *rest)
        assert torch.equal(state.rule.settings.buffer, expected.rule.settings.buffer)
    state.set_policy({**group.key, "by_rows": [{"up_to": 40, "select_top_k": 3}]})
    state.begin_step(np.array([D], dtype=np.int8))
    expected = CudaState(Policy.parse({**group.key, "select_top_k": 3}), *rest)
    assert torch.equal(state.rule.settings.buffer, expected.rule.settings.buffer)


@needs_compiler
def test_ranks_agree_wherever_their_copies_of_the_artifact_lie(emulated):
    """Each replica of a deployment keeps one of its own."""
    group = Group(copies=[{"similarity": f"copy {rank}"} for rank in range(RANKS)])
    table = np.stack([state.words() for state in group.states], axis=1)
    for state in group.states:
        state.begin_pass(table, [1, 1])


@needs_compiler
def test_ranks_that_were_told_different_policies_all_raise(emulated):
    group = Group()
    for s, state in enumerate(group.states, start=1):
        state.set_policy({**group.key, "select_top_k": s})
    table = np.stack([state.words() for state in group.states], axis=1)
    for state in group.states:
        with pytest.raises(PolicyError, match="ranks differ in their policies"):
            state.begin_pass(table, [1, 1])


@needs_compiler
def test_refusals_of_a_running_engine(emulated):
    group = Group()
    state = group.states[0]
    with pytest.raises(PolicyError, match=r"sere.union = 'local': captured graphs hold 'global'"):
        state.set_policy({**group.key, "union": "local"})
    assert state.versions.newest == 0
    group.run_pass(*PASSES["full"])
    ids, weights = torch.zeros((1, K), dtype=torch.int32), torch.ones((1, K))
    placement = group.placements[0]
    with pytest.raises(UnsupportedError, match="in another way than layers before it"):
        state.route_layer(0, ids, weights, placement=None, sorts=False)
    state.route_layer(0, ids, weights, placement=placement, sorts=True)
    with pytest.raises(UnsupportedError, match="layer 0 were not gathered"):
        state.words()
