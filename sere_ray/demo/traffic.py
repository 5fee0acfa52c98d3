"""Send arithmetic to an OpenAI endpoint at a fixed concurrency and check the answers."""

import asyncio
import time
from dataclasses import dataclass

from openai import AsyncOpenAI

from sere_ray.assets import final_answer


@dataclass(frozen=True)
class Served:
    """What a client saw of one run."""

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
    async with AsyncOpenAI(base_url=base_url, api_key="none", timeout=120) as client:

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
                correct += final_answer(text) == answer
                tokens += response.usage.completion_tokens if response.usage else 0

        start = time.perf_counter()
        await asyncio.gather(*(stream() for _ in range(concurrency)))
        seconds = time.perf_counter() - start
    return Served(len(problems), correct, tokens, seconds)
