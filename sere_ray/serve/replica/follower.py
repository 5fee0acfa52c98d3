"""Keeps the engine of a replica at the policy actor's newest version, and exports its counters."""

import asyncio
import logging
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from ray import serve

from sere_ray.engine.control import gates_of, of_engine
from sere_ray.engine.worker_calls import WorkerCalls
from sere_ray.observe.export import EngineExporter, RaySink
from sere_ray.serve.policy_actor.artifacts import keep_artifact
from sere_ray.serve.policy_actor.locate import ACTOR
from sere_ray.serve.policy_actor.members import Member, Update
from sere_ray.serve.replica.scorer import ScoreConfig, Scorer

logger = logging.getLogger("ray.serve")
RETRY_SECONDS = 1.0
RPC_SECONDS = 60.0
START_SECONDS = 300.0


class Follower:
    """Keeps one engine at the newest version of the policy.

    Args:
        gang: id of this replica's gang.
        gang_size: how many ranks the gang has.
        rank: number of this replica in its gang.
        model_id: name of the served model.
    """

    def __init__(self, gang: str, gang_size: int, rank: int, model_id: str) -> None:
        self.gang, self.gang_size, self.rank, self.model_id = gang, gang_size, rank, model_id
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.failure: str | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="sere-")
        self._staged = self._settled = -1
        self._newest: Update | None = None  # what the engine was told last
        self._files: dict[str, str] = {}  # by the policy's key, as the engine knows them
        self._counters: dict[str, Any] | None = None
        self._token_times: Any = None
        self._scorer: Scorer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self) -> dict[str, Any]:
        """The policy to start the engine with; its files lie on this node."""
        update: Update = await _policy_actor().join.remote(self.gang)
        self._staged = self._settled = update.version
        self._newest = update
        contents = {
            "similarity": (update.sha256, update.content),
            "masks": (update.masks_sha256, update.masks),
        }
        for key, (sha256, content) in contents.items():
            if content is not None:
                path = keep_artifact(Path(self._folder.name), sha256, await content)
                self._files[key] = str(path)
        return {**update.policy, **self._files}

    async def catch_up(
        self, engine: Any, metrics_interval_s: float | None, score: ScoreConfig | None = None
    ) -> None:
        """Return when the whole gang runs the newest version; then go on in the background.

        Args:
            engine: of this replica.
            metrics_interval_s: seconds between two exports of metrics; None exports none.
            score: how answers are scored; None scores none.
        """
        from sere_ray.engine.token_times import watch_token_times

        client = getattr(engine, "_engine_client", None)  # a stand-in of tests has none
        self._token_times = watch_token_times(client)
        # Before any change: one that the gates keep this engine from would end it.
        await _policy_actor().note_gates.remote(gates_of(await worker_calls(engine).gates()))
        async with asyncio.timeout(START_SECONDS):
            while await self._step(engine, wait=False) or self._settled < self._staged:
                if self.failure is not None:
                    raise RuntimeError(f"sere-ray: {self.failure}")
                await asyncio.sleep(0.05)
        if score is not None and client is not None:
            from sere_ray.engine.engine_load import watch_load

            load = watch_load(client)
            self._scorer = Scorer(
                client, score, has_room=lambda: load.has_room, version=lambda: self._whole_version
            )
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._follow(engine)))
        if metrics_interval_s is not None:
            self._tasks.append(loop.create_task(self._export(engine, metrics_interval_s)))

    async def close(self, *, wait: bool) -> None:
        """Stop following; with ``wait``, return when no rank of the gang has a request left."""
        for task in self._tasks:
            task.cancel()
        if self._scorer is not None:
            self._scorer.close()
        try:
            left = _policy_actor().leave.remote(self.replica, self.gang, self.gang_size)
            if wait:
                await left
        except Exception as error:
            logger.info("sere-ray: no policy actor to take leave of (%s)", type(error).__name__)
        self._folder.cleanup()

    @property
    def _whole_version(self) -> int | None:
        """The version that all ranks of the gang run; None while it changes."""
        return self._staged if self._staged == self._settled else None

    @property
    def _scores(self) -> dict[str, Any] | None:
        return None if self._scorer is None else self._scorer.scores.report()

    async def _follow(self, engine: Any) -> None:
        while self.failure is None:
            try:
                await self._step(engine, wait=True)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # the actor is gone: keep the policy until there is one
                logger.warning(
                    "sere-ray: policy actor not reached (%s); retrying", type(error).__name__
                )
                await asyncio.sleep(RETRY_SECONDS)

    async def _export(self, engine: Any, interval_s: float) -> None:
        """Export metrics, now and after each interval. An engine that does not answer only leaves
        a gap: its failure is the business of others."""
        labels = {
            "app": serve.get_replica_context().app_name,
            "model_name": self.model_id,
            "gang": self.gang,
            "rank": str(self.rank),
            "ReplicaId": self.replica,
        }
        exporter = EngineExporter(RaySink(labels))
        while self.failure is None:
            try:
                start = time.perf_counter()
                counters = of_engine(await worker_calls(engine).counters(reset=False))
                exporter.export_counters(counters, time.perf_counter() - start)
                exporter.export_scores(self._scores)
                assert self._newest is not None
                exporter.export_policy(
                    self._newest.policy,
                    self._newest.sha256,
                    staged=self._staged,
                    settled=self._settled,
                    ranks=self.gang_size,
                )
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.warning("sere-ray: no metrics now (%s)", type(error).__name__)
            await asyncio.sleep(interval_s)

    async def _step(self, engine: Any, *, wait: bool) -> bool:
        """Poll once and do what the answer says; returns whether it said anything."""
        member = Member(
            self.replica,
            self.gang,
            self.gang_size,
            self.rank,
            self._staged,
            self._settled,
            self._counters,
        )
        self._counters = None
        order = await _policy_actor().poll.remote(member, wait)
        if order.restart:
            self.failure = f"version {self._staged} is too old to follow the policy actor: restart"
            return False
        try:
            if order.settle:  # of the version staged so far: before another one is told
                await worker_calls(engine).settle()
                self._settled = order.settle
            for update in order.updates:
                await self._stage(engine, update)
            if order.report:
                counters = of_engine(await worker_calls(engine).counters(reset=False))
                self._counters = {
                    **counters,
                    "token_times": self._token_times.read(),
                    "scores": self._scores,
                }
        except Exception as error:
            # The actor has validated it, so engine and actor disagree: start anew.
            self.failure = f"version {order.updates[-1:]}: {error}"
            logger.exception("sere-ray: the engine cannot follow the policy actor")
        return bool(order.updates or order.settle or order.report)

    async def _stage(self, engine: Any, update: Update) -> None:
        content = None if update.content is None else await update.content
        if content is not None:
            self._files["similarity"] = f"{update.sha256}.safetensors"
        policy = {**update.policy, **self._files}
        await worker_calls(engine).set_policy(policy, content)
        self._staged = update.version
        self._newest = update


def _policy_actor() -> Any:
    return serve.get_deployment_actor(ACTOR)


def worker_calls(engine: Any) -> WorkerCalls[Awaitable[list[Any]]]:
    """Calls of the workers of a replica's engine; each awaits one answer of each worker."""
    return WorkerCalls(
        lambda name, arguments: engine.collective_rpc(
            method=name, timeout=RPC_SECONDS, args=arguments
        )
    )


def own_follower(model_id: str) -> Follower:
    """The follower of the replica that this process is."""
    context = serve.get_replica_context()
    gang = context.gang_context
    if gang is None:
        return Follower(context.replica_id.unique_id, 1, 0, model_id)
    return Follower(gang.gang_id, gang.world_size, gang.rank, model_id)
