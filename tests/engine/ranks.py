"""Data-parallel ranks: a process each, which runs an engine inside itself, as a test asks.

The processes are new: a rank is chosen by environment variables, and torch's process groups live
as long as their process. Without a GPU they are forks of one that has imported vLLM and nothing
more, which spares each of them about 10 s.
"""

import faulthandler
import multiprocessing
import os
import queue
import time
from contextlib import suppress
from multiprocessing import forkserver
from unittest import mock

RANKS = 2
TIME_LIMIT = 400
"""Seconds until a rank that hangs writes where, and dies."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}
"""Of every rank, as it starts."""


def run_ranks(target, *arguments, time_limit=TIME_LIMIT, lost=()):
    """Call ``target(rank, *arguments)`` in a process for each rank.

    Args:
        target: a function of a module.
        arguments: of it.
        time_limit: seconds a rank may take.
        lost: ranks that will not answer; they may hang. The others must end by themselves.

    Returns:
        What each call returns, by rank. Fails if one raises or hangs.
    """
    context = process_context()
    results = context.Queue()
    processes = [
        context.Process(target=_run, args=(target, rank, arguments, results, time_limit))
        for rank in range(RANKS)
    ]
    with mock.patch.dict(os.environ, ENVIRONMENT):
        for process in processes:
            process.start()
    try:
        found = {}
        while len(found) < RANKS - len(lost):
            rank, value = results.get(timeout=time_limit + 10)
            assert not isinstance(value, str), f"rank {rank}:\n{value}"
            found[rank] = value
        for rank in found:
            processes[rank].join(30)
            assert processes[rank].exitcode is not None, f"rank {rank} does not end"
    except queue.Empty:
        raise AssertionError("a rank hangs; its stack is in the captured output") from None
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
    return [found[rank] for rank in sorted(found)]


def process_context():
    """Of processes that are new and have imported vLLM already; one server of them for each test
    process, as Python has no more."""
    import torch

    if torch.cuda.is_available():  # where forks have not been tried
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"])
    with mock.patch.dict(os.environ, ENVIRONMENT):  # forks get those of the server as it starts
        forkserver.ensure_running()
    return context


def fork_workers():
    """A patch: vLLM's executor starts the workers of an engine as ranks are started here."""
    from vllm.v1.executor import multiproc_executor

    return mock.patch.object(multiproc_executor, "get_mp_context", process_context)


def _run(target, rank, arguments, results, time_limit):
    import traceback

    faulthandler.dump_traceback_later(time_limit, exit=True)
    try:
        results.put((rank, target(rank, *arguments)))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise


def gloo_group(rank, port):
    """The default process group, without vLLM."""
    import torch.distributed as dist

    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    return dist.group.WORLD


def run_rounds(rank, port, folder, options, rounds):
    """An engine of one rank, and per round: set a policy, generate, read what happened.

    Args:
        rank: of this process.
        port: the same free port on all ranks.
        folder: a checkpoint.
        options: of the engine, the ``sere`` key among them.
        rounds: dictionaries of ``policy``, ``requests`` (a list per rank), ``tokens`` (per rank).

    Returns:
        Per round ``answers``, ``counters`` and ``calls``: every call of the rule as (layer, ids,
        weights, kinds, new ids).
    """
    _choose_rank(rank, port)
    from sere_ray.engine.control import calls_of, read_counters
    from tests.engine.conftest import generate, running_engine

    calls = _record()
    report = []
    with running_engine(folder, **options) as engine:
        for task in rounds:
            calls_of(engine).set_policy(task["policy"])
            read_counters(engine, reset=True)
            calls.clear()
            answers, _ = generate(engine, task["requests"][rank], tokens=task["tokens"][rank])
            report.append(
                {"answers": answers, "counters": read_counters(engine), "calls": list(calls)}
            )
    return report


def run_forced(rank, port, folder, options, policies, requests, answers):
    """An engine of one rank; log-probabilities along the given answers, per policy.

    Args:
        rank: of this process.
        port: the same free port on all ranks.
        folder: a checkpoint.
        options: of the engine, the ``sere`` key among them.
        policies: set one after the other.
        requests: a list per rank.
        answers: token ids per request, a list per rank.

    Returns:
        ``[requests, positions, vocabulary]`` float32 arrays.
    """
    _choose_rank(rank, port)
    from sere_ray.engine.control import calls_of
    from tests.engine import forced
    from tests.engine.conftest import running_engine

    found = []
    with running_engine(folder, **{**options, **forced.OPTIONS}) as engine:
        for policy in policies:
            calls_of(engine).set_policy(policy)
            found.append(forced.log_probs(engine, requests[rank], answers[rank]).numpy())
    return found


def lose_rank(rank, port, folder, options, request, how, lost):
    """An engine of one rank; the lost one gets a signal in the middle of its 30th layer.

    Returns:
        Message and seconds of the failure at a rank that is left.
    """
    _choose_rank(rank, port)
    from sere_ray.dispatch import AllToAll, MissingRankError
    from tests.engine.conftest import generate, running_engine

    dispatch, calls = AllToAll.dispatch, []

    def dispatch_or_die(*arguments, **keywords):
        calls.append(time.monotonic())
        if rank == lost and len(calls) == 30:
            os.kill(os.getpid(), how)
        return dispatch(*arguments, **keywords)

    with running_engine(folder, **options) as engine:
        generate(engine, [request], tokens=2)  # first calls compile
        calls.clear()
        AllToAll.dispatch = dispatch_or_die
        try:
            generate(engine, [request], tokens=40)
        except MissingRankError as error:
            return str(error), time.monotonic() - calls[-1]
    return "nothing was raised", 0.0


def _choose_rank(rank, port):
    os.environ.update(
        VLLM_DP_RANK=str(rank),
        VLLM_DP_RANK_LOCAL=str(rank),
        VLLM_DP_SIZE=str(RANKS),
        VLLM_DP_MASTER_IP="127.0.0.1",
        VLLM_DP_MASTER_PORT=str(port),
    )


def _record():
    from sere_ray.engine.cpu.state import CpuState

    calls = []
    choose = CpuState.choose

    def record(self, layer, topk_ids, topk_weights, router_logits, hidden):
        new_ids, new_weights = choose(self, layer, topk_ids, topk_weights, router_logits, hidden)
        kinds = self.row_kind[: topk_ids.shape[0]].tolist()
        calls.append((layer, topk_ids.tolist(), topk_weights.tolist(), kinds, new_ids.tolist()))
        return new_ids, new_weights

    CpuState.choose = record
    return calls
