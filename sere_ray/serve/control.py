"""Control of the engine behind a Serve deployment, by RPC name only."""

from typing import Any


class ReplicaEngine:
    """The engine of a one-replica deployment, as :class:`sere_ray.engine.control.Engine`."""

    def __init__(self, deployment: str, app: str) -> None:
        from ray import serve

        self._handle = serve.get_deployment_handle(deployment, app_name=app)

    def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a worker method by name and wait at most a minute."""
        response = self._handle.collective_rpc.remote(method=method, args=args)
        results: list[Any] = response.result(timeout_s=60)
        return results
