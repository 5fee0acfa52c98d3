"""API keys: kept as hashes, in a file that is read again when it changes, or in the environment.

The file is YAML::

    keys:
      - {name: team-a, sha256: 9f86d0..., default_tier: default, tiers: [default, exact]}
      - {name: team-b, sha256: 2c26b4..., score: false}
    admin:
      - {name: ops, sha256: 60303a...}

``sere-ray key NAME`` draws a key and prints its line. A key has 256 random bits, so a plain SHA-256
hides it; words that people choose would need a slow hash and have no place here.
"""

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sere_ray.policy.tiers import TIERS, Tier
from sere_ray.util.errors import SereError

logger = logging.getLogger("ray.serve")
RELOAD_SECONDS = 1.0
NAME_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
API_KEY, ADMIN_TOKEN = "SERE_API_KEY", "SERE_ADMIN_TOKEN"
"""Environment variables with one key, one admin token, as they are."""


class Key(BaseModel):
    """Who holds a key, and what it opens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME_PATTERN)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    default_tier: Tier = "default"
    tiers: tuple[Tier, ...] = TIERS
    score: bool = Field(default=True, description="whether answers may be scored")
    group: str | None = Field(
        default=None, pattern=NAME_PATTERN, description="keys that share a prefix cache [own name]"
    )

    @model_validator(mode="after")
    def _default_is_permitted(self) -> Self:
        if self.default_tier not in self.tiers:
            raise ValueError(f"default_tier {self.default_tier!r} is not among tiers")
        return self


class KeyFile(BaseModel):
    """The content of the key file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()
    admin: tuple[Key, ...] = ()

    @classmethod
    def load(cls, path: Path) -> "KeyFile":
        """Read and check a file.

        Raises:
            SereError: unreadable, or one line for each mistake; never a hash or a key.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        except OSError as error:
            raise SereError(f"{path}: {error.strerror}; it holds the API keys") from None
        except yaml.YAMLError:
            raise SereError(f"{path}: not YAML; see `sere-ray key --help`") from None
        except ValidationError as error:
            lines = (
                f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}"
                for e in error.errors(include_input=False)
            )
            raise SereError("; ".join(lines)) from None


def from_environment() -> KeyFile:
    """Keys of ``SERE_API_KEY`` and ``SERE_ADMIN_TOKEN``, hashed at once."""

    def key(name: str, variable: str) -> tuple[Key, ...]:
        value = os.environ.get(variable, "").strip()  # clients leave a last newline out, too
        return (Key(name=name, sha256=digest(value)),) if value else ()

    return KeyFile(keys=key("env", API_KEY), admin=key("env-admin", ADMIN_TOKEN))


class KeyRing:
    """All keys of a deployment.

    Args:
        path: of the key file, or None.
        fixed: keys that do not come from the file.
    """

    def __init__(self, path: str | None, fixed: KeyFile) -> None:
        self._path = None if path is None else Path(path)
        self._fixed = self._content = fixed
        self._mtime, self._checked = 0, 0.0
        if self._path is not None:
            self._read(self._path)

    @property
    def has_keys(self) -> bool:
        """Whether there is a key file or an API key in the environment."""
        return self._path is not None or bool(self._fixed.keys)

    @property
    def is_open(self) -> bool:
        """Whether there is neither an API key nor an admin token: only this machine is served."""
        return not self.has_keys and not self._fixed.admin

    def api_key(self, value: str) -> Key | None:
        """Who holds this API key; None = nobody."""
        return _find(self._current().keys, value)

    def admin(self, value: str) -> Key | None:
        """Who holds this admin token; None = nobody."""
        return _find(self._current().admin, value)

    def _current(self) -> KeyFile:
        now = time.monotonic()
        if self._path is not None and now - self._checked > RELOAD_SECONDS:
            self._checked = now
            try:
                if self._path.stat().st_mtime_ns != self._mtime:
                    self._read(self._path)
            except (OSError, SereError) as error:
                logger.error("sere-ray: keys stay as they were: %s", error)
        return self._content

    def _read(self, path: Path) -> None:
        file = KeyFile.load(path)
        self._content = KeyFile(
            keys=self._fixed.keys + file.keys, admin=self._fixed.admin + file.admin
        )
        self._mtime = path.stat().st_mtime_ns


def new_key() -> str:
    """A fresh key."""
    return "sk-sere-" + secrets.token_urlsafe(32)


def digest(value: str) -> str:
    """SHA-256 of a key, hex: all that is kept of it."""
    return hashlib.sha256(value.encode()).hexdigest()


def _find(keys: Iterable[Key], value: str) -> Key | None:
    """Every key is compared, each in constant time."""
    found, given = None, digest(value)
    for key in keys:
        if hmac.compare_digest(key.sha256, given):
            found = key
    return found
