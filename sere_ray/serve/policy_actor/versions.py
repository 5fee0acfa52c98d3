"""Versions of the policy, and the audit log of how they came about; oldest first, both bounded."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from sere_ray.policy.policy import Policy
from sere_ray.serve.policy_actor.members import Update

HISTORY = 64
"""How many versions are kept. A replica that is further behind has to restart."""
AUDIT_ENTRIES = 200
"""How many entries the audit log keeps."""


def first_version(policy: Policy, sha256: str) -> dict[str, Any]:
    """Version 0: the policy of a deployment file."""
    return _version(0, policy, sha256)


def _version(number: int, policy: Policy, sha256: str) -> dict[str, Any]:
    return {"version": number, "policy": policy.model_dump(), "sha256": sha256}


class Versions:
    """The newest ``HISTORY`` versions: number, policy and the artifact's hash.

    Args:
        kept: at least one version, oldest first.
        load: returns the content of the artifact with a hash.
        put: makes an object reference of a content.
        masks: hash of the masks that all versions run beside; empty = there are none.
    """

    def __init__(
        self,
        kept: list[dict[str, Any]],
        *,
        load: Callable[[str], bytes],
        put: Callable[[bytes], Any],
        masks: str = "",
    ) -> None:
        self.kept = kept
        self._load, self._put, self._masks = load, put, masks
        self._refs: dict[str, Any] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.kept[index]

    @property
    def newest(self) -> dict[str, Any]:
        """The version that all replicas are to run."""
        return self.kept[-1]

    @property
    def hashes(self) -> set[str]:
        """Hashes of the files that kept versions name."""
        return {self._masks, *(version["sha256"] for version in self.kept)} - {""}

    def add(self, policy: Policy, sha256: str) -> dict[str, Any]:
        """A new version; the oldest is dropped where there are too many."""
        version = _version(self.newest["version"] + 1, policy, sha256)
        self.kept = [*self.kept, version][-HISTORY:]
        self._refs = {sha: ref for sha, ref in self._refs.items() if sha in self.hashes}
        return version

    def can_follow(self, staged: int) -> bool:
        """Whether a replica at this version finds all later ones here."""
        return bool(self.kept[0]["version"] - 1 <= staged <= self.newest["version"])

    def after(self, staged: int) -> list[Update]:
        """Later versions, each with its artifact only where that differs from the one before."""
        updates = []
        sha256 = next((v["sha256"] for v in self.kept if v["version"] == staged), None)
        for version in self.kept:
            if version["version"] > staged:
                changed = version["sha256"] != sha256
                updates.append(self._update(version, with_content=changed))
                sha256 = version["sha256"]
        return updates

    def whole(self) -> Update:
        """The newest version with its files, for a replica that starts."""
        update = self._update(self.newest, with_content=True)
        return replace(update, masks_sha256=self._masks, masks=self._reference(self._masks))

    def _update(self, version: Mapping[str, Any], *, with_content: bool) -> Update:
        sha256 = version["sha256"]
        content = self._reference(sha256) if with_content else None
        return Update(version["version"], version["policy"], sha256, content)

    def _reference(self, sha256: str) -> Any:
        """Of the content with a hash, made once; None = there is none."""
        if sha256 and sha256 not in self._refs:
            self._refs[sha256] = self._put(self._load(sha256))
        return self._refs.get(sha256)


class AuditLog:
    """Who changed what, and what was refused; the newest ``AUDIT_ENTRIES``.

    Args:
        entries: those of an earlier actor, oldest first.
    """

    def __init__(self, entries: Iterable[dict[str, Any]] = ()) -> None:
        self._entries: deque[dict[str, Any]] = deque(entries, maxlen=AUDIT_ENTRIES)

    def entries(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return list(self._entries)

    def record(self, what: str, who: str, version: Mapping[str, Any], **more: Any) -> None:
        """Add an entry for a new version."""
        self._entries.append({"time": _now(), "who": who, "what": what, "after": version, **more})

    def refuse(self, what: str, who: str, reason: str) -> None:
        """Add an entry for a change that was refused."""
        self._entries.append({"time": _now(), "who": who, "what": what, "refused": reason[:500]})


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
