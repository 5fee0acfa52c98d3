"""A Ray instance of our own."""

from typing import Any


def start_ray(**options: Any) -> None:
    """Start Ray for this process: it is never somebody else's that runs on this machine."""
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        **options,
    )
