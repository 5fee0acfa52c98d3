"""The policy actor: it owns policy and artifact of a deployment, and every replica follows it.

It is a *deployment actor* of Ray Serve: all replicas share it, and Serve's controller restarts it.
Replicas ask it for news in a long poll, so a late or restarted one is no special case. A version
reaches a gang in two phases:

- *staged*: a rank was told of it. The ranks of a gang switch together, at the next step before
  which all of them were told.
- *settled*: all ranks of the gang were told, so no later step runs an older version.

Ray Serve pickles this module by value: the process of the actor has a copy of what is defined here.
What another process compares or catches (messages, errors) is therefore defined elsewhere.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from sere_ray.observe import metrics
from sere_ray.observe.export import RaySink, Sink
from sere_ray.observe.metric import Metric
from sere_ray.observe.stats import summary
from sere_ray.policy.capabilities import EngineKind, GateFacts
from sere_ray.policy.startup import Startup
from sere_ray.serve.policy_actor.auto_config import AutoConfig
from sere_ray.serve.policy_actor.holdings import Holdings
from sere_ray.serve.policy_actor.locate import own_actor_name
from sere_ray.serve.policy_actor.members import Gangs, Member, Members, Order, Update
from sere_ray.serve.policy_actor.store import Store, ray_store

logger = logging.getLogger("ray.serve")
POLL_SECONDS = 5.0
"""How long a poll waits for news."""
DRAIN_SECONDS = 55.0
"""How long a rank without requests waits for its siblings; less than Serve waits for it."""
ATTACHED_SECONDS = 3 * POLL_SECONDS
"""A member that has not polled for so long is gone."""


class SereRouter:
    """The policy actor, without Ray. All methods are coroutines of one event loop. A change is
    saved before any replica hears of it.

    Args:
        policy: keys of the deployment file's policy; ``similarity`` is a path on this node.
        folder: holds the artifacts that may be swapped in; None allows none.
        max_artifact_bytes: size limit of an artifact.
        gangs: how many the deployment has. What joins beyond that is counted as a restart.
        on_gpu: whether ranks compute on GPUs.
        several_ranks: whether a gang has more than one rank.
        startup: fields of :class:`Startup` that engines are started with.
        store: where the state survives this actor.
        on_followed: called when the first replica polls, so when its engine has started.
        sink: takes metrics; None exports none.
        auto: fields of :class:`AutoConfig`; None allows no mode ``auto``.
        starts_auto: begin in mode ``auto``.
        put: makes an object reference of bytes, as ``ray.put`` does.
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
        startup: Mapping[str, Any] | None = None,
        store: Store,
        on_followed: Callable[[], None] = lambda: None,
        sink: Sink | None = None,
        auto: Mapping[str, Any] | None = None,
        starts_auto: bool = False,
        put: Callable[[bytes], Any] = ray.put,
    ) -> None:
        self._auto_config = None if auto is None else AutoConfig.model_validate(auto)
        self._auto_task: asyncio.Task[None] | None = None
        self._holdings = Holdings(
            policy,
            folder=None if folder is None else Path(folder),
            max_artifact_bytes=max_artifact_bytes,
            engines=EngineKind(on_gpu=on_gpu, several_ranks=several_ranks),
            startup=Startup.model_validate(startup or {}),
            auto=self._auto_config,
            starts_auto=starts_auto,
            store=store,
            put=put,
        )
        self._versions = self._holdings.versions
        self._members = Members(ATTACHED_SECONDS)
        self._gangs, self._num_gangs, self._sink = Gangs(), gangs, sink
        self._on_followed: Callable[[], None] | None = on_followed
        self._news = asyncio.Condition()
        self._change = asyncio.Lock()
        self._reports_wanted: set[str] = set()
        self._counters: dict[str, dict[str, Any]] = {}
        self._measure(metrics.GANG_RESTARTS, 0)
        for direction in ("up", "down"):
            self._measure(metrics.DECISIONS, 0, direction=direction)

    # --- replicas ------------------------------------------------------------------------------

    async def join(self, gang: str) -> Update:
        """The version that a replica of this gang starts with: the same for all its ranks."""
        self._holdings.save_again()
        self._meet(gang)
        return self._gangs.start(gang, self._members.gangs(), self._versions.whole)

    async def note_gates(self, gates: GateFacts) -> None:
        """Take note of what the model's gates keep policies from; a started engine says it."""
        self._holdings.note_gates(gates)

    async def poll(self, member: Member, wait: bool = True) -> Order:
        """Take note of how far a replica is, and answer what it has to do next.

        With ``wait`` the answer comes when there is something to do, at the latest after
        ``POLL_SECONDS``.
        """
        self._meet(member.gang)
        if self._on_followed is not None:
            self._on_followed()
            self._on_followed = None
        is_news = self._members.see(member) or member.counters is not None
        self._holdings.save_again()
        if self._auto_config is not None and self._auto_task is None:
            self._auto_task = asyncio.get_running_loop().create_task(self._watch())
        if member.counters is not None:
            self._counters[member.replica] = member.counters
            self._reports_wanted.discard(member.replica)
        async with self._news:
            if is_news:
                self._news.notify_all()
            if wait and self._order(member) == Order():
                await self._until(lambda: self._order(member) != Order(), POLL_SECONDS)
        self._members.still_here(member.replica)
        return self._order(member)

    async def leave(self, replica: str, gang: str, gang_size: int) -> None:
        """A replica that stops has no requests left. Return when its whole gang has none, at the
        latest after ``DRAIN_SECONDS``.

        When the last replica leaves, the deployment ends: the same file, deployed again, starts
        with its own policy. (A replica that dies does not call this.)
        """
        self._members.drop(replica)
        left = self._gangs.leave(gang, replica)
        async with self._news:
            self._news.notify_all()
            await self._until(lambda: len(left) == gang_size, DRAIN_SECONDS)
        if not self._members.attached():
            self._holdings.forget()

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
            version = self._holdings.change_policy(changes, who)
        await self._announce(version["version"], timeout_s)
        return self._status()

    async def artifact(self) -> dict[str, Any]:
        """Name, hash and origin of the running artifact."""
        return self._holdings.artifact()

    async def set_artifact(self, name: str, who: str, timeout_s: float = 10.0) -> dict[str, Any]:
        """Swap the artifact for another file of the configured folder.

        Raises:
            SereError: no such file, too large, damaged, or of other weights, or these engines keep
                the artifact they were started with; nothing changed.
        """
        async with self._change:
            version = self._holdings.change_artifact(name, who)
        await self._announce(version["version"], timeout_s)
        return {**self._status(), **self._holdings.artifact()}

    async def audit(self) -> list[dict[str, Any]]:
        """Who changed what, oldest first; bounded."""
        return self._holdings.audit.entries()

    async def stats(self, timeout_s: float = 3.0) -> dict[str, Any]:
        """Counters of every replica's engine since its start, and their totals."""
        replicas = await self._counted(timeout_s)
        return {**self._status(), **summary(replicas), "per_replica": replicas}

    async def auto_step(self) -> None:
        """One interval of mode ``auto``: look, and change the level if the controller says so."""
        pilot = self._holdings.pilot
        if pilot is None:
            return
        level = pilot.status()["level"]
        decision = pilot.observe(await self._counted())
        async with self._change:
            if not decision.reason or pilot is not self._holdings.pilot:
                return
            before = self._versions.newest["policy"]
            version = self._holdings.follow_pilot(before=before, **vars(decision))
        self._measure(metrics.DECISIONS, 1, direction="up" if decision.level > level else "down")
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
        wanted = set(self._members.attached())
        self._counters = {k: v for k, v in self._counters.items() if k not in wanted}
        async with self._news:
            self._reports_wanted |= wanted
            self._news.notify_all()
            await self._until(lambda: not self._reports_wanted & wanted, timeout_s)
            self._reports_wanted -= wanted
        return self._members.with_counters(self._counters)

    def _order(self, member: Member) -> Order:
        if not self._versions.can_follow(member.staged):
            return Order(restart=True)
        return Order(
            updates=self._versions.after(member.staged),
            settle=member.staged if self._members.all_told(member) else 0,
            report=member.replica in self._reports_wanted,
        )

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait, holding the lock of ``_news``, until a condition holds or time is up."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait_for(condition), timeout_s)

    def _meet(self, gang: str) -> None:
        """A rank of this gang joins or polls."""
        count = self._gangs.meet(gang)
        if count is not None:
            self._measure(metrics.GANG_RESTARTS, count > self._num_gangs)
        self._measure(metrics.ROUTER_VERSION, self._versions.newest["version"])

    def _measure(self, metric: Metric, value: float, **labels: str) -> None:
        if self._sink is not None:
            self._sink.record(metric, value, **labels)

    async def _announce(self, version: int, timeout_s: float) -> None:
        ranks = self._members
        async with self._news:
            self._news.notify_all()
            await self._until(lambda: ranks.settled(version) == len(ranks.attached()), timeout_s)

    def _status(self) -> dict[str, Any]:
        newest, pilot = self._versions.newest, self._holdings.pilot
        return {
            "version": newest["version"],
            "mode": self._holdings.mode,
            "policy": newest["policy"],
            "auto": None if pilot is None else pilot.status(),
            "replicas": len(self._members.attached()),
            "replicas_settled": self._members.settled(newest["version"]),
        }


@ray.remote(num_cpus=0, max_concurrency=1000)
class RouterActor(SereRouter):
    """The policy actor of a Ray Serve deployment; takes what comes from the deployment file."""

    def __init__(self, **arguments: Any) -> None:
        # On CPUs this starts the node's fork server: it imports while Serve makes the replicas.
        import sere_ray.serve.replica  # noqa: F401

        app, name = own_actor_name()
        store, take_over = ray_store(app, name)
        sink = RaySink({"app": app})
        super().__init__(**arguments, store=store, on_followed=take_over, sink=sink)
