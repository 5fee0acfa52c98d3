"""The replicas: Ray Serve's LLM servers, which follow the policy actor of their deployment.

One replica is one data-parallel rank. Before its engine starts it asks the policy actor for the
policy to start with. It is ready only when its gang runs the newest version.
"""

import asyncio
import logging
import multiprocessing
import os
from collections.abc import AsyncIterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.server import llm_server
from ray.serve.config import DeploymentActorConfig
from ray.serve.llm.deployment import DPServer, LLMServer

from sere_ray.engine.plugin import check_will_load
from sere_ray.policy.startup import Startup
from sere_ray.proxy.slow_clients import limit_requests
from sere_ray.serve.by_experts.reporter import Reporter, TextLayer
from sere_ray.serve.gateway.forward import answers
from sere_ray.serve.gateway.losses import EngineLostError
from sere_ray.serve.policy_actor.actor import RouterActor
from sere_ray.serve.policy_actor.locate import ACTOR
from sere_ray.serve.replica.engine import SereEngine
from sere_ray.serve.replica.follower import Follower, own_follower, worker_calls

logger = logging.getLogger("ray.serve")
OPTIONS = "sere"
"""Key of ``LLMConfig.experimental_configs`` that holds the arguments of the policy actor."""
METRICS = "sere_metrics_interval_s"
"""Key of ``LLMConfig.experimental_configs`` that holds the seconds between two readings of the
engine's counters for metrics; None = never."""
SCORE = "sere_score"
"""Key of ``LLMConfig.experimental_configs`` that holds how answers are scored; None = not."""
BY_EXPERTS = "sere_by_experts"
"""Key of ``LLMConfig.experimental_configs``: whether requests are placed by their experts."""
WATCH_SECONDS = 0.2
FAREWELL_SECONDS = 0.5
"""How long a replica lives on after its engine: requests under way get their answers."""


class _Following:
    """What both servers below share."""

    _default_engine_cls = SereEngine
    follower: Follower | None = None
    reporter: Reporter | None = None
    engine: Any
    _app: Any
    _watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine and make its HTTP application, then watch it."""
        from sere_ray.serve.gateway.ingress import engine_app

        await self._start_engine_and_follow()
        model_id = self._llm_config.model_id  # type: ignore[attr-defined]
        app = await self.engine.build_asgi_app()
        self._app = engine_app(app, model_id, is_lost=lambda: self.engine.is_lost)
        self._report_experts()
        self._watch = asyncio.get_running_loop().create_task(self._end_with_the_engine())

    async def _start_engine(self) -> None:
        """As Ray's, but its telemetry is sent in the background.

        It goes to an actor whose process imports torch; every first start would wait for that.
        """
        await self.engine.start()
        config = self._llm_config  # type: ignore[attr-defined]
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, llm_server.push_telemetry_report_for_all_models, [config])
        if llm_server.RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:
            tag = llm_server.TagKey.LLM_SERVE_DIRECT_STREAMING_ENABLED
            llm_server.record_extra_usage_tag(tag, "1")

    async def _start_engine_and_follow(self) -> None:
        """Start with the policy that the actor holds; without a policy, as Ray does.

        Raises:
            UnsupportedError: vLLM leaves out the plugin here, so that the policy would do nothing.
        """
        config: Any = self._llm_config  # type: ignore[attr-defined]
        additional = dict(config.engine_kwargs.get("additional_config") or {})
        if "sere" not in additional:
            return await super().start()  # type: ignore[misc,no-any-return]
        check_will_load()
        self.follower = own_follower(config.model_id)
        startup = {k: v for k, v in additional["sere"].items() if k in Startup.model_fields}
        additional["sere"] = {**await self.follower.join(), **startup}
        config.update_engine_kwargs(additional_config=additional)
        await super().start()  # type: ignore[misc]
        options = config.experimental_configs
        await self.follower.catch_up(self.engine, options[METRICS], options.get(SCORE))

    def _report_experts(self) -> None:
        """Tell request routers which experts this rank's requests want, where they are to know."""
        config: Any = self._llm_config  # type: ignore[attr-defined]
        client = getattr(self.engine, "_engine_client", None)  # a stand-in of tests has none
        if (
            self.follower is None
            or client is None
            or not config.experimental_configs.get(BY_EXPERTS)
        ):
            return
        self.reporter = Reporter(client, worker_calls(self.engine), self.follower.gang)
        self._app.add_middleware(TextLayer)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What request routers are told of this rank; Ray asks for it."""
        stats: dict[str, Any] = await super().record_routing_stats()  # type: ignore[misc]
        return stats if self.reporter is None else {**stats, **self.reporter.stats()}

    async def check_health(self) -> None:
        """Unhealthy when the engine is, or when it cannot follow the policy actor.

        Raises:
            RuntimeError: it cannot follow.
            EngineLostError: the engine is not healthy.
        """
        if self.follower is not None and self.follower.failure is not None:
            raise RuntimeError(f"sere-ray: {self.follower.failure}")
        try:
            await super().check_health()  # type: ignore[misc]
        except Exception as error:
            raise EngineLostError(f"{type(error).__name__}: {error}") from None

    async def _end_with_the_engine(self) -> None:
        """End this process soon after its engine is lost, or cannot follow the policy actor.

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
        if self.reporter is not None:
            self.reporter.close()
        if self.follower is not None:
            await self.follower.close(wait=await self._is_healthy())
        await super().__del__()  # type: ignore[misc]

    async def _is_healthy(self) -> bool:
        try:
            await self.check_health()
        except Exception:
            return False
        return True

    async def serve_http(
        self, scope: Mapping[str, Any], body: bytes
    ) -> AsyncIterator[list[MutableMapping[str, Any]]]:
        """What the engine's application answers to a request that an ingress took."""
        async for messages in answers(self._app, scope, body):
            yield messages

    async def __serve_build_asgi_app__(self) -> Any:
        """The engine's own routes, for direct streaming: behind the access layer, too."""
        from sere_ray.serve.gateway.ingress import ACCESS, protect

        protection = self._llm_config.experimental_configs[ACCESS]  # type: ignore[attr-defined]
        protect(self._app, **protection)
        limit_requests(protection["limits"])  # Ray starts this replica's HTTP server after it
        return self._app

    @classmethod
    def get_deployment_options(cls, llm_config: Any) -> dict[str, Any]:
        """Ray's options, and the policy actor as a deployment actor."""
        options: dict[str, Any] = super().get_deployment_options(llm_config)  # type: ignore[misc]
        arguments: Mapping[str, Any] | None = llm_config.experimental_configs.get(OPTIONS)
        if arguments is not None:
            options["deployment_actors"] = [
                DeploymentActorConfig(
                    name=ACTOR, actor_class=RouterActor, init_kwargs=dict(arguments)
                )
            ]
        return options


class SereServer(_Following, LLMServer):  # type: ignore[misc]
    """A gang of one: a replica that holds all experts."""


class SereGangServer(_Following, DPServer):  # type: ignore[misc]
    """One rank of a data-parallel gang, with its shard of the experts."""


class SkipDownload(CallbackBase):  # type: ignore[misc]
    """Skip Ray's download where the model is a folder of this node.

    Ray would start a worker process on each node to find out that there is nothing to download.
    That took 20 s and 0.6 GB (measured once, in no result file).
    """

    async def on_before_node_init(self) -> None:
        """Tell Ray whether its download is needed; called before a node is prepared."""
        source = self.llm_config.model_loading_config.model_source
        self.ctx.run_init_node = not (isinstance(source, str) and Path(source).is_dir())
