"""The YAML file of policy keys that a user may name instead of writing them."""

from pathlib import Path

import yaml

from sere_ray.util.errors import PolicyError


def read_key_file(value: object, *, where: str = "sere") -> object:
    """The content of the YAML file that a string names; any other value as it is.

    For the value that a user writes; a policy that travels is always a mapping.

    Raises:
        PolicyError: the file cannot be read, or is not YAML.
    """
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(Path(value).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a YAML file of text"
        raise PolicyError(
            f"{where} = {value!r}: {reason}; name a file of policy keys such as `sere-ray tune` "
            "writes, or write the keys here"
        ) from None
