"""What the ``sere`` key of an engine may hold beside the policy: taken when it starts, and kept."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Dispatch = Literal["allgather", "all_to_all"]
Replicas = Literal["by_tokens", "by_experts"]


class Startup(BaseModel):
    """What the ``sere`` key of an engine may hold beside the policy; no policy can change it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dispatch: Dispatch = Field(
        default="allgather",
        description="how rows reach other ranks under data and expert parallelism: every row to "
        "all of them, or each only to those that hold its experts",
    )
    replicas: Replicas = Field(
        default="by_tokens",
        description="which copy of an expert a row gets where vLLM's load balancer keeps several: "
        "any, as vLLM spreads rows, or the same for all rows, of the rank that reads the fewest",
    )
    tensor_and_data_parallel: bool = Field(
        default=False,
        description="on GPUs: start with tensor and data parallelism at once, which has run in the "
        "emulator alone",
    )
    check_ranks: bool = Field(
        default=False,
        description="for debugging, slow: in every layer the ranks compare where each expert's "
        "slots go, and all raise if two of them differ",
    )
