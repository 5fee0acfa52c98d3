"""Locust users for any OpenAI endpoint: closed loop, open loop, replay of a trace.

    locust -f loadtest/locustfile.py ClosedUser --host http://127.0.0.1:8000 -u 16
    locust -f loadtest/locustfile.py OpenUser --host http://127.0.0.1:8000 --headless -u 1 --rate 2

Locust's own table has one line for each of TTFT, ITL, TPOT and latency; exact figures, from
histograms of our own, are printed at the end and written with --figures.
"""

import json
import random
import sys
import time
from pathlib import Path

import gevent
import gevent.pool
from locust import User, events, task
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from sere_ray.loadtest.arrivals import Arrivals
from sere_ray.loadtest.client import Client, now
from sere_ray.loadtest.driver import PATHS, Target, watch_lag
from sere_ray.loadtest.endpoint import find_model, read_keys
from sere_ray.loadtest.figures import Collector
from sere_ray.loadtest.slo import Slo
from sere_ray.loadtest.workload import (
    arithmetic_workload,
    load_trace,
    load_workload,
)
from sere_ray.util.errors import SereError
from sere_ray.util.results import write_result

MESSAGE = "sere_figures"


class Session:
    """What the users of a process share; made when Locust knows its options."""

    def __init__(self, environment):
        options = environment.parsed_options
        self.environment = environment
        self.collector = Collector(Slo.parse(options.slo))
        self.started = self.stopped = time.monotonic()
        self.target = None
        path = options.workload
        self.entries = load_workload(Path(path)) if path else arithmetic_workload()
        self.keys = read_keys(Path(options.keys) if options.keys else None)

    def find_target(self):
        """Once a test has a host: the web UI may change it."""
        self.target = None
        options, host = self.environment.parsed_options, (self.environment.host or "").rstrip("/")
        if not host:
            raise SereError("--host is missing: the endpoint's address, without /v1")
        model = find_model(host, self.keys, options.model or None)
        self.target = Target(f"{host}/v1", model, options.api, tuple(self.keys))

    def record(self, outcome):
        """One request as Locust events: a line for each metric, or one failure."""
        self.collector.record(outcome)
        name = self.target.model
        if outcome.error is not None:
            seconds = outcome.ended - outcome.scheduled
            return self._fire("answer", name, seconds, 0, outcome.error)
        tokens = outcome.output_tokens
        self._fire("answer", name, outcome.latency, tokens)
        self._fire("TTFT", name, outcome.ttft, tokens)
        if outcome.tpot is not None:
            self._fire("TPOT", name, outcome.tpot, tokens)
        for gap in outcome.gaps:
            self._fire("ITL", name, gap, 1)

    def _fire(self, kind, name, seconds, tokens, error=None):
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=seconds * 1e3,
            response_length=tokens,
            exception=None if error is None else SereError(error),
            context={},
        )


class EndpointUser(User):
    """Sends one request at a time and records it."""

    abstract = True

    def on_start(self):
        """A connection pool of its own."""
        self.session = self.environment.sere
        self.target = self.session.target
        if self.target is None:  # the endpoint refused: the runner is about to quit
            return
        self.client = Client(self.target.base_url)
        self.draw = random.Random()
        self.under_way = gevent.pool.Group()

    def on_stop(self):
        """Requests that are still under way are cut off and counted as unfinished."""
        if self.target is not None:
            self.under_way.kill()
            self.client.close()

    def send(self, entry, due):
        """One request that was due at a time."""
        request = self.target.request(entry, self.draw, None)
        try:
            outcome = self.client.stream(PATHS[self.target.api], **request, scheduled=due)
        except gevent.GreenletExit:
            self.session.collector.record_unfinished()
            raise
        self.session.record(outcome)
        return outcome

    def require_target(self):
        """Where the endpoint refused, nothing is sent."""
        if self.target is None:
            raise StopUser

    def wait_until(self, due):
        """Sleep; not at all if it is late."""
        gevent.sleep(max(due - now(), 0))


class ClosedUser(EndpointUser):
    """Asks again when it has its answer."""

    @task
    def ask(self):
        """One request."""
        self.require_target()
        if self.send(self.draw.choice(self.session.entries), now()).error is not None:
            gevent.sleep(0.2)


