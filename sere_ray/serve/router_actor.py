"""The router as a Ray actor, in a module of its own.

Ray Serve pickles the actor's class by value, with its module's other names; in this one there are
none that another process compares.
"""

import ray

from sere_ray.serve.router import SereRouter


@ray.remote(num_cpus=0, max_concurrency=1000)
class RouterActor(SereRouter):
    """See :class:`SereRouter`."""
