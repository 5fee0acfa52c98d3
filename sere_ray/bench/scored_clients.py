"""Clients of the demo model in an engine as a replica runs it, for `bench production-score`."""

import asyncio
import random
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import torch

from sere_ray import assets
from sere_ray.bench.demo_model import heldout_windows
from sere_ray.engine.worker_calls import WorkerCalls
from sere_ray.observe.score import ScoreSums
from sere_ray.policy.policy import Policy
from sere_ray.policy.tiers import XARG
from sere_ray.serve.replica.scorer import ScoreConfig, Scorer

STREAMS = 16
PROMPT_TOKENS, ANSWER_TOKENS = 32, 64


class Clients:
    """An engine in a process of its own, as Ray's replicas have it, and what asks it.

    Args:
        similarity: the artifact.
    """

    def __init__(self, similarity: Path) -> None:
        from vllm import AsyncEngineArgs, AsyncLLMEngine

        from sere_ray.engine.engine_load import watch_load

        self._similarity = str(similarity)
        self.engine = AsyncLLMEngine.from_engine_args(
            AsyncEngineArgs(
                model=str(assets.MODEL),
                dtype="float32",  # the evaluator's on a CPU
                max_model_len=256,
                max_num_seqs=2 * STREAMS,
                gpu_memory_utilization=0.05,
                kv_cache_memory_bytes=1 << 28,
                additional_config={"sere": {"similarity": self._similarity, "select_top_k": 2}},
            )
        )
        self._load = watch_load(self.engine)
        self._prompts = heldout_windows()[:, :PROMPT_TOKENS].tolist()
        self._asked = 0

    async def set_policy(self, keys: dict[str, Any]) -> None:
        """Change the engine's policy, between two requests."""
        calls: WorkerCalls[Awaitable[list[Any]]] = WorkerCalls(
            lambda name, arguments: self.engine.collective_rpc(name, args=arguments)
        )
        policy = Policy.parse({"similarity": self._similarity, **keys})
        await calls.set_policy(policy.model_dump())
        await calls.settle()

    async def ask(self, *, exact: bool = False) -> list[int]:
        """An answer at temperature 1: ids of prompt and answer."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._asked += 1
        prompt = self._prompts[self._asked % len(self._prompts)]
        sampling = SamplingParams(
            max_tokens=ANSWER_TOKENS,
            temperature=1.0,
            seed=self._asked,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={XARG: "exact"} if exact else None,
        )
        asked = {"type": "token", "prompt_token_ids": prompt}
        answer: list[int] = []
        async for output in self.engine.generate(asked, sampling, f"r{self._asked}"):
            answer = list(output.outputs[0].token_ids)
        return [*prompt, *answer]

    def scorer(self, share: float) -> Scorer:
        """Scores answers from now on, until it is closed."""
        config = ScoreConfig.model_validate({"share": share, "queue": 4 * STREAMS})
        seed = random.Random(self._asked)
        return Scorer(
            self.engine,
            config,
            has_room=lambda: self._load.has_room,
            version=lambda: 0,
            draw=seed.random,
        )

    async def scored_texts(
        self, keys: dict[str, Any], batches: int, *, exact: bool
    ) -> tuple[torch.Tensor, ScoreSums]:
        """Answers of a policy, 16 at a time, and their scores.

        Returns:
            Ids ``[N, PROMPT_TOKENS + ANSWER_TOKENS]`` in the order of their batches, and sums.
        """
        await self.set_policy(keys)
        scorer, texts = self.scorer(1.0), []
        for batch in range(batches):
            texts += await self.together(exact=exact)
            while scored(scorer) < (batch + 1) * STREAMS:  # no pass beside the next batch
                await asyncio.sleep(0.01)
        scorer.close()
        tier = scorer.scores.report()["tiers"]["exact" if exact else "default"]
        return torch.tensor(texts), ScoreSums.model_validate(tier)

    async def together(self, *, exact: bool) -> list[list[int]]:
        """16 answers whose every step is the same step, as the evaluator's."""
        await self.engine.pause_generation(mode="keep", clear_cache=False)
        asked = [asyncio.create_task(self.ask(exact=exact)) for _ in range(STREAMS)]
        while len(self.engine.output_processor.request_states) < STREAMS:
            await asyncio.sleep(0.01)
        await self.engine.resume_generation()
        return await asyncio.gather(*asked)

    async def load(self, answers: int) -> int:
        """16 streams, each with so many answers one after the other; returns their tokens."""

        async def stream() -> None:
            for _ in range(answers):
                await self.ask()

        await asyncio.gather(*(stream() for _ in range(STREAMS)))
        return STREAMS * answers * ANSWER_TOKENS


def scored(scorer: Scorer) -> int:
    """Answers whose pass has ended."""
    count: int = scorer.scores.report()["outcomes"]["scored"]
    return count
