"""The replicas: Ray Serve's LLM servers, which follow the router actor of their deployment.

One replica is one data-parallel rank. It joins the router before its engine starts, starts with
what the router holds, and is ready only when its gang runs the router's newest version.
"""

import asyncio
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve.config import DeploymentActorConfig
from ray.serve.llm.deployment import DPServer, LLMServer

from sere_ray.config import Startup
from sere_ray.observe.export import EngineExporter
from sere_ray.observe.sink import RaySink
from sere_ray.serve.artifacts import keep_artifact
from sere_ray.serve.engine import SereEngine
from sere_ray.serve.locate import ACTOR
from sere_ray.serve.messages import Member, Update
from sere_ray.serve.router_actor import RouterActor

logger = logging.getLogger("ray.serve")
OPTIONS = "sere"
"""Key of ``LLMConfig.experimental_configs`` that holds the arguments of the router actor."""
METRICS = "sere_metrics_interval_s"
"""Likewise: seconds between two readings of the engine's counters for metrics; None = never."""
RETRY_SECONDS = 1.0
RPC_SECONDS = 60.0
START_SECONDS = 300.0
WATCH_SECONDS = 0.2
FAREWELL_SECONDS = 0.5
"""How long a replica lives on after its engine: requests under way get their answers."""


class Follower:
    """Keeps one engine at the router's newest version.

    Args:
        gang: id of this replica's gang.
        gang_size: ranks of it.
        rank: of this replica.
        model_id: name of the served model.
    """

    def __init__(self, gang: str, gang_size: int, rank: int, model_id: str) -> None:
        self.gang, self.gang_size, self.rank, self.model_id = gang, gang_size, rank, model_id
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.failure: str | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="sere-")
        self._staged = self._settled = -1
        self._newest: Update | None = None  # what the engine was told last
        self._similarity = ""
        self._counters: dict[str, Any] | None = None
        self._token_times: Any = None
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self) -> dict[str, Any]:
        """The policy to start the engine with; its artifact lies on this node."""
        update: Update = await _router().join.remote(self.gang)
        self._staged = self._settled = update.version
        self._newest = update
        content = await update.content
        path = keep_artifact(Path(self._folder.name), update.sha256, content)
        self._similarity = str(path)
        return {**update.policy, "similarity": self._similarity}

    async def catch_up(self, engine: Any, metrics_interval_s: float | None) -> None:
        """Return when the whole gang runs the newest version; then go on in the background.

        Args:
            engine: of this replica.
            metrics_interval_s: seconds between two exports of metrics; None exports none.
        """
        from sere_ray.engine.token_times import watch_token_times

        self._token_times = watch_token_times(getattr(engine, "_engine_client", None))
        async with asyncio.timeout(START_SECONDS):
            while await self._step(engine, wait=False) or self._settled < self._staged:
                if self.failure is not None:
                    raise RuntimeError(f"sere-ray: {self.failure}")
                await asyncio.sleep(0.05)
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._follow(engine)))
        if metrics_interval_s is not None:
            self._tasks.append(loop.create_task(self._export(engine, metrics_interval_s)))

    async def close(self, *, wait: bool) -> None:
        """Stop following; with ``wait``, return when no rank of the gang has a request left."""
        for task in self._tasks:
            task.cancel()
        try:
            left = _router().leave.remote(self.replica, self.gang, self.gang_size)
            if wait:
                await left
        except Exception as error:
            logger.info("sere-ray: no router to take leave of (%s)", type(error).__name__)
        self._folder.cleanup()

    async def _follow(self, engine: Any) -> None:
        while self.failure is None:
            try:
                await self._step(engine, wait=True)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # the actor is gone: keep the policy until there is one
                logger.warning("sere-ray: router not reached (%s); retrying", type(error).__name__)
                await asyncio.sleep(RETRY_SECONDS)

    async def _export(self, engine: Any, interval_s: float) -> None:
        """Export metrics, now and after each interval. An engine that fails is not our business."""
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
                counters = (await _call(engine, "sere_counters", False))[0]
                exporter.export_counters(counters, time.perf_counter() - start)
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
        order = await _router().poll.remote(member, wait)
        if order.restart:
            self.failure = f"version {self._staged} is too old to follow the router: restart"
            return False
        try:
            for update in order.updates:
                await self._stage(engine, update)
            if order.settle:
                await _call(engine, "sere_settle")
                self._settled = order.settle
            if order.report:
                (counters, *_) = await _call(engine, "sere_counters", False)
                self._counters = {**counters, "token_times": list(self._token_times.counts)}
        except Exception as error:
            # The router has validated it, so the engine and the router disagree: start anew.
            self.failure = f"version {order.updates[-1:]}: {error}"
            logger.exception("sere-ray: the engine cannot follow the router")
        return bool(order.updates or order.settle or order.report)

    async def _stage(self, engine: Any, update: Update) -> None:
        content = None if update.content is None else await update.content
        if content is not None:
            self._similarity = f"{update.sha256}.safetensors"
        policy = {**update.policy, "similarity": self._similarity}
        await _call(engine, "sere_set_policy", policy, content)
        self._staged = update.version
        self._newest = update


