"""How long ranks of an engine wait for each other."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist


def group_timeout(vllm_config: Any) -> timedelta:
    """Of the engine's exchanges: vLLM's ``distributed_timeout_seconds``, else torch's default."""
    seconds = vllm_config.parallel_config.distributed_timeout_seconds
    default: timedelta = dist.default_pg_timeout
    return default if seconds is None else timedelta(seconds=seconds)
