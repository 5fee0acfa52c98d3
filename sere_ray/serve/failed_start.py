"""Why a deployment did not start: the engine's own reason, and where its log is."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FAILED = "failed to start"
"""Text of Serve's status of a deployment of which a replica or an actor did."""
_REASON = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception|Interrupt))(?:: |\()(.*)")
_POINTS_ELSEWHERE = ("Engine core initialization failed", "EngineCore failed to start")
_MOST = 400
"""Characters of a reason that are shown."""


def failure(status: Any, name: str) -> str | None:
    """What Serve says of an application of which something did not start; None = all goes well.

    Args:
        status: ``ray.serve.status()``.
        name: of the application.
    """
    application = status.applications.get(name)
    if application is None:
        return None
    messages = [each.message for each in application.deployments.values()]
    told = next((message for message in messages if FAILED in message), None)
    if str(getattr(application.status, "value", application.status)) == "DEPLOY_FAILED":
        return told or application.message or "Serve does not say why"
    return told


def reason(message: str, logs: Path) -> str:
    """The reason in one line, out of Serve's message and the logs of its workers.

    Args:
        message: with a traceback in it.
        logs: folder of a session of Ray's.
    """
    found = list(_reasons(message.splitlines()))
    if not found or _points_elsewhere(found[-1]):
        of_engines = [line for line in _engine_lines(logs) if not _points_elsewhere(line)]
        found = of_engines or found
    return (found[-1] if found else " ".join(message.split()))[:_MOST]


def _points_elsewhere(line: str) -> bool:
    return any(text in line for text in _POINTS_ELSEWHERE)


def _reasons(lines: list[str]) -> Iterator[str]:
    """Lines that name an exception, without those of Ray's that only carry another."""
    for line in lines:
        match = _REASON.search(line)
        if match and match[2].strip() and not match[1].startswith("ray::"):
            yield f"{match[1].rpartition('.')[2]}: {match[2].strip()}"


def _engine_lines(logs: Path) -> Iterator[str]:
    """Exceptions that engine processes have written, the newest file last."""
    files = sorted(logs.glob("worker-*"), key=lambda file: file.stat().st_mtime)
    for file in files:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        yield from _reasons([line for line in lines if "EngineCore" in line])
