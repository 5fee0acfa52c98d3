"""The demo model as benchmarks use it: held-out windows of text, its K."""

import torch
from torch import Tensor

from sere_ray import assets
from sere_ray.calibration.loading import load_tokenizer
from sere_ray.policy.bound import BoundPolicy
from sere_ray.policy.policy import Policy

TOP_K = 4
"""K of the demo model."""
SEQUENCES = 32
LENGTH = 128
PROMPT_TOKENS = 64


def heldout_windows(count: int = SEQUENCES) -> Tensor:
    """``[count, LENGTH]`` token ids: the starts of held-out texts, then what follows in them."""
    tokenizer = load_tokenizer(str(assets.MODEL))
    texts = [tokenizer(text)["input_ids"] for text in assets.heldout_texts()]
    starts = range(0, max(map(len, texts)), LENGTH)
    windows = [text[start : start + LENGTH] for start in starts for text in texts]
    return torch.tensor([window for window in windows if len(window) == LENGTH][:count])


def bound(policy: Policy) -> BoundPolicy:
    """The policy with the numbers that it has for the demo model."""
    return policy.for_model(top_k=TOP_K)
