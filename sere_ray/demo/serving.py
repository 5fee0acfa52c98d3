"""The demo model behind Ray Serve's OpenAI routes on this machine, and requests to it."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from rich.console import Console

from sere_ray import assets
from sere_ray.policy.policy import Policy
from sere_ray.serve.client import Deployment
from sere_ray.util.progress import waiting
from sere_ray.util.ray_instance import nothing_left, start_ray

HOST = "127.0.0.1"
MODEL_ID = "sere-demo"
APP = "sere-demo"
YIELDING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Environment of engines: threads that wait give their core away, to another rank for instance."""
RANKS = 2
"""Data-parallel ranks; each holds half of the experts."""


@contextmanager
def served(
    policy: Policy,
    port: int,
    *,
    max_streams: int,
    compiled: bool,
    console: Console,
    metrics_port: int | None = None,
) -> Iterator[Deployment]:
    """Start Ray, Serve and one gang of vLLM engines with the demo model; stop all at the end.

    Args:
        policy: to start with.
        port: of the endpoint, on loopback.
        max_streams: requests that an engine decodes at a time.
        compiled: let vLLM compile its graph; False = eager.
        console: where progress is printed.
        metrics_port: where Prometheus finds the metrics; None = a port that Ray chooses.

    Yields:
        The running deployment.

    Raises:
        SereError: Ray does not start.
    """
    from ray import serve

    # vLLM and Ray Serve LLM log to this process's terminal as they are imported here.
    logging.disable(logging.INFO)
    from sere_ray.serve import build_app

    environment = {"env_vars": {"HF_HUB_OFFLINE": "1", **YIELDING}}
    with nothing_left(), ExitStack() as stack:
        stack.callback(logging.disable, logging.NOTSET)
        start_ray(metrics_port=metrics_port, runtime_env=environment)
        serve.start(http_options={"host": HOST, "port": port})
        arguments = {
            "model": str(assets.MODEL),
            "model_id": MODEL_ID,
            "data_parallel_size": RANKS,
            "sere": policy,
            "engine": {
                "max_model_len": 512,
                "max_num_seqs": max_streams,
                "enforce_eager": not compiled,
                "enable_prompt_tokens_details": True,  # the load test reports cache hits
            },
        }
        with waiting(console, "starting the engines"):
            serve.run(build_app(arguments), name=APP, blocking=False)
        yield Deployment(f"http://{HOST}:{port}")


@dataclass(frozen=True)
class Served:
    """What a client saw while it sent a list of problems."""

    problems: int
    correct: int
    completion_tokens: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of problems whose final answer is right."""
        return self.correct / self.problems

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second over all streams."""
        return self.completion_tokens / self.seconds


def send(base_url: str, model_id: str, problems: list[tuple[str, str]], concurrency: int) -> Served:
    """Send every problem once, ``concurrency`` at a time, greedy.

    Args:
        base_url: ends in ``/v1``.
        model_id: name of the served model.
        problems: (prompt, final answer).
        concurrency: requests in flight.
    """
    return asyncio.run(_send(base_url, model_id, problems, concurrency))


async def _send(
    base_url: str, model_id: str, problems: list[tuple[str, str]], concurrency: int
) -> Served:
    waiting = iter(problems)
    correct = tokens = 0
    direct = DefaultAsyncHttpxClient(trust_env=False)  # past proxies: it is this machine
    async with AsyncOpenAI(
        base_url=base_url, api_key="none", timeout=120, http_client=direct
    ) as client:

        async def stream() -> None:
            nonlocal correct, tokens
            for prompt, answer in waiting:
                response = await client.chat.completions.create(
                    model=model_id,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=0,
                    max_tokens=96,
                )
                text = response.choices[0].message.content or ""
                correct += assets.final_answer(text) == answer
                tokens += response.usage.completion_tokens if response.usage else 0

        start = time.perf_counter()
        await asyncio.gather(*(stream() for _ in range(concurrency)))
        seconds = time.perf_counter() - start
    return Served(len(problems), correct, tokens, seconds)
