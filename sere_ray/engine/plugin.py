"""Entry point ``vllm.general_plugins: sere``. vLLM calls it in every process, maybe twice."""

import os
from collections.abc import Mapping
from importlib.metadata import entry_points

from sere_ray.util.errors import UnsupportedError

GROUP, NAME = "vllm.general_plugins", "sere"


def register() -> None:
    """Let vLLM understand ``--additional-config '{"sere": {...}}'``; off unless the key is set."""
    from sere_ray.engine.patches import install_observers

    install_observers()


def check_will_load(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a process in which vLLM would leave this plugin out, and so the key without effect.

    Args:
        environment: of the process.

    Raises:
        UnsupportedError: names the variable, its value and what to do.
    """
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        raise UnsupportedError(
            f"VLLM_PLUGINS = {allowed!r}: vLLM loads the plugins it names and no others, so the "
            f"'sere' key would do nothing; add {NAME!r} to it, or unset it"
        )
    if not entry_points(group=GROUP, name=NAME):
        raise UnsupportedError(
            "sere-ray is not installed as a package here, so vLLM does not find its plugin and the "
            "'sere' key would do nothing: pip install sere-ray"
        )
