"""The request routers, as Ray Serve takes them: ``request_router: experts``.

Ray makes one wherever a handle of the engines' deployment is used: in the ingress behind Ray's
proxy, or in its own ingress request router, which HAProxy asks for each request (direct streaming).
Where anything is missing, Ray's own router decides, as it would without this one.
"""

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.round_robin_router import RoundRobinRouter
from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from sere_ray.serve.by_experts.board import Board, NotKnown
from sere_ray.serve.by_experts.reporter import PERIOD_SECONDS
from sere_ray.serve.by_experts.text import text_of_call, text_vector
from sere_ray.serve.way import BODIES
from sere_ray.util.errors import SereError

logger = logging.getLogger("ray.serve")
QUIET_SECONDS = 60.0
"""Between two lines of the log about the same reason."""
Ranks = Sequence[list[RunningReplica]]
_POWER_OF_TWO: Any = RequestRouterConfig().get_request_router_class()


def ray_options(*, is_direct: bool) -> dict[str, Any]:
    """Options of Ray for the engines' deployment.

    Args:
        is_direct: whether HAProxy sends requests to the replicas itself.

    Raises:
        SereError: HAProxy does not show the router what is asked.
    """
    name = next(iter(BODIES))
    if is_direct and os.environ.get(name) != BODIES[name]:
        raise SereError(
            f"request_router = 'experts': with direct streaming it needs {name}={BODIES[name]} in "
            "the environment of all of Ray's processes; set it, or let `sere-ray serve` start Ray"
        )
    config = {
        "request_router_class": DirectExpertsRouter if is_direct else ExpertsRouter,
        "request_routing_stats_period_s": PERIOD_SECONDS,
    }
    return {"request_router_config": config}


class _ByExperts:
    """What both routers below share."""

    board: Board
    _said: dict[str, float]

    def initialize_state(self, **kwargs: Any) -> None:
        """Nothing is known yet."""
        self.board, self._said = Board(), {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Ray has brought news of the replicas: reports are new now, not at the next request."""
        super().update_replicas(replicas)  # type: ignore[misc]
        try:
            self._see(replicas)
        except NotKnown:
            pass  # said when a request comes
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}")

    def in_order(
        self, candidates: Sequence[RunningReplica], pending: PendingRequest | None
    ) -> list[list[RunningReplica]] | None:
        """One replica after the other, the best first; None = Ray's own router decides."""
        try:
            return self._order(candidates, pending)
        except NotKnown as reason:
            self._say(str(reason))
        except Exception as error:  # whatever it is: the request goes on
            self._say(f"{type(error).__name__}: {error}")
        return None

    def _order(
        self, candidates: Sequence[RunningReplica], pending: PendingRequest | None
    ) -> list[list[RunningReplica]] | None:
        if pending is None or pending.metadata.multiplexed_model_id:
            return None  # an adapter is on some replicas only: Ray knows where
        by_name = self._see(candidates)
        text = text_of_call(pending.args)
        if text is None:
            return None  # a request for something else, or tokens
        wanted = self.board.tell(text_vector(text))
        loads = {name: self.load_of(replica) for name, replica in by_name.items()}
        names = self.board.order(wanted, loads)
        return [[by_name[name]] for name in names]

    def _see(self, replicas: Sequence[RunningReplica]) -> dict[str, RunningReplica]:
        """Take their reports; returns the replicas by name."""
        by_name = {replica.replica_id.unique_id: replica for replica in replicas}
        self.board.see({name: replica.routing_stats for name, replica in by_name.items()})
        return by_name

    def load_of(self, replica: RunningReplica) -> float | None:
        """Requests of a replica as Ray counts them; None = it does not."""
        return None

    def note(self, replica_id: ReplicaID) -> None:
        """A request has gone to this replica."""
        try:
            self.board.placed(replica_id.unique_id)
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}")

    def _say(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._said.get(reason, -QUIET_SECONDS) < QUIET_SECONDS:
            return
        if len(self._said) > 64:
            self._said.clear()
        self._said[reason] = now
        logger.info("sere-ray: not placed by experts: %s; Ray's own router decides", reason)


class ExpertsRouter(_ByExperts, LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Behind Ray's proxy: the ingress sends the request itself, and knows when it ends."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> Ranks:
        """Every replica, the best first; Ray takes the first that has a place."""
        found = self.in_order(candidate_replicas, pending_request)
        if found is not None:
            pending_request.routing_context.should_backoff = True  # type: ignore[union-attr]
            return found
        chosen: Ranks = await _POWER_OF_TWO.choose_replicas(
            self, candidate_replicas, pending_request
        )
        return chosen

    def load_of(self, replica: RunningReplica) -> float | None:
        """What Ray's cache of queue lengths has: it counts what this handle sent."""
        found: int | None = self.replica_queue_len_cache.get(replica.replica_id)
        return found

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Ray has sent a request."""
        super().on_request_routed(pending_request, replica_id, result)
        self.note(replica_id)


class DirectExpertsRouter(_ByExperts, RoundRobinRouter):  # type: ignore[misc]
    """With direct streaming: HAProxy sends the request, to the first replica that is named here.

    Nobody says when it ends, so the load is what replicas report, and what went there since.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> Ranks:
        """Every replica, the best first."""
        chosen: Ranks | None = self.in_order(candidate_replicas, pending_request)
        if chosen is None:
            chosen = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            for first in chosen[:1]:
                self.note(first[0].replica_id)
        return chosen
