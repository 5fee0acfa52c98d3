"""Names of a package that are imported when they are asked for."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any


@cache
def find(module: str, name: str) -> Any:
    """What a module has under a name; it is imported now, if it was not."""
    return getattr(import_module(module), name)


def late(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package.

    Args:
        package: its name, for the message.
        places: module of each name that it offers.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return find(places[name], name)

    return get
