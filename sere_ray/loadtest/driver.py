"""Sends a load from one process and keeps what became of every request."""

import itertools
import json
import random
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import gevent
import gevent.event
import gevent.pool

from sere_ray.loadtest.arrivals import Arrivals
from sere_ray.loadtest.client import Client, Limits, Outcome, now
from sere_ray.loadtest.histogram import Histogram
from sere_ray.loadtest.workload import ClientKey, Entry

Api = Literal["chat", "completions"]
PATHS = {"chat": "/chat/completions", "completions": "/completions"}
Cache = Literal["cold", "block", "server"]
_LAG_PERIOD = 0.005
_MAX_UNDER_WAY = 4096
_PAUSE_AFTER_FAILURE = 0.2
"""Seconds; or a user of a server that refuses at once would do nothing but ask."""


@dataclass(frozen=True)
class Target:
    """Whom to ask, and how."""

    base_url: str
    """Address of the endpoint; ends in ``/v1``."""
    model: str
    api: Api = "chat"
    keys: tuple[ClientKey, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def request(self, entry: Entry, draw: random.Random, salt: str | None) -> dict[str, Any]:
        """Body and headers of one request.

        Args:
            entry: what is asked.
            draw: chooses the API key, by weight.
            salt: keeps the request's prefix apart in the server's cache; None = not sent.

        Returns:
            ``{"body": bytes, "headers": {name: value}}``.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": entry.max_tokens,
            "temperature": entry.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.api == "chat":
            body["messages"] = [{"role": "user", "content": entry.prompt}]
        else:
            body["prompt"] = entry.prompt
        if entry.ignore_eos:
            body["ignore_eos"] = True
        if salt is not None:
            body["cache_salt"] = salt
        headers = {}
        if self.keys:
            (key,) = draw.choices(self.keys, [key.weight for key in self.keys])
            headers = key.headers(entry)
        return {"body": json.dumps(body).encode(), "headers": headers}


def new_salt() -> str:
    """A random salt for the prefix cache.

    No other load has had it, in this run or an earlier one: a server keeps prefixes between runs.
    """
    return secrets.token_hex(8)


@dataclass(frozen=True)
class LoadPlan:
    """What one load sends.

    With ``streams`` it is closed: so many users, each waits for its answer. With ``arrivals`` it is
    open: requests come at random times, whatever comes back. With neither it is open, too, and the
    entries say when they are due (a trace).
    """

    target: Target
    entries: tuple[Entry, ...]
    seconds: float
    """Length of the measured part."""
    warmup: float = 0.0
    """Seconds of load before the measured part."""
    streams: int | None = None
    arrivals: Arrivals | None = None
    seed: int = 0
    cache: Cache = "server"
    salt: str = field(default_factory=new_salt)
    """Salt of this load; not sent where ``cache`` is ``server``."""
    part: tuple[int, int] = (0, 1)
    """(number of the process that sends this part, number of processes)."""

    def split(self, processes: int) -> list["LoadPlan"]:
        """A part of the load for each process."""
        parts = [replace(self, part=(i, processes)) for i in range(processes)]
        if self.streams is None:
            return parts
        shares = [(self.streams + i) // processes for i in range(processes)]
        return [replace(p, streams=n) for p, n in zip(parts, shares, strict=True) if n]

    def own(self, numbers: Iterator[Any]) -> Iterator[Any]:
        """This process's share of a sequence that all processes see: of n, every n-th item."""
        return itertools.islice(numbers, self.part[0], None, self.part[1])


@dataclass
class Load:
    """What happened; times are those of :data:`sere_ray.loadtest.client.now`."""

    begin: float
    """Start of the measured part."""
    end: float
    """End of the measured part."""
    outcomes: list[Outcome]
    """All requests that ended, those of the warm-up included."""
    lag: Histogram
    """How late the event loop came back to a timer: whether the generator kept up."""
    is_open: bool = False
    """Whether requests were due at times of their own, whatever came back."""

    @property
    def measured(self) -> list[Outcome]:
        """Requests that were due in the measured part."""
        return [o for o in self.outcomes if self.begin <= o.scheduled < self.end]

    def merge(self, other: "Load") -> None:
        """Add the part of another process."""
        self.outcomes += other.outcomes
        self.lag.merge(other.lag)


def run_part(plan: LoadPlan, start: float) -> Load:
    """Send one process's part of a load from the time ``start`` on.

    Requests due in the measured part are measured to their end; until then the load is kept up.
    What is still under way then was due later and is cut off.
    """
    return _Run(plan, start).run()


def watch_lag(record: Callable[[float], None]) -> None:
    """Set timers without end, and record how many seconds late the event loop comes back to each.

    It does not return; its greenlet has to be killed.
    """
    while True:
        asked = now() + _LAG_PERIOD
        gevent.sleep(_LAG_PERIOD)
        record(now() - asked)


class _Run:
    def __init__(self, plan: LoadPlan, start: float) -> None:
        self._plan, self._start = plan, start
        begin = start + plan.warmup
        self._load = Load(
            begin, begin + plan.seconds, [], Histogram(), is_open=plan.streams is None
        )
        self._draw = random.Random(f"{plan.seed} keys {plan.part}")
        self._client = Client(plan.target.base_url, plan.target.limits)
        self._entries = plan.own(self._shuffled())
        self._under_way = gevent.pool.Group()
        self._measured = 0  # under way, and due before the end
        self._finished = gevent.event.Event()

    def run(self) -> Load:
        watch = gevent.spawn(watch_lag, self._record_lag)
        senders = self._senders()
        try:
            self._sleep_until(self._load.end)
            while self._measured:
                self._finished.clear()
                self._finished.wait()
        finally:
            gevent.killall([watch, *senders, *self._under_way.greenlets])
            self._client.close()
        return self._load

    def _senders(self) -> list[gevent.Greenlet]:
        if self._plan.streams is not None:
            count, (part, parts) = self._plan.streams, self._plan.part
            places = ((i + part / parts) / count for i in range(count))
            return [gevent.spawn(self._stream, place) for place in places]
        return [gevent.spawn(self._arrive)]

    def _stream(self, place: float) -> None:
        """One closed-loop user. They begin one after the other during the warm-up. If all began at
        once they would ask in step, wave after wave, as long as answers are of similar length.

        Args:
            place: among all users, from 0 to 1.
        """
        self._sleep_until(self._start + place * self._plan.warmup)
        for entry in self._entries:
            if self._send(entry, now()).error is not None:
                gevent.sleep(_PAUSE_AFTER_FAILURE)

    def _arrive(self) -> None:
        """Open loop: a greenlet for each request that is due."""
        for entry, at in self._due():
            due = self._start + at
            self._sleep_until(due)
            if len(self._under_way) < _MAX_UNDER_WAY:
                self._under_way.add(gevent.spawn(self._send, entry, due))
            else:
                text = f"generator: {_MAX_UNDER_WAY} requests are under way"
                self._load.outcomes.append(Outcome(due, error=text))

    def _due(self) -> Iterator[tuple[Entry, float]]:
        plan = self._plan
        if plan.arrivals is None:  # a trace
            return ((e, e.at or 0.0) for e in plan.own(iter(plan.entries)))
        return zip(self._entries, plan.own(plan.arrivals.times(plan.seed)), strict=False)

    def _send(self, entry: Entry, due: float) -> Outcome:
        plan, target = self._plan, self._plan.target
        salt = {"cold": f"{plan.salt}{self._draw.random()}", "block": plan.salt, "server": None}
        request = target.request(entry, self._draw, salt[plan.cache])
        counts = due < self._load.end
        self._measured += counts
        try:
            outcome = self._client.stream(PATHS[target.api], **request, scheduled=due)
            outcome.label = entry.answer
            self._load.outcomes.append(outcome)
            return outcome
        finally:
            self._measured -= counts
            self._finished.set()

    def _shuffled(self) -> Iterator[Entry]:
        """The workload again and again, each time in another order; the same in all processes."""
        draw = random.Random(f"{self._plan.seed} order")
        while True:
            yield from draw.sample(self._plan.entries, len(self._plan.entries))

    def _record_lag(self, seconds: float) -> None:
        if now() >= self._load.begin:
            self._load.lag.record(seconds)

    def _sleep_until(self, due: float) -> None:
        gevent.sleep(max(due - now(), 0))
