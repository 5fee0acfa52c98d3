"""What a client's body becomes on its way to an engine: its tier, whether it may be scored, whose
prefix cache it uses; and how many answers it asks for."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sere_ray.policy.tiers import NEVER, SCORE_XARG, TIERS, XARG
from sere_ray.serve.gateway.keys import Key
from sere_ray.serve.gateway.refusals import Refusal, as_vllm

SALT = "cache_salt"
"""Field of a request: vLLM finds prompts again only among those of the same salt."""


def is_json(content_type: str) -> bool:
    """Whether vLLM takes a body of this type; it refuses every other one."""
    return content_type.lower().partition(";")[0] == "application/json"


def json_object(content: bytes) -> dict[str, Any]:
    """The object of a body.

    Raises:
        Refusal: it is none, in the fields that vLLM's refusal has.
    """
    try:
        body = json.loads(content)
    except json.JSONDecodeError as error:
        message = f"The body is not JSON: {error.msg} at character {error.pos}."
        raise as_vllm(400, message, param=f"body.{error.pos}") from None
    except (ValueError, RecursionError):
        raise as_vllm(400, "There was an error parsing the body: it is not JSON.") from None
    if not isinstance(body, dict):
        raise as_vllm(400, "The body must be a JSON object.", param="body")
    return body


def for_engine(
    body: dict[str, Any], header: str | None, key: Key, *, cache_group: str | None
) -> bytes:
    """The body that an engine gets.

    Args:
        body: of the client; changed in place.
        header: tier that a header asks for; it wins over the body's.
        key: the client's.
        cache_group: who else finds its prompt in the prefix cache; None = everybody.

    Raises:
        Refusal: no such tier, or not for this key.
    """
    _set_tier(body, header, key)
    if cache_group is not None:
        _set_salt(body, cache_group)
    try:
        return json.dumps(body).encode()
    except RecursionError:
        raise as_vllm(400, "There was an error parsing the body: it is too deep.") from None


def answers_asked(body: Mapping[str, Any]) -> int:
    """How many sequences an engine computes for a request: its prompts times ``n``.

    What is no valid number or prompt counts as one: vLLM refuses it.
    """
    prompts = body.get("prompt"), body.get("prompt_embeds")
    return max(1, sum(map(_prompts, prompts))) * _number(body.get("n"))


def _prompts(value: object) -> int:
    if value is None:
        return 0
    if not isinstance(value, list) or not value or isinstance(value[0], int | float):
        return 1  # a text, or the tokens of one
    return len(value)


def _number(value: object) -> int:
    """As pydantic reads it: ``"2"`` and ``2.0`` are 2."""
    if not isinstance(value, int | float | str):
        return 1
    try:
        return max(1, int(value))
    except (ValueError, OverflowError):
        return 1


def _set_salt(body: dict[str, Any], group: str) -> None:
    """Salt the prefix cache with the key's group; a client's own salt divides it further."""
    given = body.get(SALT)
    if given is None or (isinstance(given, str) and given):  # vLLM refuses anything else
        body[SALT] = hashlib.sha256(json.dumps([group, given]).encode()).hexdigest()


def _set_tier(body: dict[str, Any], header: str | None, key: Key) -> None:
    """Write the tier of a request, and a key's ban on scores, where the engine looks for them."""
    xargs = body.get("vllm_xargs")
    if xargs is not None and not isinstance(xargs, dict):
        raise Refusal(422, "invalid_parameter", "vllm_xargs must be an object.", param="vllm_xargs")
    asked = header if header is not None else (xargs or {}).get(XARG)
    tier = key.default_tier if asked is None else asked
    if tier not in TIERS:
        raise Refusal(
            422, "invalid_tier", f"Unknown tier {str(tier)[:40]!r}; allowed: {', '.join(TIERS)}."
        )
    if tier not in key.tiers:
        raise Refusal(403, "tier_not_permitted", f"This key may not ask for the tier {tier!r}.")
    others = {name: value for name, value in (xargs or {}).items() if name != XARG}
    if not key.score:
        others[SCORE_XARG] = NEVER
    if tier != "default":
        others[XARG] = tier
    if others:
        body["vllm_xargs"] = others
    else:
        body.pop("vllm_xargs", None)
