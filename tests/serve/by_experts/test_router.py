"""The request routers as Ray calls them: Ray's own classes around stand-ins for its replicas."""

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

from sere_ray.serve.by_experts.board import STALE_SECONDS, Board
from sere_ray.serve.by_experts.kinds import Kind, Kinds
from sere_ray.serve.by_experts.router import DirectExpertsRouter, ExpertsRouter
from sere_ray.serve.by_experts.text import text_vector
from tests.serve.by_experts.test_board import CODE, NOTHING, SUMS, stats

SUM = "Work out 313 * 7 + 149 - 4."
DEFINITION = "def area(self):\n    return self.width * self.height\n"
KNOWN = Kinds([Kind(text_vector(SUM), SUMS, 10.0), Kind(text_vector(DEFINITION), CODE, 10.0)])


class Replica:
    """What a router reads of ``RunningReplica``."""

    def __init__(self, name, routing_stats):
        from ray.serve._private.common import DeploymentID, ReplicaID

        self.replica_id = ReplicaID(name, DeploymentID("engines", "app"))
        self.routing_stats = routing_stats
        self.node_id = self.availability_zone = "here"
        self.multiplexed_model_ids = set()
        self.max_ongoing_requests = 100
        self.queue = 0

    async def get_queue_len(self, *, deadline_s):
        return self.queue


def reported(name, gang, load, likes=NOTHING, number=1, **changes):
    return Replica(name, stats(gang, load, likes, number, kinds=KNOWN, **changes))


def two():
    return [reported("a", "g1", 4, SUMS), reported("b", "g2", 4, CODE)]


def started(kind, replicas):
    """A router as ``AsyncioRouter`` makes it; in an event loop."""
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID

    router = kind(
        deployment_id=DeploymentID("engines", "app"),
        handle_source=DeploymentHandleSource.REPLICA,
        self_node_id="here",
        self_actor_id="actor",
        self_actor_handle=None,
        use_replica_queue_len_cache=True,
        create_replica_wrapper_func=lambda replica: replica,
        prefer_local_node_routing=False,
        prefer_local_az_routing=False,
        self_availability_zone=None,
    )
    router.initialize_state()
    router.update_replicas(replicas)
    return router


def request(number=0, text=SUM, **changes):
    from ray.serve._private.common import RequestMetadata

    body = json.dumps({"model": "m", "prompt": text}).encode()
    metadata = RequestMetadata(
        request_id=f"r{number}", internal_request_id=f"i{number}", call_method="serve_http"
    )
    fields = {"args": [{"type": "http"}, body], "kwargs": {}, "metadata": metadata, **changes}
    return PendingRequest(**fields)


async def chosen(router, pending):
    """Names of the replicas of the first rank: what direct streaming takes the first of."""
    ranks = await router.choose_replicas(router._replicas_list, pending)
    return [replica.replica_id.unique_id for replica in ranks[0]]


@pytest.fixture(params=[ExpertsRouter, DirectExpertsRouter])
def kind(request):
    return request.param


def test_a_request_goes_to_the_gang_that_reads_its_experts(kind):
    async def play():
        router = started(kind, two())
        sums = [await chosen(router, request(i)) for i in range(2)]
        code = [await chosen(router, request(i, DEFINITION)) for i in range(2, 4)]
        return sums, code

    assert asyncio.run(play()) == ([["a"]] * 2, [["b"]] * 2)


def test_the_body_as_rays_ingress_request_router_has_it():
    async def play():
        router = started(DirectExpertsRouter, two())
        fields = SimpleNamespace(model="m", messages=[{"role": "user", "content": DEFINITION}])
        return await chosen(router, request(args=[fields]))

    assert asyncio.run(play()) == ["b"]


def test_direct_streaming_counts_what_it_has_placed():
    """Nobody says how many requests a replica has until it reports again."""

    async def play():
        router = started(DirectExpertsRouter, two())
        return [(await chosen(router, request(i)))[0] for i in range(12)]

    found = asyncio.run(play())
    assert found[0] == "a"
    assert 5 <= found.count("a") <= 7, "balance comes first"


def test_behind_rays_proxy_ray_counts(kind):
    """Ray's cache of queue lengths is what its ingress has sent; direct streaming sends nothing."""

    async def play():
        router = started(kind, two())
        await asyncio.sleep(0)  # the first probe of queue lengths
        for replica, queue in zip(router._replicas_list, (9, 1), strict=True):
            router.on_new_queue_len_info(replica.replica_id, queue)
        return await chosen(router, request())

    assert asyncio.run(play()) == (["b"] if kind is ExpertsRouter else ["a"])