def _router() -> Any:
    return serve.get_deployment_actor(ACTOR)


async def _call(engine: Any, method: str, *args: Any) -> list[Any]:
    results: list[Any] = await engine.collective_rpc(method=method, timeout=RPC_SECONDS, args=args)
    return results


class _Following:
    """What both servers below share."""

    _default_engine_cls = SereEngine
    follower: Follower | None = None
    engine: Any
    _watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine, then watch it."""
        await self._start_engine_and_follow()
        self._watch = asyncio.get_running_loop().create_task(self._end_with_the_engine())

    async def _start_engine_and_follow(self) -> None:
        """Start with what the router holds; without a policy, as Ray does."""
        config: Any = self._llm_config  # type: ignore[attr-defined]
        additional = dict(config.engine_kwargs.get("additional_config") or {})
        if "sere" not in additional:
            return await super().start()  # type: ignore[misc,no-any-return]
        self.follower = _follower(config.model_id)
        startup = {k: v for k, v in additional["sere"].items() if k in Startup.model_fields}
        additional["sere"] = {**await self.follower.join(), **startup}
        config.update_engine_kwargs(additional_config=additional)
        await super().start()  # type: ignore[misc]
        await self.follower.catch_up(self.engine, config.experimental_configs[METRICS])

    async def check_health(self) -> None:
        """Unhealthy when the engine is, or when it cannot follow the router."""
        if self.follower is not None and self.follower.failure is not None:
            raise RuntimeError(f"sere-ray: {self.follower.failure}")
        await super().check_health()  # type: ignore[misc]

    async def _end_with_the_engine(self) -> None:
        """End this process soon after its engine is lost, or cannot follow the router.

        Serve acts on the third failed health check. Until then a dead replica would get most of
        the requests, since none refuses them faster. A process that is gone gets no request more
        from any handle that tried once, and its gang restarts at Serve's next look.
        """
        while await self._is_healthy():
            await asyncio.sleep(WATCH_SECONDS)
        logger.error("sere-ray: the engine is lost; this replica ends")
        await asyncio.sleep(FAREWELL_SECONDS)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    async def __del__(self) -> None:
        # Serve calls this when the replica's own requests are done. Its engine still takes part
        # in the steps of its siblings.
        if self._watch is not None:
            self._watch.cancel()
        if self.follower is not None:
            await self.follower.close(wait=await self._is_healthy())
        await super().__del__()  # type: ignore[misc]

    async def _is_healthy(self) -> bool:
        try:
            await self.check_health()
        except Exception:
            return False
        return True

    async def __serve_build_asgi_app__(self) -> Any:
        """The engine's own routes, for direct streaming: behind the access layer, too."""
        from sere_ray.serve.ingress import ACCESS, protect

        app = await super().__serve_build_asgi_app__()  # type: ignore[misc]
        access, keys, control = self._llm_config.experimental_configs[ACCESS]  # type: ignore[attr-defined]
        protect(app, access, keys, control=control)
        return app

    @classmethod
    def get_deployment_options(cls, llm_config: Any) -> dict[str, Any]:
        """Ray's options and the router actor."""
        options: dict[str, Any] = super().get_deployment_options(llm_config)  # type: ignore[misc]
        arguments: Mapping[str, Any] | None = llm_config.experimental_configs.get(OPTIONS)
        if arguments is not None:
            options["deployment_actors"] = [
                DeploymentActorConfig(
                    name=ACTOR, actor_class=RouterActor, init_kwargs=dict(arguments)
                )
            ]
        return options


def _follower(model_id: str) -> Follower:
    context = serve.get_replica_context()
    gang = context.gang_context
    if gang is None:
        return Follower(context.replica_id.unique_id, 1, 0, model_id)
    return Follower(gang.gang_id, gang.world_size, gang.rank, model_id)


class SereServer(_Following, LLMServer):  # type: ignore[misc]
    """A gang of one: a replica that holds all experts."""


class SereGangServer(_Following, DPServer):  # type: ignore[misc]
    """One rank of a data-parallel gang, with its shard of the experts."""


class SkipDownload(CallbackBase):  # type: ignore[misc]
    """Where the model is a folder of this node, there is nothing to download.

    Ray would start a worker process on each node to find that out: 20 s and 0.6 GB on a laptop.
    """

    async def on_before_node_init(self) -> None:
        """See the base class."""
        source = self.llm_config.model_loading_config.model_source
        self.ctx.run_init_node = not (isinstance(source, str) and Path(source).is_dir())
