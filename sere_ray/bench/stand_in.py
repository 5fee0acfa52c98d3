"""How a deployment gets stand-in engines, and what they answer.

Where faults are tested the engine is not the point. A stand-in has the interface of a replica's
engine and computes nothing. The words of its answer are a hash of its prompt, so an answer that was
mixed up with another one, or cut off, is found out. The engine is in ``stand_in_engine.py``: Ray
imports it by name, in replicas only, so this module does not need Ray.
"""

import hashlib

ENVIRONMENT = {"RAYLLM_VLLM_ENGINE_CLS": "sere_ray.bench.stand_in_engine.StandInEngine"}


def expected_words(prompt: str, tokens: int) -> list[str]:
    """The answer of a stand-in to a prompt: ``tokens`` words, one for each token."""
    return [f" {hashlib.sha256(f'{i} {prompt}'.encode()).hexdigest()[:8]}" for i in range(tokens)]
