"""A Ray instance of our own on this machine."""

from typing import Any


def start_ray(*, metrics_port: int | None = None, **options: Any) -> None:
    """Start one: it is never somebody else's that runs on this machine.

    Its metrics agent listens on all interfaces, as Ray's other ports do.
    """
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _metrics_export_port=metrics_port,
        **options,
    )
