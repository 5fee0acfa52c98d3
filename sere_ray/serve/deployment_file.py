"""Deployment files: read, and checked as far as this machine can before anything starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sere_ray.proxy.limits import Limits
from sere_ray.serve.config import ServeConfig
from sere_ray.serve.policy_actor.artifacts import read_artifact
from sere_ray.util.errors import SereError

IMPORT_PATH = "sere_ray.serve:build_app"
APPLICATION_KEYS = ("name", "import_path", "args", "route_prefix")
OUR_LIMITS = {"keep_alive_timeout_s": "idle_s", "request_timeout_s": "answer_s"}
"""Options of Ray's that are limits of ours: Ray's second would end no work."""


def load_file(path: Path) -> dict[str, Any]:
    """A deployment file, with every application's arguments checked.

    Raises:
        SereError: not there, not YAML, or a mistake in it.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SereError(
            f"{path}: {error.strerror}; `sere-ray examples --out .` copies files to start from"
        ) from None
    except yaml.YAMLError as error:
        raise SereError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(document)
    except (ValidationError, TypeError) as error:
        raise SereError(f"{path}: not a Ray Serve file: {' '.join(str(error).split())}") from None
    _refuse_others(path, "", document, ("applications", "http_options"))
    for key, ours in OUR_LIMITS.items():
        if key in (document.get("http_options") or {}):
            raise SereError(
                f"{path}: http_options.{key}: write it as limits.{ours} under args of the "
                "application"
            )
    for number, application in enumerate(document["applications"]):
        _refuse_others(path, f"applications.{number}.", application, APPLICATION_KEYS)
        if application["import_path"] != IMPORT_PATH:
            raise SereError(
                f"{path}: import_path = {application['import_path']!r}: `sere-ray serve` runs "
                f"{IMPORT_PATH}; use `serve run` for other applications"
            )
        ServeConfig.parse(application.get("args") or {})
    return dict(document)


def _refuse_others(path: Path, where: str, given: Mapping[str, Any], taken: Sequence[str]) -> None:
    for key in given:
        if key not in taken:
            raise SereError(
                f"{path}: {where}{key}: `sere-ray serve` takes only {', '.join(taken)} here; "
                "deploy the file with `serve deploy` on a Ray cluster, or leave the key out"
            )


def configs(document: Mapping[str, Any]) -> list[ServeConfig]:
    """What the applications of a file serve."""
    return [ServeConfig.parse(application["args"]) for application in document["applications"]]


def check_artifacts(served: Sequence[ServeConfig]) -> None:
    """Read artifacts and masks, since the policy actors of this instance of Ray will run here.

    Raises:
        SereError: one is missing, unreadable or too large.
    """
    for config in served:
        if config.sere is not None:
            for path in config.sere.files.values():
                read_artifact(path, config.max_artifact_bytes)


def limits_of_proxies(path: Path, served: Sequence[ServeConfig]) -> Limits:
    """The limits that the one proxy of a machine enforces, for all applications of a file.

    Raises:
        SereError: two applications ask for different ones.
    """
    limits = [config.limits for config in served] or [Limits.model_validate({})]
    for other in limits[1:]:
        if other.of_proxies != limits[0].of_proxies:
            raise SereError(
                f"{path}: limits: applications behind one proxy must have the same, but for "
                "answer_s"
            )
    return limits[0]
