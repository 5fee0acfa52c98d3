"""Whom to ask: which model an endpoint serves, and whether it takes the keys."""

import json
import os
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request

from sere_ray.loadtest.workload import ClientKey, load_keys
from sere_ray.util.errors import SereError
from sere_ray.util.http import open_url

API_KEY = "OPENAI_API_KEY"
"""Variable of the key that is used without a file of keys, as OpenAI's own client reads it."""
_TIMEOUT_SECONDS = 10.0


def read_keys(path: Path | None) -> list[ClientKey]:
    """API keys of a file; without a file the one in ``OPENAI_API_KEY``, or none.

    Raises:
        SereError: the file is not readable or holds no keys.
    """
    if path is not None:
        return load_keys(path)
    own = os.environ.get(API_KEY, "").strip()  # of a file, for instance: with its last newline
    return [ClientKey(key=own)] if own else []


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
            with open_url(Request(address, headers=headers), _TIMEOUT_SECONDS) as response:
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
