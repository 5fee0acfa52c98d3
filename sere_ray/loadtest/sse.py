"""What a streamed answer says, from its bytes and the times at which they came."""

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_OUTPUT = ("content", "reasoning", "reasoning_content", "tool_calls")


class BadAnswerError(Exception):
    """The answer breaks OpenAI's streaming form, or reports an error; the message says how."""


@dataclass
class Answer:
    """A complete streamed answer."""

    times: list[float] = field(default_factory=list)
    """When each event with output came, in the clock of the reads."""
    text: str = ""
    finish_reason: str | None = None
    done: bool = False
    """Whether ``[DONE]`` came."""
    usage: dict[str, Any] | None = None

    @property
    def output_tokens(self) -> int:
        """Output tokens as the server counts them; if it does not, the events with output."""
        counted = (self.usage or {}).get("completion_tokens")
        return counted if isinstance(counted, int) else len(self.times)


def parse(reads: Sequence[tuple[float, bytes]]) -> Answer:
    """Parse the body of a streamed answer.

    Args:
        reads: (time, bytes) of each read; an event has the time of the read that completed it.

    Raises:
        BadAnswerError: the stream is malformed or reports an error; what came before is dropped.
    """
    answer = Answer()
    body = b"".join(data for _, data in reads)
    ends: list[int] = []  # where each read ends in the body
    for _, data in reads:
        ends.append(len(data) + (ends[-1] if ends else 0))
    position = 0
    for line in body.split(b"\n"):
        position += len(line) + 1
        if line.startswith(b"data:"):
            # A line without its newline has not been completed by any read; it came with the last.
            read = min(bisect.bisect_left(ends, position), len(ends) - 1)
            _take(answer, line[5:].strip(), reads[read][0])
    return answer


def check_complete(answer: Answer) -> None:
    """Refuse an answer that was cut off.

    Raises:
        BadAnswerError: it has no finish reason, no ``[DONE]`` or no output.
    """
    if answer.finish_reason is None or not answer.done:
        missing = "finish_reason" if answer.finish_reason is None else "[DONE]"
        raise BadAnswerError(f"cut: the stream ended without {missing}")
    if not answer.times:
        raise BadAnswerError("empty: no event with output")


def _take(answer: Answer, data: bytes, time: float) -> None:
    if data == b"[DONE]":
        answer.done = True
        return
    try:
        event = json.loads(data.decode())  # of bytes, json first guesses the encoding
        if "error" in event:
            raise BadAnswerError(f"error event: {_message(event['error'])}")
        answer.usage = _usage(event) or answer.usage
        for choice in event["choices"]:
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            text, has_output = _piece(choice)
            if has_output:
                answer.times.append(time)
                answer.text += text
    except (ValueError, TypeError, KeyError, AttributeError):
        raise BadAnswerError(f"malformed event: {data[:80]!r}") from None


def _piece(choice: dict[str, Any]) -> tuple[str, bool]:
    """Answer text of a choice of a chat or completion event, and whether it has any output.

    What a model thinks and the tools that it calls are output, too: their tokens are counted.
    """
    if "text" in choice:
        return choice["text"] or "", bool(choice["text"])
    delta = choice["delta"]
    return str(delta.get("content") or ""), any(delta.get(name) for name in _OUTPUT)


def _usage(event: dict[str, Any]) -> dict[str, Any] | None:
    usage = event.get("usage")
    for part in (usage, (usage or {}).get("prompt_tokens_details")):
        if not isinstance(part, dict | None):
            raise TypeError
    return usage


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
