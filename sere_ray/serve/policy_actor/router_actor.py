"""The router as a Ray actor, in a module of its own.

Ray Serve pickles the actor's class by value, with its module's other names; in this one there are
none that another process compares.
"""

from typing import Any

import ray

from sere_ray.observe.sink import RaySink
from sere_ray.serve.locate import own_actor_name
from sere_ray.serve.policy_actor.router import SereRouter
from sere_ray.serve.policy_actor.store import ray_store


@ray.remote(num_cpus=0, max_concurrency=1000)
class RouterActor(SereRouter):
    """See :class:`SereRouter`."""

    def __init__(self, **arguments: Any) -> None:
        app, name = own_actor_name()
        store, take_over = ray_store(app, name)
        super().__init__(
            **arguments, store=store, on_followed=take_over, sink=RaySink({"app": app})
        )