def test_ray_sends_each_request_where_it_was_placed():
    """Through Ray's own loop: two requests wait at once, and neither gets the other's replica."""

    async def play():
        router = started(ExpertsRouter, two())
        await asyncio.sleep(0.01)
        pending = [request(0, DEFINITION), request(1, SUM)]
        found = await asyncio.gather(*map(router._choose_replica_for_request, pending))
        for one, replica in zip(pending, found, strict=True):
            router.on_request_routed(one, replica.replica_id, None)
        placed = {name: len(rank.placed) for name, rank in router.board._ranks.items()}
        return [replica.replica_id.unique_id for replica in found], placed

    assert asyncio.run(play()) == (["b", "a"], {"a": 1, "b": 1})


def test_a_report_is_as_old_as_rays_news_of_it(kind):
    """Not as new as the first request after an idle spell makes it."""

    async def play():
        router, now = started(kind, []), [1000.0]
        router.board = Board(lambda: now[0])
        router.update_replicas(two())
        now[0] += STALE_SECONDS + 1
        old = router.in_order(router._replicas_list, request(0))
        router.update_replicas([reported("a", "g1", 4, SUMS, 2), reported("b", "g2", 4, CODE, 2)])
        now[0] += STALE_SECONDS - 1
        return old, await chosen(router, request(1))

    assert asyncio.run(play()) == (None, ["a"])


MISSING = {
    "a replica that has not reported": lambda: [reported("a", "g1", 0), Replica("b", {})],
    "signatures of another model": lambda: [
        reported("a", "g1", 0),
        reported("b", "g2", 0, model="another"),
    ],
    "a report that is none": lambda: [reported("a", "g1", 0), Replica("b", {"sere_experts": 7})],
    "routing stats of another form": lambda: [Replica("a", None), Replica("b", [])],
}


@pytest.mark.parametrize("replicas", MISSING.values(), ids=MISSING)
def test_rays_own_router_decides_where_something_is_missing(kind, replicas, caplog, monkeypatch):
    async def play():
        router = started(kind, replicas())
        return [await chosen(router, request(i)) for i in range(8)]

    log = logging.getLogger("ray.serve")
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    log.setLevel(logging.INFO)
    found = asyncio.run(play())
    assert {name for names in found for name in names} == {"a", "b"}
    said = [r for r in caplog.records if "not placed by experts" in r.getMessage()]
    assert len(said) == 1, "one line, not one a request"


@pytest.mark.parametrize(
    "pending",
    [
        None,
        request(args=[]),
        request(args=[{"type": "http"}, b"{not json"]),
        request(args=[SimpleNamespace(prompt=[1, 2, 3])]),
        request(text="\N{SNOWMAN}" * 40),
    ],
    ids=["none", "no arguments", "no JSON", "tokens", "a text like no other"],
)
def test_rays_own_router_places_what_has_no_signature(kind, pending):
    async def play():
        router = started(kind, two())
        return [(await chosen(router, pending))[0] for _ in range(20)]

    assert set(asyncio.run(play())) == {"a", "b"}


def test_no_error_stops_a_request(kind, monkeypatch):
    async def play():
        router = started(kind, two())
        monkeypatch.setattr(router.board, "tell", lambda text: 1 / 0)
        monkeypatch.setattr(router.board, "placed", lambda name: 1 / 0)
        pending = request()
        router.note(router._replicas_list[0].replica_id)
        return await chosen(router, pending)

    assert asyncio.run(play())


def test_a_gang_that_vanishes_while_a_request_is_placed(kind):
    async def play():
        replicas = two()
        router = started(kind, replicas)
        assert await chosen(router, request(0)) == ["a"]
        router.on_replica_actor_died(replicas[0].replica_id)
        router.note(replicas[0].replica_id)
        alone = await chosen(router, request(1))
        router.update_replicas([replicas[1], reported("c", "g3", 0, SUMS)])
        return alone, await chosen(router, request(2))

    assert asyncio.run(play()) == (["b"], ["c"])


def test_a_router_that_starts_anew_knows_all_from_the_reports(kind):
    async def play():
        replicas = two()
        first, second = started(kind, replicas), started(kind, replicas)
        for i in range(3):
            await chosen(first, request(i))
        return await chosen(second, request(9)), await chosen(second, request(10, DEFINITION))

    assert asyncio.run(play()) == (["a"], ["b"])


def test_ray_takes_the_classes(kind):
    """By value or by name: it imports them in other processes."""
    name = f"{kind.__module__}.{kind.__name__}"
    for given in (kind, name):
        config = RequestRouterConfig(request_router_class=given)
        assert config.get_request_router_class() is kind
