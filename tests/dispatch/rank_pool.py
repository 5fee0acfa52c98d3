"""Gloo ranks that live as long as a test module and run one function after the other."""

import faulthandler
import importlib
import traceback
from datetime import timedelta

from tests.engine.ranks import process_context

TIME_LIMIT = 100
"""Seconds until a rank that hangs writes where, and dies."""
TIMEOUT = timedelta(seconds=4)
"""Of an exchange."""


class RankPool:
    """``ranks`` processes with a gloo group; functions are named, as processes are new ones."""

    def __init__(self, ranks, port):
        context = process_context()
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            self.pipes.append(here)
            arguments = (there, rank, ranks, port)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
        for process in self.processes:
            process.start()

    def run(self, function, *arguments, but=()):
        """What ``function(ranks, *arguments)`` returns, by rank; not waited for in ``but``."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if rank in but:
                continue
            assert pipe.poll(TIME_LIMIT + 10), f"rank {rank} hangs"
            value, error = pipe.recv()
            assert error is None, f"rank {rank}:\n{error}"
            answers.append(value)
        return answers

    def close(self):
        for process in self.processes:
            process.kill()
            process.join(10)


class Ranks:
    """What a function gets: its rank and groups."""

    def __init__(self, rank, size, port):
        import torch.distributed as dist

        from sere_ray.dispatch import Greeting

        address = f"tcp://127.0.0.1:{port}"
        # They start one after the other, so they meet with a longer limit than they exchange with.
        patient = timedelta(seconds=90)
        dist.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=size, timeout=patient
        )
        self.rank, self.size = rank, size
        self.group, second = (
            dist.new_group(list(range(size)), backend="gloo", timeout=TIMEOUT) for _ in range(2)
        )
        self.greeting = Greeting(second, TIMEOUT)


def _serve(pipe, rank, size, port):
    import torch

    torch.set_num_threads(1)
    ranks = Ranks(rank, size, port)
    while True:
        module, name, arguments = pipe.recv()
        faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
        try:
            pipe.send((getattr(importlib.import_module(module), name)(ranks, *arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
