"""`dispatch: all_to_all` in real CPU engines of two data-parallel ranks. In float32, see
`test_expert_parallel.py`, whose test of tokens also runs under it."""

import signal
from types import SimpleNamespace

import pytest

from sere_ray.dispatch import DISPATCH_COUNTS
from sere_ray.engine import checks
from sere_ray.engine.control import dispatch_report
from sere_ray.rules import EXACT, PADDING, REROUTABLE
from sere_ray.util.errors import PolicyError, UnsupportedError
from sere_ray.util.ports import free_port
from tests.engine.conftest import prompts, sere_key
from tests.engine.ranks import RANKS, lose_rank, run_ranks
from tests.engine.test_expert_parallel import parallel_rounds
from tests.engine.test_refusals import configure
from tests.models import NUM_EXPERTS

LAYERS = 4


@pytest.fixture(scope="module")
def rounds(checkpoint):
    """Uneven rounds under both dispatches: policy, and ranks' reports by dispatch and name."""
    folder = checkpoint("qwen3_moe")
    key = sere_key(folder, select_top_k=1, threshold=0.7, min_primary_experts=3)
    long, short = prompts(6, seed=1, length=(40, 90)), prompts(3, seed=2, length=(3, 9))
    tasks = {
        "one finishes early": (key, [long, short], [20, 4]),
        "one is idle": (key, [short, []], [9, 9]),
        "local": ({**key, "union": "local"}, [long, short], [6, 12]),
        "observe": ({**key, "mode": "observe"}, [short, long], [5, 5]),
        "off": ({**key, "mode": "off"}, [short, long], [5, 5]),
    }
    found = {}
    for dispatch in ("allgather", "all_to_all"):
        reports = parallel_rounds(
            folder,
            {**key, "dispatch": dispatch},
            [{"policy": p, "requests": r, "tokens": t} for p, r, t in tasks.values()],
            max_num_batched_tokens=64,  # prompts in chunks, so that steps are mixed
        )
        for i, name in enumerate(tasks):
            found[dispatch, name] = [reports[rank][i] for rank in range(RANKS)]
    return {name: task[0] for name, task in tasks.items()}, found


NAMES = ["one finishes early", "one is idle", "local", "observe", "off"]


@pytest.mark.engine
@pytest.mark.parametrize("name", NAMES)
def test_answers_and_choices_are_those_of_the_all_gather(rounds, name):
    _, found = rounds
    for ours, stock in zip(found["all_to_all", name], found["allgather", name], strict=True):
        assert ours["answers"] == stock["answers"]
        real = [[ids_of_real_rows(c) for c in of["calls"]] for of in (ours, stock)]
        assert real[0] == real[1]
        assert "dispatch" not in stock["counters"]


def ids_of_real_rows(call):
    layer, ids, _, kinds, new_ids = call
    rows = zip(ids, new_ids, kinds, strict=True)
    return layer, [row[:2] for row in rows if row[2] != PADDING]


@pytest.mark.engine
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_ids(rounds, name):
    policies, found = rounds
    reports = found["all_to_all", name]
    expected = [{"decode_only": {}, "mixed": {}} for _ in range(RANKS)]
    for calls in zip(*(report["calls"] for report in reports), strict=True):
        layer = calls[0][0]
        kinds = [kind for call in calls for kind in call[3]]
        for rank, call in enumerate(calls):
            seen = call[3] if policies[name].get("union") == "local" else kinds
            if REROUTABLE in seen:
                kind = "mixed" if EXACT in seen else "decode_only"
                total = expected[rank][kind].setdefault(layer, dict.fromkeys(DISPATCH_COUNTS, 0))
                for field, number in recount(calls, rank).items():
                    total[field] += number
    for rank, report in enumerate(reports):
        assert report["counters"]["dispatch"]["ranks"] == RANKS
        for kind in ("decode_only", "mixed"):
            counted = report["counters"][kind]["dispatch"]
            for field in DISPATCH_COUNTS:
                of_layers = [expected[rank][kind].get(i, {}).get(field, 0) for i in range(LAYERS)]
                assert counted[field] == of_layers, (kind, field)
            assert counted["calls"] == [report["counters"][kind]["steps"]] * LAYERS


