"""What a replica does with an answer of the policy actor, in which order."""

import asyncio
from types import SimpleNamespace

from sere_ray.serve.policy_actor.members import Order, Update
from sere_ray.serve.replica import follower as module


def test_a_version_is_settled_before_the_next_one_is_told(monkeypatch):
    """Else KV blocks of ranks that still run the old one would carry the new one's salt."""
    told = []

    async def poll(member, wait):
        update = Update(version=3, policy={"select_top_k": 1}, sha256="s")
        return Order(updates=[update], settle=member.staged)

    async def collective_rpc(method, timeout, args):
        told.append(method)
        return [None]

    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"))
    monkeypatch.setattr(module.serve, "get_replica_context", lambda: context)
    actor = SimpleNamespace(poll=SimpleNamespace(remote=poll))
    monkeypatch.setattr(module, "_policy_actor", lambda: actor)
    follower = module.Follower("g", 2, 0, "m")
    follower._staged = 2
    engine = SimpleNamespace(collective_rpc=collective_rpc)
    assert asyncio.run(follower._step(engine, wait=False))
    assert told == ["sere_settle", "sere_set_policy"]
    assert (follower._settled, follower._staged) == (2, 3)
