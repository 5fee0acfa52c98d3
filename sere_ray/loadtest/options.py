"""Turn options of the command line into plans of loads."""

from pathlib import Path

from sere_ray.loadtest.ab import Amount
from sere_ray.loadtest.client import Limits
from sere_ray.loadtest.driver import Api, LoadPlan, Target
from sere_ray.loadtest.endpoint import find_model, read_keys
from sere_ray.loadtest.workload import arithmetic_workload, load_trace, load_workload
from sere_ray.util.errors import SereError


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
) -> LoadPlan:
    """Whom to ask, and what. How much and how long the caller adds, except for a trace.

    Args:
        url: of the endpoint, without ``/v1``.
        model: name to ask for; None = the first that the endpoint serves.
        api: which OpenAI route.
        keys_file: YAML list of API keys; None = the key of the environment, if there is one.
        workload: JSON lines of requests; None = the demo model's arithmetic.
        trace: a recorded trace, in place of a workload.
        speed: of the trace's replay; 2 = in half of the time.
        stall: seconds without a byte that end a request.

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
        return LoadPlan(target, tuple(entries), seconds=0)
    if workload is not None:
        raise SereError("--trace brings its own lengths: leave --workload out")
    entries = load_trace(trace, speed=speed)
    return LoadPlan(target, tuple(entries), seconds=(entries[-1].at or 0.0) + 1e-3)


def parse_amounts(streams: str | None, rates: str | None) -> list[Amount]:
    """Loads of ``--streams 4,16`` or ``--rates 1,2``.

    Raises:
        SereError: both or none is given, or what is given are no positive numbers.
    """
    if (streams is None) == (rates is None):
        raise SereError("give one of --streams and --rates")
    if rates is not None:
        return [Amount(rate=rate) for rate in positive("--rates", rates)]
    return [Amount(int(count)) for count in positive("--streams", streams or "")]


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
    """The least and the most number of an option such as ``20,120``.

    Raises:
        SereError: it is not two numbers from 1 up, in this order.
    """
    values = [int(value) for value in positive(option, text)]
    if len(values) != 2 or not 1 <= values[0] <= values[1]:
        raise SereError(f"{option} = {text!r}: must be LEAST,MOST, such as 20,120")
    return values[0], values[1]
