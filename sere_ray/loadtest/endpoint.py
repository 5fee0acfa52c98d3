"""The endpoint before a load, and its policy around one."""

import json
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.console import Console

from sere_ray.loadtest.workload import ClientKey
from sere_ray.serve.client import request, set_policy, settable
from sere_ray.util.errors import SereError

_TIMEOUT_SECONDS = 10.0
_RESTORE_TRIES = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def find_model(url: str, keys: Sequence[ClientKey], model: str | None) -> str:
    """The model to ask for, once every key has been tried.

    Args:
        url: without ``/v1``.
        keys: all of them must be accepted; none = ask without.
        model: a name that the endpoint must serve; None = the first that it serves.

    Raises:
        SereError: the endpoint is not there, refuses a key or does not serve the model.
    """
    address = f"{url.rstrip('/')}/v1/models"
    served: list[str] = []
    for number, key in enumerate(keys or [None], 1):
        headers = {"Authorization": f"Bearer {key.key}"} if key else {}
        try:
            with urlopen(Request(address, headers=headers), timeout=_TIMEOUT_SECONDS) as response:
                served = [str(entry["id"]) for entry in json.load(response)["data"]]
        except HTTPError as error:
            which = f"key {number} of {len(keys)}" if key else "a request without key"
            raise SereError(
                f"{address}: {error.code}: {which} is refused; give the keys with --keys FILE or "
                "one in OPENAI_API_KEY"
            ) from None
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "reason", None) or f"not an OpenAI endpoint ({error!r})"
            raise SereError(f"{address}: {reason}; is it up, and --url right?") from None
    if not served:
        raise SereError(f"{address}: serves no model")
    if model is not None and model not in served:
        raise SereError(f"--model {model}: the endpoint serves {', '.join(served)}")
    return model or served[0]


@contextmanager
def kept_policy(url: str, console: Console) -> Iterator[dict[str, Any]]:
    """Put the policy back afterwards, also after an error, Ctrl-C, SIGTERM or SIGHUP.

    Yields:
        The policy as it was found; in mode ``auto`` the keys under its levels.

    Raises:
        SereError: the endpoint has no control API, or refuses the admin token.
    """
    try:
        before = _as_asked_for(request(url, "policy"))
    except SereError as error:
        raise SereError(
            f"{error}\nComparing policies needs a sere-ray deployment and its admin token in "
            "SERE_ADMIN_TOKEN; `sere-ray loadtest run` loads any OpenAI endpoint"
        ) from None
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if handlers[number] is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _terminate)
    try:
        yield before
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _restore(url, before, console)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _as_asked_for(status: Mapping[str, Any]) -> dict[str, Any]:
    """What to set, so that the deployment does again what it does now."""
    auto = status["auto"]
    keys = status["policy"] if auto is None else auto["base"]
    return {**keys, "mode": status["mode"]}


def _restore(url: str, policy: dict[str, Any], console: Console) -> None:
    for attempt in range(1, _RESTORE_TRIES + 1):
        try:
            return set_policy(url, policy)
        except SereError as error:
            if attempt == _RESTORE_TRIES:
                pairs = (
                    f"{key}={value if isinstance(value, str) else json.dumps(value)}"
                    for key, value in settable(policy).items()
                )
                command = " ".join(map(shlex.quote, pairs))
                console.print(
                    f"the policy could not be put back ({error}); when the deployment is up: "
                    f"sere-ray policy set --url {url} {command}",
                    style="red",
                    markup=False,
                    soft_wrap=True,
                )
            else:
                time.sleep(2.0)


def _terminate(*_: Any) -> NoReturn:
    raise SystemExit(143)
