"""Find the policy actor of an application, from any process of the cluster.

``serve.get_deployment_actor`` works only in replicas of the deployment that owns the actor, and the
actor's name holds a code version. So the actor publishes its name in Ray's key-value store.
"""

from contextlib import suppress
from typing import Any

from sere_ray.util.errors import SereError

ACTOR = "sere_router"
"""Name of the actor within its deployment."""
_NAMESPACE = b"sere_ray"


class RouterUnavailableError(SereError):
    """The policy actor is not running: the deployment is starting, or the actor is restarting."""


def own_actor_name() -> tuple[str, str]:
    """Application and full name of the deployment actor that this process is."""
    import ray
    from ray import serve

    context = serve.get_deployment_actor_context()
    name = ray.get_runtime_context().get_actor_name()
    assert name is not None
    return context.app_name, name


def publish(app: str, name: str) -> str | None:
    """Make the actor ``name`` the policy actor of an application; returns which was it before."""
    from ray.experimental import internal_kv as kv

    before = kv._internal_kv_get(_key(app), namespace=_NAMESPACE)
    kv._internal_kv_put(_key(app), name.encode(), namespace=_NAMESPACE)
    return None if before is None else before.decode()


def find_router(app: str) -> Any:
    """Handle of an application's policy actor. Do not keep it: a restarted actor has a new one.

    The call asks the cluster's head and blocks until it answers, so an event loop runs it in a
    thread.

    Raises:
        RouterUnavailableError: there is none now, or the head does not answer.
    """
    import ray
    from ray.exceptions import RaySystemError, RpcError
    from ray.experimental import internal_kv as kv

    with suppress(ValueError, RaySystemError, RpcError):  # no such actor; no head
        name = kv._internal_kv_get(_key(app), namespace=_NAMESPACE)
        if name is not None:
            return ray.get_actor(name.decode(), namespace="serve")
    raise RouterUnavailableError(
        f"application {app!r}: its policy actor is not running; try again in a few seconds"
    )


def _key(app: str) -> bytes:
    return f"router/{app}".encode()
