"""Limits on requests and connections: the part ``limits`` of a deployment file."""

import json
import os
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from sere_ray.util.errors import SereError

VARIABLE = "SERE_LIMITS"
"""Environment variable that holds the limits of the proxies of a node, as JSON."""
SECRET = "SERE_LOOPBACK_SECRET"
"""Environment variable with the word by which HAProxy tells that a request is of this machine."""
LOOPBACK_HEADER = "x-sere-loopback"
"""Header of a request in which HAProxy sends that word."""
RAY_SWITCHES = ("x-request-disconnect-disabled", "x-request-timeout-seconds")
"""Headers by which a client could switch off that its hang-up ends its work, and choose a limit of
its own. Ray heeds them; they are not passed on."""
ONE_ADDRESS = 0.75
"""From which share of ``max_unfinished`` on an address that has many connections gets no more."""


class Limits(BaseModel):
    """How long a client may take, and how many connections it may keep from others.

    Example:
        >>> Limits(connections=100, unfinished_share=0.5).max_unfinished
        50
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    header_s: float = Field(
        10.0, ge=0.1, le=3600, description="seconds for the headers of a request"
    )
    body_s: float = Field(30.0, ge=0.1, le=3600, description="seconds for the body of a request")
    idle_s: int = Field(
        90, ge=1, le=3600, description="seconds that an open connection may wait for a request"
    )
    answer_s: float | None = Field(
        None, gt=0, description="seconds for a whole answer, streams too; null = no limit"
    )
    connections: int = Field(
        8192, ge=16, le=1 << 20, description="open connections of a proxy, as far as it may"
    )
    unfinished_share: float = Field(
        0.75, gt=0, le=1, description="of these, the most that wait for (the rest of) a request"
    )

    queue_while_restarting_s: float = Field(
        30.0, ge=0, le=3600, description="seconds that a request waits for an engine to restart"
    )
    max_queued: int = Field(256, ge=0, le=1 << 16, description="requests that may wait so")

    @property
    def max_unfinished(self) -> int:
        """The most connections that may wait for a request, or for the rest of one."""
        return max(1, int(self.connections * self.unfinished_share))

    @property
    def of_proxies(self) -> dict[str, Any]:
        """The limits that proxies enforce, for all applications of an instance of Ray alike."""
        return self.model_dump(exclude={"answer_s"})

    @classmethod
    def of_environment(cls) -> Self:
        """The limits of this process's environment; defaults where it says nothing.

        Raises:
            SereError: the variable holds something else.
        """
        text = os.environ.get(VARIABLE, "{}")
        try:
            return cls.model_validate(json.loads(text))
        except ValueError as error:  # pydantic's is one
            reason = " ".join(str(error).split())
            raise SereError(
                f"{VARIABLE} = {text[:200]!r}: must be JSON with keys of `limits` of a deployment "
                f'file, such as {{"header_s": 10}}: {reason}'
            ) from None