def recount(calls, rank):
    """DISPATCH_COUNTS of one layer; experts are placed linearly."""

    def ranks_of(row):
        return {number * RANKS // NUM_EXPERTS for number in row}

    found = dict.fromkeys(DISPATCH_COUNTS, 0)
    for when, column in (("before", 1), ("after", 4)):
        real = [
            [
                [number for number in row if number >= 0]
                for row, kind in zip(call[column], call[3], strict=True)
                if kind != PADDING
            ]
            for call in calls
        ]
        if when == "after":
            found["rows"] = len(real[rank])
        for row in real[rank]:
            found[f"rows_sent_{when}"] += len(ranks_of(row) - {rank})
            found[f"rows_kept_{when}"] += rank in ranks_of(row)
        named = {number for rows in real for row in rows for number in row}
        reads = [len([n for n in named if ranks_of([n]) == {r}]) for r in range(RANKS)]
        found[f"experts_read_{when}"] = sum(reads)
        found[f"experts_read_max_{when}"] = max(reads)
    return found


@pytest.mark.engine
@pytest.mark.parametrize("dispatch", ["allgather", "all_to_all"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_rows_busiest_rank_and_bytes(rounds, dispatch, name):
    """The plain counters, from the ids that every rank saw."""
    policies, found = rounds
    reports = [report["counters"] for report in found[dispatch, name]]
    is_off, is_local = policies[name].get("mode") == "off", policies[name].get("union") == "local"
    calls = list(zip(*(report["calls"] for report in found[dispatch, name]), strict=True))
    for rank, report in enumerate(reports):
        assert report["top_k"] == len(calls[0][rank][1][0])
        for kind in ("decode_only", "mixed"):
            mine = [c for c in calls if kind_of_step(c, rank, local=is_local) == kind]
            of_layer = [[c for c in mine if c[rank][0] == layer] for layer in range(LAYERS)]
            assert report[kind]["steps"] == len(of_layer[0])
            assert report[kind]["steps_counted"] == (0 if is_off else len(of_layer[0]))
            rows = [sum(k != PADDING for k in c[rank][3]) for c in of_layer[0]]
            assert report[kind]["rows"] == sum(rows)
            for when in ("before", "after"):
                sent = [sum(sent_bytes(c, rank, dispatch, when) for c in of) for of in of_layer]
                assert report[kind][f"bytes_dispatched_{when}"] == sent
                most = [
                    0 if is_off else sum(recount(c, rank)[f"experts_read_max_{when}"] for c in of)
                    for of in of_layer
                ]
                if is_local:
                    most = None
                elif policies[name].get("mode") == "observe" and when == "after":
                    most = reports[0][kind]["experts_max_rank_after"]  # nothing moved: no ids tell
                    assert sum(most) <= sum(report[kind]["experts_max_rank_before"])
                assert report[kind][f"experts_max_rank_{when}"] == most


def kind_of_step(calls, rank, *, local):
    seen = calls[rank][3] if local else [kind for call in calls for kind in call[3]]
    if REROUTABLE not in seen:
        return None
    return "mixed" if EXACT in seen else "decode_only"


def sent_bytes(calls, rank, dispatch, when):
    """128 floats, and per slot a weight and an id. An all-gather sends padding, too."""
    row = 128 * 4 + 8 * len(calls[rank][1][0])
    if dispatch == "allgather":
        return len(calls[rank][1]) * row * (RANKS - 1)
    return recount(calls, rank)[f"rows_sent_{when}"] * row


@pytest.mark.engine
def test_re_routing_saves_rows_and_the_report_says_so(rounds):
    _, found = rounds
    counters = found["all_to_all", "one finishes early"][0]["counters"]
    report = dispatch_report(counters)
    assert 0 < report["bytes_dispatched_after"] < report["bytes_dispatched_before"]
    assert report["bytes_combined_after"] == report["rows_sent_after"] * 128 * 4
    assert report["experts_read_max_rank_after"] < report["experts_read_max_rank_before"]
    assert 1.0 <= report["destination_ranks_mean_after"] <= report["destination_ranks_mean_before"]
    assert report["experts_read_mean_after"] <= report["experts_read_max_rank_after"]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("how", "limit", "within"),
    [
        pytest.param(signal.SIGKILL, 60, 2, marks=pytest.mark.alone),
        (signal.SIGSTOP, 10, 2 * 10 + 4),
    ],
)
def test_a_lost_rank_is_named_and_nobody_waits_for_it(checkpoint, how, limit, within, has_words):
    folder = checkpoint("qwen3_moe")
    options = {
        "sere": sere_key(folder, dispatch="all_to_all"),
        "enable_expert_parallel": True,
        "distributed_executor_backend": "uni",
        "distributed_timeout_seconds": limit,
    }
    ((message, seconds),) = run_ranks(
        lose_rank, free_port(), folder, options, prompts(1)[0], how, 1, lost=(1,)
    )
    print(how.name, round(seconds, 2), message)
    has_words(message, "missing: 1.", "expert-parallel rank 0", "Restart all ranks")
    assert seconds < within


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["data_parallel_size = 1", "enable_expert_parallel = False", "leave it out"]),
        (
            {
                "data_parallel_size": 2,
                "enable_expert_parallel": True,
                "all2all_backend": "deepep_low_latency",
            },
            ["all2all_backend = 'deepep_low_latency'", "'allgather_reducescatter'"],
        ),
    ],
)
def test_where_no_rows_are_dispatched_by_it(checkpoint, has_words, options, words):
    moe = checkpoint("qwen3_moe")
    with pytest.raises(UnsupportedError) as error:
        configure(moe, sere_key(moe, dispatch="all_to_all"), **options)
    has_words(str(error.value), "sere.dispatch = 'all_to_all'", *words)


def test_gpus_are_refused(has_words):
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=2,
            enable_expert_parallel=True,
            all2all_backend="allgather_reducescatter",
        ),
        device_config=SimpleNamespace(device_type="cuda"),
    )
    with pytest.raises(UnsupportedError) as error:
        checks.check_all_to_all(config)
    has_words(str(error.value), "sere.dispatch = 'all_to_all'", "CPU engines", "captured graph")


def test_a_wrong_value(checkpoint, has_words):
    moe = checkpoint("qwen3_moe")
    with pytest.raises(PolicyError) as error:
        configure(moe, sere_key(moe, dispatch="alltoall"))
    has_words(str(error.value), "sere.dispatch = 'alltoall'", "'allgather' or 'all_to_all'")
