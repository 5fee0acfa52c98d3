"""A stand-in for vLLM where faults are tested and the engine is not the point.

It speaks the interface of a replica's engine, computes nothing, and its answer holds words that
only its prompt has: an answer that was crossed with another one, or torn, is seen. Ray takes it
from the environment of a replica; no deployment file of a user names it.
"""

import hashlib

ENVIRONMENT = {"RAYLLM_VLLM_ENGINE_CLS": "sere_ray.bench.stand_in_engine.StandInEngine"}


def expected_words(prompt: str, tokens: int) -> list[str]:
    """The answer to a prompt, a word for each token."""
    return [f" {hashlib.sha256(f'{i} {prompt}'.encode()).hexdigest()[:8]}" for i in range(tokens)]
