"""Errors a user can cause. The CLI prints them as one line and exits with code 2."""


class SereError(Exception):
    """Base of every error that the user, not the code, has to fix.

    The message names the key or file, its value, what is allowed, and what to do. Not a ValueError:
    pydantic, which builds vLLM's configuration, would wrap it.
    """


class PolicyError(SereError):
    """A re-routing policy is misspelt, out of range or does not fit the model."""


class ArtifactError(SereError):
    """A similarity artifact is missing, damaged, or belongs to another model."""


class DataError(SereError):
    """A calibration or evaluation data set cannot be read or is too small."""


class UnsupportedError(SereError):
    """The engine, platform or model cannot be re-routed by this version."""
