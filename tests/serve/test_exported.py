"""What the policy actor and the access layer hand to metrics."""

import asyncio

from sere_ray.observe import metrics
from sere_ray.serve.gateway.access import AccessConfig, AccessLayer
from sere_ray.serve.gateway.keys import KeyFile
from sere_ray.serve.policy_actor.actor import SereRouter
from sere_ray.serve.policy_actor.store import memory_store
from tests.observe.recorded import Recorded
from tests.serve.test_access import KEYS, Inner, ask
from tests.serve.test_actor import LIMIT, Replica, save_artifact


def test_gangs_beyond_those_of_the_deployment_are_restarts(tmp_path):
    save_artifact(tmp_path / "a.safetensors")
    values, recorded = {}, Recorded()

    def router():
        return SereRouter(
            {"similarity": str(tmp_path / "a.safetensors"), "select_top_k": 2},
            folder=None,
            max_artifact_bytes=LIMIT,
            gangs=2,
            sink=recorded,
            store=memory_store("router", values),
            put=lambda content: content,
        )

    async def scenario():
        first = router()
        assert recorded.of(metrics.GANG_RESTARTS) == 0
        a, b, c = (Replica(name, gang=name) for name in "abc")
        for replica in (a, b):
            await replica.join(first)
            await replica.step(first)
        assert recorded.of(metrics.GANG_RESTARTS) == 0
        await c.join(first)
        assert recorded.of(metrics.GANG_RESTARTS) == 1
        second = router()  # a restarted actor meets the gangs that run
        for replica in (b, c, b):
            await replica.step(second)
        assert recorded.of(metrics.GANG_RESTARTS) == 1

    asyncio.run(scenario())


def test_the_routers_version_is_exported_with_every_poll(tmp_path):
    save_artifact(tmp_path / "a.safetensors")
    recorded = Recorded()

    async def scenario():
        router = SereRouter(
            {"similarity": str(tmp_path / "a.safetensors"), "select_top_k": 2},
            folder=None,
            max_artifact_bytes=LIMIT,
            sink=recorded,
            store=memory_store("router", {}),
            put=lambda content: content,
        )
        replica = Replica("r")
        await replica.join(router)
        assert recorded.of(metrics.ROUTER_VERSION) == 0
        await router.set_policy({"select_top_k": 1}, "ops", timeout_s=0)
        await replica.step(router)
        assert recorded.of(metrics.ROUTER_VERSION) == 1

    asyncio.run(scenario())


def test_the_access_layer_tells_the_status_of_every_answer():
    statuses = []
    app = AccessLayer(
        Inner(),
        config=AccessConfig.model_validate({"max_body_bytes": 1024}),
        fixed=KeyFile.model_validate(KEYS),
        count=statuses.append,
    )

    async def scenario():
        await ask(app, key="k-all")
        await ask(app, key="wrong")
        json_type = [(b"content-type", b"application/json")]
        await ask(app, "POST", "/v1/completions", key="k-all", body=b"no json", headers=json_type)
        await ask(app, "POST", "/v1/completions", key="k-all", body=b"x" * 2000)
        await ask(app, path="/sere/policy", key="k-all")

    asyncio.run(scenario())
    assert statuses == [200, 401, 400, 413, 403]
