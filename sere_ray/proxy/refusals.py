"""Errors in OpenAI's form, as JSON and as the whole answer that a proxy writes itself."""

import json
from http import HTTPStatus

TOO_SLOW = "The request did not arrive in time; send all of it within the limits of this server."
"""What a client is told whose headers or body took too long, on every path."""


def error_body(
    status: int,
    code: str | int,
    message: str,
    *,
    kind: str | None = None,
    param: str | None = None,
) -> bytes:
    """The JSON document of an error.

    Args:
        status: of HTTP.
        code: what programs compare.
        message: for people.
        kind: the field ``type``; None = OpenAI's name for this status.
        param: the field of the request that is wrong.
    """
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def whole_answer(status: int, code: str, message: str, headers: str = "") -> bytes:
    """An error as it goes over the wire, after which the connection is closed.

    Args:
        status: of HTTP.
        code: what programs compare.
        message: for people.
        headers: further lines, each with its end.
    """
    body = error_body(status, code, message)
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"{headers}content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
