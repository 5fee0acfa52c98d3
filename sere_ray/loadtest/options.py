"""The words of the command line as plans and loads."""

import os
from pathlib import Path

from sere_ray.loadtest.ab import Shape
from sere_ray.loadtest.client import Limits
from sere_ray.loadtest.driver import Api, Plan, Target
from sere_ray.loadtest.endpoint import find_model
from sere_ray.loadtest.workload import (
    ClientKey,
    arithmetic_workload,
    load_keys,
    load_trace,
    load_workload,
)
from sere_ray.util.errors import SereError

API_KEY = "OPENAI_API_KEY"
"""Variable of the key that is used without a file of keys, as OpenAI's own client reads it."""


def make_plan(
    url: str,
    *,
    model: str | None = None,
    api: Api = "chat",
    keys_file: Path | None = None,
    workload: Path | None = None,
    trace: Path | None = None,
    speed: float = 1.0,
    stall: float,
) -> Plan:
    """Whom to ask what; how much and how long is still to be said, except for a trace.

    Raises:
        SereError: a file is bad, or the endpoint is not there or refuses.
    """
    keys = read_keys(keys_file)
    target = Target(
        f"{url.rstrip('/')}/v1",
        find_model(url, keys, model),
        api,
        tuple(keys),
        Limits(stall=stall),
    )
    if trace is None:
        entries = load_workload(workload) if workload else arithmetic_workload()
        return Plan(target, tuple(entries), seconds=0)
    if workload is not None:
        raise SereError("--trace brings its own lengths: leave --workload out")
    entries = load_trace(trace, speed=speed)
    return Plan(target, tuple(entries), seconds=(entries[-1].at or 0.0) + 1e-3)


def read_keys(path: Path | None) -> list[ClientKey]:
    """The keys of a file, or the one of the environment, or none."""
    if path is not None:
        return load_keys(path)
    own = os.environ.get(API_KEY)
    return [ClientKey(key=own)] if own else []


def parse_shapes(streams: str | None, rates: str | None) -> list[Shape]:
    """Loads of ``--streams 4,16`` or ``--rates 1,2``.

    Raises:
        SereError: both or none is given, or what is given are no positive numbers.
    """
    if (streams is None) == (rates is None):
        raise SereError("give one of --streams and --rates")
    if rates is not None:
        return [Shape(rate=rate) for rate in positive("--rates", rates)]
    return [Shape(int(count)) for count in positive("--streams", streams or "")]


def positive(option: str, text: str) -> list[float]:
    """The numbers of a comma-separated option.

    Raises:
        SereError: one is not a number above 0.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not min(values) > 0:
        raise SereError(f"{option} = {text!r}: must be numbers above 0, comma-separated")
    return values


def word_range(option: str, text: str) -> tuple[int, int]:
    """Least and most.

    Raises:
        SereError: not two numbers in this order.
    """
    values = [int(value) for value in positive(option, text)]
    if len(values) != 2 or not 1 <= values[0] <= values[1]:
        raise SereError(f"{option} = {text!r}: must be LEAST,MOST, such as 20,120")
    return values[0], values[1]
