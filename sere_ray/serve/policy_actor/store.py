"""Where the policy actor's state survives the actor: Ray's key-value store in the GCS.

The state is small (JSON), an artifact a few megabytes. Both are kept under the actor's own name,
which Ray Serve makes of application, deployment and code version: so a new deployment file starts
anew. The store lives as long as the Ray cluster, or longer where the GCS (Ray's head process) has a
fault-tolerant back end.
"""

import json
from collections.abc import Callable, Collection
from typing import Any

_NAMESPACE = b"sere_ray"


class Store:
    """State and blobs under one name.

    Args:
        name: of the owner; every key begins with it.
        get: returns the value of a key, None if there is none.
        put: sets a key.
        delete: removes a key.
        keys: returns all keys with a prefix.
    """

    def __init__(
        self,
        name: str,
        get: Callable[[bytes], bytes | None],
        put: Callable[[bytes, bytes], object],
        delete: Callable[[bytes], object],
        keys: Callable[[bytes], Collection[bytes]],
    ) -> None:
        self._name = name
        self._get, self._put, self._delete, self._keys = get, put, delete, keys

    def load(self) -> dict[str, Any] | None:
        """The state last saved, None if there is none."""
        raw = self._get(self._key("state"))
        return None if raw is None else json.loads(raw)

    def save(self, state: dict[str, Any], *, blobs: Collection[str]) -> None:
        """Save the state; blobs that it no longer names are dropped."""
        self._put(self._key("state"), json.dumps(state).encode())
        prefix = self._key("blob/")
        for key in self._keys(prefix):
            if key.removeprefix(prefix).decode() not in blobs:
                self._delete(key)

    def forget(self) -> None:
        """Drop the state, but no blob."""
        self._delete(self._key("state"))

    def load_blob(self, sha256: str) -> bytes:
        """Content that was saved under this hash."""
        content = self._get(self._key(f"blob/{sha256}"))
        assert content is not None, f"no blob {sha256} although the state names it"
        return content

    def save_blob(self, sha256: str, content: bytes) -> None:
        """Keep content under its hash."""
        self._put(self._key(f"blob/{sha256}"), content)

    def _key(self, what: str) -> bytes:
        return f"{self._name}/{what}".encode()


def memory_store(name: str, values: dict[bytes, bytes]) -> Store:
    """A store in a dictionary."""
    return Store(
        name,
        values.get,
        values.__setitem__,
        lambda key: values.pop(key, None),
        lambda prefix: [key for key in values if key.startswith(prefix)],
    )


def ray_store(app: str, name: str) -> tuple[Store, Callable[[], None]]:
    """The store of a policy actor, and a function that makes it the one of its application.

    Call the function when an engine follows the actor, not before. While an application is updated,
    the old actor still has the gangs that serve, and keeps them if the new ones do not start. So
    what the actor before this one has stored stays; what older ones left is removed.

    Args:
        app: name of the application.
        name: of the actor.

    Returns:
        The store, and the function.
    """
    from ray.experimental import internal_kv as kv

    from sere_ray.serve.policy_actor.locate import publish

    def delete(key: bytes) -> None:
        kv._internal_kv_del(key, namespace=_NAMESPACE)

    def keys(prefix: bytes) -> list[bytes]:
        found: list[bytes] = kv._internal_kv_list(prefix, namespace=_NAMESPACE)
        return found

    def take_over() -> None:
        before = publish(app, name)
        if before is None or before == name:
            return
        kept = tuple(f"{app}/{owner}/".encode() for owner in (before, name))
        for key in keys(f"{app}/".encode()):
            if not key.startswith(kept):
                delete(key)

    store = Store(
        f"{app}/{name}",
        lambda key: kv._internal_kv_get(key, namespace=_NAMESPACE),
        lambda key, value: kv._internal_kv_put(key, value, namespace=_NAMESPACE),
        delete,
        keys,
    )
    return store, take_over
