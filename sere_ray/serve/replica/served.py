"""An answer while it is served: its tokens, and with which log-probability each was served.

Tokens are held as ids, from the first one to the score, and nowhere written.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sere_ray.observe.score import TokenScore
from sere_ray.policy.tiers import Tier, asks_exact

LEAST_TOKENS = 2
"""Of an answer that can be scored: its first comes from a prompt row, exact by any policy."""
FINISHED = ("stop", "length")
"""Why an answer ends that is whole."""


class Served:
    """One answer.

    Args:
        sampling_params: of its request.
        version: of the policy when the request came; None = between two versions.
        lora_request: the adapter it was made with, as vLLM names it; None = none.
    """

    def __init__(self, sampling_params: Any, version: int | None, lora_request: Any = None) -> None:
        self.tier: Tier = "exact" if asks_exact(sampling_params) else "default"
        self.version, self.lora_request = version, lora_request
        self.prompt: list[int] = []
        self.answer: list[int] = []
        self.is_finished = False
        self._steps: list[Any] = []

    def add(self, output: Any, *, is_delta: bool) -> None:
        """Take a ``RequestOutput`` of a request with ``n = 1`` and log-probabilities.

        Args:
            output: as vLLM yields it.
            is_delta: whether it holds what is new since the last one, not all.

        Raises:
            ValueError: a token has no log-probability.
        """
        completion = output.outputs[0]
        if output.finished:
            self.prompt = list(output.prompt_token_ids)
            self.is_finished = completion.finish_reason in FINISHED
        ids, steps = list(completion.token_ids), list(completion.logprobs or ())
        if len(ids) != len(steps):
            raise ValueError(f"{len(ids)} tokens, {len(steps)} log-probabilities")
        if not is_delta:
            self.answer, self._steps = [], []
        self.answer += ids
        self._steps += steps

    def cut(self, most_tokens: int) -> None:
        """Keep what fits: of prompt and answer together the first ``most_tokens`` tokens."""
        keep = max(0, most_tokens - len(self.prompt))
        del self.answer[keep:], self._steps[keep:]

    def compare(self, exact: Sequence[Mapping[int, Any] | None]) -> list[TokenScore]:
        """Scores of the answer's tokens after the first.

        Args:
            exact: vLLM's ``prompt_logprobs`` of the exact model over prompt and answer: one
                entry a token, of its own id and of the likeliest one's.
        """
        start = len(self.prompt)
        pairs = zip(self.answer, self._steps, exact[start : start + len(self.answer)], strict=True)
        return [
            TokenScore(
                served=step[token].logprob,
                exact=under_exact[token].logprob,
                agrees=_likeliest(step) == _likeliest(under_exact),
            )
            for token, step, under_exact in list(pairs)[1:]
            if under_exact is not None
        ]


def _likeliest(step: Mapping[int, Any]) -> int:
    """Id of the likeliest token: vLLM gives rank 1 to its entry."""
    return min(step, key=lambda token: step[token].rank)
