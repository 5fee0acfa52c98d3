"""Control API, access layer and page over a router of this process; engines are coroutines."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

from fastapi import FastAPI
from ray.exceptions import RayTaskError

from sere_ray.observe.score import Scores
from sere_ray.proxy.limits import Limits
from sere_ray.serve.gateway.access import AccessConfig
from sere_ray.serve.gateway.ingress import protect
from sere_ray.serve.gateway.keys import KeyFile
from sere_ray.serve.policy_actor.actor import SereRouter
from sere_ray.serve.policy_actor.locate import RouterUnavailableError
from sere_ray.serve.policy_actor.store import memory_store
from sere_ray.util.errors import SereError
from sere_ray.util.ports import free_port
from sere_ray.util.token_times import BUCKETS
from tests.serve.deployment import save_keys
from tests.serve.test_actor import LIMIT, TOP_K, Replica, counted, save_artifact

STEPS, ROWS, BEFORE, AFTER, REROUTED, BYTES = 100, 4, (6, 4), (3, 2), (8, 4), (500, 250)
"""What an engine counts from one report to the next: steps, and in a step rows, and by layer
experts before and after, slots re-routed and bytes sent."""


class Engine(Replica):
    """A replica whose counters grow as those of an engine under a steady load."""

    def __init__(self, name, gang, gang_size, rank=0):
        super().__init__(name, gang, gang_size, rank)
        self.idle, self.silent, self.hangs = False, False, False
        self.restart()

    def restart(self):
        """Count from zero."""
        self.steps, self.steps_counted, self.token_times = 0, 0, [0] * BUCKETS
        self.scores = Scores()

    async def step(self, router, wait=False):
        while self.hangs:
            await asyncio.sleep(0.05)
        order = await super().step(router, wait)
        if order.report:
            self.counters = None if self.silent else self._report()
            await asyncio.sleep(0.05 * self.silent)
        return order

    def _report(self):
        new = 0 if self.idle else STEPS
        self.steps += new
        self.steps_counted += 0 if self.told[-1].policy["mode"] == "off" else new
        self.token_times[5] += new
        per_layer = {
            "experts_before": BEFORE,
            "experts_after": AFTER,
            "experts_max_rank_before": AFTER,
            "experts_max_rank_after": AFTER,
            "slots_rerouted": REROUTED,
            "slots_merged": REROUTED,
            "slots_masked": (0, 0),
            "bytes_dispatched_before": BYTES,
            "bytes_dispatched_after": BYTES,
            "critical_kept": (0, 0),
            "beyond_range": (0, 0),
        }
        decode_only = counted(
            steps=self.steps,
            steps_counted=self.steps_counted,
            rows=self.steps * ROWS,
            decode_rows=self.steps * ROWS,
            forward_seconds=self.steps * 0.005 * (1 + self.rank),
            **{key: [self.steps_counted * n for n in each] for key, each in per_layer.items()},
        )
        return {
            "layers": [0, 1],
            "top_k": TOP_K,
            "token_times": list(self.token_times),
            "policy": {"union": "global"},
            "decode_only": decode_only,
            "mixed": counted(steps=0),
            "scores": self.scores.report(),
        }


class Handle:
    """A router of this process, asked as the actor is."""

    def __init__(self, router):
        self._router = router

    def __getattr__(self, name):
        async def remote(*args):
            try:
                return await getattr(self._router, name)(*args)
            except SereError as error:
                raise RayTaskError(name, "", error) from None

        return SimpleNamespace(remote=remote)


class Site:
    """A router, the engines that follow it, and the page in front."""

    def __init__(self, folder, has_keys, auto):
        save_artifact(folder / "a.safetensors")
        self.router = SereRouter(
            {"similarity": str(folder / "a.safetensors"), "select_top_k": 2},
            folder=str(folder),
            max_artifact_bytes=LIMIT,
            auto=auto,
            store=memory_store("router", {}),
            put=lambda content: content,
        )
        self.engines = [Engine(f"r{rank}", "g", 2, rank) for rank in range(2)]
        self.app = FastAPI(lifespan=self._follow)
        access = AccessConfig()
        if has_keys:
            save_keys(folder / "keys.yaml")
            access = AccessConfig(keys_file=str(folder / "keys.yaml"))
        limits = Limits.model_validate({})
        protect(self.app, access=access, keys=KeyFile(), limits=limits, control=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/sere/ui"
        self.has_router = True

    @property
    def newest(self):
        """Version that the router holds, with its policy."""
        return self.router._versions[-1]

    def find_router(self, app):
        if not self.has_router:
            raise RouterUnavailableError(app)
        return Handle(self.router)

    @asynccontextmanager
    async def _follow(self, app):
        for engine in self.engines:
            await engine.join(self.router)
            await engine.step(self.router)
        tasks = [asyncio.create_task(e.follow(lambda: self.router)) for e in self.engines]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
