"""The router actor: it owns policy and artifact of a deployment, and every replica follows it.

It is a controller-managed deployment actor of Ray Serve: shared by all replicas, restarted by the
controller, not by Ray. Replicas ask, in a long poll, as Serve's own replicas do for their
configuration; so a late or restarted replica is no special case, and the actor needs no list of
replicas. Two phases for each version: *staged* (the rank was told; ranks of a gang switch together
at the next step before which all were told) and *settled* (all ranks of its gang were told, so that
no later step runs an older one).
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_ray.artifact import SimilarityArtifact
from sere_ray.capabilities import EngineKind, check_change, check_swap
from sere_ray.config import Policy
from sere_ray.errors import SereError
from sere_ray.observe import metrics
from sere_ray.observe.sink import Sink
from sere_ray.serve.artifacts import ArtifactFile, path_in, read_artifact
from sere_ray.serve.auto import AUTO, AutoConfig, AutoPilot
from sere_ray.serve.messages import Member, Order, Update
from sere_ray.serve.stats import means, totals
from sere_ray.serve.store import Store
from sere_ray.token_times import quantile_ms

logger = logging.getLogger("ray.serve")
HISTORY = 64
"""Versions kept for replicas that follow; one that is further behind starts anew."""
AUDIT_ENTRIES = 200
POLL_SECONDS = 5.0
"""How long a poll waits for news."""
DRAIN_SECONDS = 55.0
"""How long a rank without requests waits for its siblings; less than Serve waits for it."""
ATTACHED_SECONDS = 3 * POLL_SECONDS
"""A member that has not polled for so long is gone."""


@dataclass
class _Seen:
    member: Member
    time: float


class SereRouter:
    """The actor. All methods are coroutines of one event loop; a change is persisted before any
    replica hears of it.

    Args:
        policy: of the deployment file; ``similarity`` is a path on this node.
        folder: of artifacts that may be swapped in; None allows none.
        max_artifact_bytes: size limit of an artifact.
        gangs: that the deployment has; those beyond are counted as restarts.
        on_gpu: whether ranks compute on GPUs.
        several_ranks: whether a gang has more than one.
        sink: of metrics; None exports none.
        auto: fields of :class:`AutoConfig`; None allows no mode ``auto``.
        starts_auto: begin in it.
        store: where state survives this actor; None = Ray's key-value store.
        put: makes an object reference of bytes; None = ``ray.put``.
    """

    def __init__(
        self,
        policy: Mapping[str, Any],
        *,
        folder: str | None,
        max_artifact_bytes: int,
        gangs: int = 1,
        on_gpu: bool = False,
        several_ranks: bool = False,
        sink: Sink | None = None,
        auto: Mapping[str, Any] | None = None,
        starts_auto: bool = False,
        store: Store | None = None,
        put: Any = None,
    ) -> None:
        if store is None:
            from sere_ray.serve.store import ray_store

            store = ray_store()
        if put is None:
            import ray

            put = ray.put
        self._put, self._store = put, store
        self._folder = None if folder is None else Path(folder)
        self._max_bytes = max_artifact_bytes
        self._sink, self._gangs = sink, gangs
        self._engines = EngineKind(on_gpu=on_gpu, several_ranks=several_ranks)
        self._gangs_met: set[str] = set()
        self._members: dict[str, _Seen] = {}
        self._gang_start: dict[str, Update] = {}
        self._refs: dict[str, Any] = {}
        self._news = asyncio.Condition()
        self._change = asyncio.Lock()
        self._reports_wanted: set[str] = set()
        self._counters: dict[str, dict[str, Any]] = {}
        self._left: dict[str, set[str]] = {}
        self._saved = True
        self._audit: deque[dict[str, Any]] = deque(maxlen=AUDIT_ENTRIES)
        self._auto_config = None if auto is None else AutoConfig.model_validate(auto)
        self._pilot: AutoPilot | None = None  # there is one in mode auto
        self._auto_task: asyncio.Task[None] | None = None
        state = store.load()
        if state is None:
            self._file = read_artifact(Path(policy["similarity"]).expanduser(), max_artifact_bytes)
            self._versions = [_version(0, Policy.parse(dict(policy)), self._file.sha256)]
            self._record("start", "deployment file", self._versions[-1])
        else:
            self._versions = state["versions"]
            self._audit.extend(state["audit"])
            sha256 = self._versions[-1]["sha256"]
            self._file = ArtifactFile(state["name"], sha256, store.load_blob(sha256))
            self._record("restart", "router", self._versions[-1])
        self._artifact: SimilarityArtifact = self._file.parse()
        base = Policy.parse(self._versions[-1]["policy"])
        base.for_model(top_k=self._top_k)
        if state is None:
            pilot = None if auto is None else self._new_pilot(base)  # checks the levels, too
            self._pilot = pilot if starts_auto else None
            self._save(self._file)
        elif state.get("auto") is not None:
            self._resume(Policy.parse({**state["auto"], "similarity": self._file.name}))
        self._measure(metrics.GANG_RESTARTS, 0)
        for direction in ("up", "down"):
            self._measure(metrics.DECISIONS, 0, direction=direction)

    # --- replicas ------------------------------------------------------------------------------

    async def join(self, gang: str) -> Update:
        """What a replica of this gang starts with: the same for all its ranks.

        A gang restarts as a whole and under a new id.
        """
        self._save_again()
        self._meet(gang)
        if gang not in self._gang_start:
            self._forget_gangs()
            self._gang_start[gang] = self._update(self._versions[-1], with_content=True)
        return self._gang_start[gang]

    async def poll(self, member: Member, wait: bool = True) -> Order:
        """Take note of a replica and wait until there is something for it, at most
        ``POLL_SECONDS``."""
        self._meet(member.gang)
        seen = self._members.get(member.replica)
        news = seen is None or seen.member != member or member.counters is not None
        self._members[member.replica] = _Seen(member, time.monotonic())
        self._save_again()
        if self._auto_config is not None and self._auto_task is None:
            self._auto_task = asyncio.get_running_loop().create_task(self._watch())
        if member.counters is not None:
            self._counters[member.replica] = member.counters
            self._reports_wanted.discard(member.replica)
        async with self._news:
            if news:
                self._news.notify_all()
            if wait and self._order(member) == Order():
                await self._until(lambda: self._order(member) != Order(), POLL_SECONDS)
        if member.replica in self._members:  # alive while it waited
            self._members[member.replica].time = time.monotonic()
        return self._order(member)

    async def leave(self, replica: str, gang: str, gang_size: int) -> None:
        """A replica stops and has no requests left: wait until its gang has none, at most
        ``DRAIN_SECONDS``.

        When the last one leaves, the deployment ends: the same file, deployed again, starts with
        its own policy. (A dead replica does not take its leave.)
        """
        self._members.pop(replica, None)
        left = self._left.setdefault(gang, set())
        left.add(replica)
        async with self._news:
            self._news.notify_all()
            await self._until(lambda: len(left) == gang_size, DRAIN_SECONDS)
        if not self._attached():
            self._store.forget()
            self._saved = False

    # --- control -------------------------------------------------------------------------------

    async def policy(self) -> dict[str, Any]:
        """The newest version, and how many replicas run it."""
        return self._status()

    async def set_policy(
        self, changes: Mapping[str, Any], who: str, timeout_s: float = 10.0
    ) -> dict[str, Any]:
        """Change keys of the policy, and wait until all replicas follow.

        Args:
            changes: keys of a policy, without ``similarity``; its mode may be ``auto``. Without a
                mode, in mode ``auto`` keys change under the levels.
            who: for the audit log.
            timeout_s: how long to wait; the change stands in any case.

        Raises:
            SereError: the policy is not valid; nothing has changed.
        """
        async with self._change:
            newest = self._versions[-1]
            try:
                policy = self._changed(changes)
            except SereError as error:
                self._refuse("policy", who, str(error))
                raise
            version = self._next(policy, newest["sha256"])
            self._record("policy", who, version, before=newest["policy"], mode=self._mode)
            self._save()
        await self._announce(version["version"], timeout_s)
        return self._status()

    async def artifact(self) -> dict[str, Any]:
        """Name, hash and origin of the running artifact."""
        return {
            "name": self._file.name,
            "sha256": self._file.sha256,
            "bytes": len(self._file.content),
            "layers": sorted(self._artifact.layers),
            "metadata": self._artifact.metadata.model_dump(),
        }

    async def set_artifact(self, name: str, who: str, timeout_s: float = 10.0) -> dict[str, Any]:
        """Swap the artifact for another file of the configured folder.

        Raises:
            SereError: no such file, too large, damaged, or of other weights, or these engines keep
                the artifact they were started with; nothing changed.
        """
        async with self._change:
            newest = self._versions[-1]
            try:
                new = read_artifact(path_in(self._folder, name), self._max_bytes)
                artifact = new.parse()
                artifact.check_replaces(self._artifact, path=name)
                check_swap(name, self._file.name, **self._engines)
            except SereError as error:
                self._refuse("artifact", who, str(error))
                raise
            policy = Policy.parse({**newest["policy"], "similarity": new.name})
            self._file, self._artifact = new, artifact
            if self._pilot is not None:
                self._pilot.rebase(self._pilot.base.model_copy(update={"similarity": new.name}))
            version = self._next(policy, new.sha256)
            self._record("artifact", who, version, before={"sha256": newest["sha256"]})
            self._save(new)
        await self._announce(version["version"], timeout_s)
        return {**self._status(), **await self.artifact()}

    async def audit(self) -> list[dict[str, Any]]:
        """Who changed what, oldest first; bounded."""
        return list(self._audit)

    async def stats(self, timeout_s: float = 3.0) -> dict[str, Any]:
        """Counters of every replica's engine since its start, and their totals."""
        replicas = await self._counted(timeout_s)
        total = totals(replicas)
        return {
            **self._status(),
            "total": total,
            "decode_only_means": means(total["decode_only"]),
            "mixed_means": means(total["mixed"]),
            "tpot_p90_ms": quantile_ms(total["token_times"], 0.9),
            "per_replica": replicas,
        }

    async def auto_step(self) -> None:
        """One interval of mode ``auto``: look, and change the level if the controller says so."""
        pilot = self._pilot
        if pilot is None:
            return
        level = pilot.status()["level"]
        decision = pilot.observe(await self._counted())
        async with self._change:
            if not decision.reason or pilot is not self._pilot:
                return
            newest = self._versions[-1]
            version = self._next(pilot.policy, newest["sha256"])
            self._record(
                "policy", AUTO, version, before=newest["policy"], mode=AUTO, **vars(decision)
            )
            self._save()
        direction = "up" if decision.level > level else "down"
        self._measure(metrics.DECISIONS, 1, direction=direction)
        await self._announce(version["version"], 0.0)

    # --- inside --------------------------------------------------------------------------------

    async def _watch(self) -> None:
        assert self._auto_config is not None
        while True:
            await asyncio.sleep(self._auto_config.interval_s)
            try:
                await self.auto_step()
            except Exception:  # the next interval is another try; until then the level holds
                logger.exception("sere-ray: mode auto")

    async def _counted(self, timeout_s: float = 3.0) -> list[dict[str, Any]]:
        """Counters of every replica's engine; None for one that does not answer in time."""
        wanted = set(self._attached())
        self._counters = {k: v for k, v in self._counters.items() if k not in wanted}
        async with self._news:
            self._reports_wanted |= wanted
            self._news.notify_all()
            await self._until(lambda: not self._reports_wanted & wanted, timeout_s)
            self._reports_wanted -= wanted
        members = [seen.member for seen in self._attached().values()]
        return [
            {
                "replica": m.replica,
                "gang": m.gang,
                "rank": m.rank,
                "version": m.staged,
                "counters": self._counters.get(m.replica),
            }
            for m in sorted(members, key=lambda m: (m.gang, m.rank))
        ]

    def _changed(self, changes: Mapping[str, Any]) -> Policy:
        """The policy after a change of keys, and the mode ``auto`` begun, kept or ended.

        Raises:
            SereError: it is not valid; nothing has changed.
        """
        if "similarity" in changes and changes["similarity"] != self._file.name:
            raise SereError(
                f"policy.similarity = {changes['similarity']!r}: the artifact is changed "
                "with PUT /sere/artifact; leave the key out"
            )
        mode = changes.get("mode", self._mode)
        newest, pilot = self._versions[-1]["policy"], self._pilot
        base = newest if pilot is None else pilot.base.model_dump()
        keys = {**base, **changes, "similarity": self._file.name}
        policy = Policy.parse({**keys, "mode": "off"} if mode == AUTO else keys, where="policy")
        policy.for_model(top_k=self._top_k, where="policy")
        policy.check_layers(len(self._artifact.layers), where="policy")
        running = Policy.parse(newest)
        check_change(policy, running, **self._engines, where="policy")
        if mode != AUTO:
            self._pilot = None
            return policy
        if pilot is None:
            pilot = self._new_pilot(policy)
        pilot.rebase(policy)
        self._pilot = pilot
        return pilot.policy

    def _new_pilot(self, base: Policy) -> AutoPilot:
        if self._auto_config is None:
            raise SereError(
                "policy.mode = 'auto': this deployment has no levels; give `auto` in its file"
            )
        return AutoPilot(base, self._auto_config, self._top_k)

    def _resume(self, base: Policy) -> None:
        """Go on in mode ``auto`` after a restart, from exact routing."""
        self._pilot = self._new_pilot(base)
        version = self._next(self._pilot.policy, self._versions[-1]["sha256"])
        self._record("policy", AUTO, version, mode=AUTO, level=0, reason="the router restarted")
        self._save()

    @property
    def _top_k(self) -> int:
        return self._artifact.metadata.top_k

    @property
    def _mode(self) -> str:
        return AUTO if self._pilot is not None else str(self._versions[-1]["policy"]["mode"])

    def _order(self, member: Member) -> Order:
        oldest, newest = self._versions[0]["version"], self._versions[-1]["version"]
        if not oldest - 1 <= member.staged <= newest:
            return Order(restart=True)
        updates: list[Update] = []
        sha256 = self._sha256_of(member.staged)
        for version in self._versions:
            if version["version"] > member.staged:
                changed = version["sha256"] != sha256
                updates.append(self._update(version, with_content=changed))
                sha256 = version["sha256"]
        gang = [m for m in self._gang_of(member) if m.staged >= member.staged]
        all_told = len(gang) == member.gang_size and member.staged > member.settled
        return Order(
            updates=updates,
            settle=member.staged if all_told else 0,
            report=member.replica in self._reports_wanted,
        )

    def _sha256_of(self, version: int) -> str | None:
        return next((v["sha256"] for v in self._versions if v["version"] == version), None)

    def _update(self, version: Mapping[str, Any], *, with_content: bool) -> Update:
        sha256 = version["sha256"]
        if with_content and sha256 not in self._refs:
            same = sha256 == self._file.sha256
            self._refs[sha256] = self._put(
                self._file.content if same else self._store.load_blob(sha256)
            )
        content = self._refs[sha256] if with_content else None
        return Update(version["version"], version["policy"], sha256, content)

    def _attached(self) -> dict[str, _Seen]:
        """Members that still poll. The siblings of a dead rank are replaced with it."""
        now = time.monotonic()
        self._members = {
            replica: seen
            for replica, seen in self._members.items()
            if now - seen.time < ATTACHED_SECONDS
        }
        return self._members

    def _gang_of(self, member: Member) -> list[Member]:
        members = (seen.member for seen in self._attached().values())
        return [m for m in members if m.gang == member.gang]

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait, holding the lock of ``_news``, until a condition holds or time is up."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait_for(condition), timeout_s)

    def _forget_gangs(self) -> None:
        """Drop start versions of gangs that are no more, but for a few that may be starting."""
        alive = {seen.member.gang for seen in self._attached().values()}
        for gang in [g for g in self._gang_start if g not in alive][:-8]:
            del self._gang_start[gang]
            self._left.pop(gang, None)

    def _next(self, policy: Policy, sha256: str) -> dict[str, Any]:
        version = _version(self._versions[-1]["version"] + 1, policy, sha256)
        self._versions = [*self._versions, version][-HISTORY:]
        used = {v["sha256"] for v in self._versions}
        self._refs = {sha: ref for sha, ref in self._refs.items() if sha in used}
        return version

    def _meet(self, gang: str) -> None:
        """A rank of this gang joins or polls. A gang that is restarted comes under a new id."""
        if gang not in self._gangs_met:
            self._gangs_met.add(gang)
            self._measure(metrics.GANG_RESTARTS, len(self._gangs_met) > self._gangs)
        self._measure(metrics.ROUTER_VERSION, self._versions[-1]["version"])

    def _measure(self, metric: metrics.Metric, value: float, **labels: str) -> None:
        if self._sink is not None:
            self._sink.record(metric, value, **labels)

    async def _announce(self, version: int, timeout_s: float) -> None:
        async with self._news:
            self._news.notify_all()
            await self._until(lambda: self._settled(version) == len(self._attached()), timeout_s)

    def _settled(self, version: int) -> int:
        return sum(seen.member.settled >= version for seen in self._attached().values())

    def _status(self) -> dict[str, Any]:
        newest = self._versions[-1]
        return {
            "version": newest["version"],
            "mode": self._mode,
            "policy": newest["policy"],
            "auto": None if self._pilot is None else self._pilot.status(),
            "replicas": len(self._attached()),
            "replicas_settled": self._settled(newest["version"]),
        }

    def _record(self, what: str, who: str, version: Mapping[str, Any], **more: Any) -> None:
        self._audit.append({"time": _now(), "who": who, "what": what, "after": version, **more})

    def _refuse(self, what: str, who: str, reason: str) -> None:
        self._audit.append({"time": _now(), "who": who, "what": what, "refused": reason[:500]})

    def _save_again(self) -> None:
        """There is a replica after all."""
        if not self._saved:
            self._save()

    def _save(self, new: ArtifactFile | None = None) -> None:
        if new is not None:
            self._store.save_blob(new.sha256, new.content)
        self._saved = True
        self._store.save(
            {
                "versions": self._versions,
                "audit": list(self._audit),
                "name": self._file.name,
                "auto": None if self._pilot is None else self._pilot.base.model_dump(),
            },
            blobs={v["sha256"] for v in self._versions},
        )


def _version(number: int, policy: Policy, sha256: str) -> dict[str, Any]:
    return {"version": number, "policy": policy.model_dump(), "sha256": sha256}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