class OpenUser(EndpointUser):
    """--rate requests per second for each user, whatever comes back; -u 4 = four times as many."""

    @task
    def arrive(self):
        """All requests of this user."""
        self.require_target()
        options = self.environment.parsed_options
        start = now()
        arrivals = Arrivals.at(options.rate, options.burstiness)
        for at in arrivals.times(self.draw.getrandbits(32)):
            self.wait_until(start + at)
            entry = self.draw.choice(self.session.entries)
            self.under_way.add(gevent.spawn(self.send, entry, start + at))


class TraceUser(EndpointUser):
    """Replays --trace once; run one user (-u 1)."""

    @task
    def replay(self):
        """The whole trace; then the test ends."""
        self.require_target()
        options = self.environment.parsed_options
        start = now()
        for entry in load_trace(Path(options.trace), speed=options.speed):
            self.wait_until(start + entry.at)
            self.under_way.add(gevent.spawn(self.send, entry, start + entry.at))
        self.under_way.join()
        self.environment.runner.quit()


@events.init_command_line_parser.add_listener
def add_options(parser):
    """Options beside Locust's own."""
    group = parser.add_argument_group("sere-ray")
    group.add_argument("--model", default="", help="name to ask for [the first that is served]")
    group.add_argument("--api", default="chat", choices=list(PATHS), help="which OpenAI route")
    group.add_argument("--workload", default="", help="JSON lines of prompts [arithmetic]")
    group.add_argument("--keys", default="", help="YAML list of API keys, tiers and weights")
    group.add_argument("--rate", type=float, default=1.0, help="OpenUser: requests/s of a user")
    group.add_argument("--burstiness", type=float, default=1.0, help="OpenUser: 1 is Poisson")
    group.add_argument("--trace", default="", help="TraceUser: Mooncake .jsonl, BurstGPT .csv")
    group.add_argument("--speed", type=float, default=1.0, help="TraceUser: of the replay")
    group.add_argument("--slo", default="", help="such as ttft=500,tpot=50 (milliseconds)")
    group.add_argument("--require-slo", type=float, default=None, help="least share, else exit 1")
    group.add_argument("--figures", default="", help="result file to write at the end")


@events.init.add_listener
def start_session(environment, **_):
    """Read the files, so that a mistake in one ends Locust before it starts."""
    try:
        session = environment.sere = Session(environment)
    except SereError as error:
        raise SystemExit(f"error: {error}") from None
    collector, runner = session.collector, environment.runner
    if isinstance(runner, MasterRunner):
        environment.events.worker_report.add_listener(
            lambda client_id, data: collector.add(data[MESSAGE])
        )
        return
    gevent.spawn(watch_lag, collector.record_lag)
    if isinstance(runner, WorkerRunner):
        environment.events.report_to_master.add_listener(
            lambda client_id, data: data.update({MESSAGE: collector.take()})
        )


@events.test_start.add_listener
def begin(environment, **_):
    """A test of its own, also the second one from the web UI; the endpoint is asked first."""
    session = environment.sere
    session.collector.clear()
    session.started = time.monotonic()
    try:
        session.find_target()
    except SereError as error:
        print(f"error: {error}", file=sys.stderr)
        environment.process_exit_code = 2
        gevent.spawn(environment.runner.quit)


@events.test_stopping.add_listener
def end(environment, **_):
    """What comes later, as the web UI's idle time, is no part of the test."""
    environment.sere.stopped = time.monotonic()


@events.quitting.add_listener
def finish(environment, **_):
    """Print and judge, in the master or where there is none."""
    if isinstance(environment.runner, WorkerRunner):
        return
    session, options = environment.sere, environment.parsed_options
    found = session.collector.figures(session.stopped - session.started)
    print(json.dumps(found, indent=1))
    if options.figures:
        write_result(Path(options.figures), {"slo": options.slo, "rows": [found]})
    if found["unfinished"] and not found["requests"]:
        print(f"no answer came to an end: {found['unfinished']} requests were cut off at the stop")
        environment.process_exit_code = 1
    if options.require_slo is not None and (found["slo_kept"] or 0) < options.require_slo:
        print(f"only {found['slo_kept']} of the requests kept the SLO")
        environment.process_exit_code = 1
