"""What a run says to a script: is the service good enough, and was the generator?"""

from typing import Any

from sere_ray.util.errors import SereError


def broken_slo(content: dict[str, Any], least: float) -> list[str]:
    """A line for each row of which a smaller share of requests kept the SLO."""
    return [
        f"{row['policy'] or 'the endpoint'}: {row['slo_kept']} of the requests kept the SLO "
        f"({content['slo']}), {least} are required"
        for row in content["rows"]
        if (row["slo_kept"] or 0) < least
    ]


def check_generator(content: dict[str, Any], limit_ms: float) -> None:
    """Refuse to call a measurement one if the generator could not follow.

    Raises:
        SereError: its event loop was late by more than the limit (99th percentile).
    """
    worst = max(row["generator_lag_ms_p99"] or 0.0 for row in content["rows"])
    if worst > limit_ms:
        raise SereError(
            f"the generator was saturated: its event loop came back {worst:g} ms late (p99), "
            f"--max-lag-ms allows {limit_ms:g}; use --processes, another machine, or less load"
        )
