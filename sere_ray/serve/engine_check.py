"""What can be known of an engine before it starts: its model, and its arguments."""

import difflib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sere_ray.engine.vllm_internals import server_arguments
from sere_ray.serve.app import engine_arguments, local
from sere_ray.serve.config import ServeConfig
from sere_ray.util.errors import SereError


def check_model(config: ServeConfig) -> None:
    """Look for the model of a deployment where its name is that of a folder.

    Raises:
        SereError: there is none, or it holds no checkpoint.
    """
    folder = Path(config.model).expanduser()
    if not folder.exists():
        if config.model.startswith(("/", ".", "~")) or config.model.count("/") != 1:
            raise SereError(f"model = {config.model!r}: no such folder")
        return  # a hub's name
    file = folder / "config.json"
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise SereError(
            f"model = {config.model!r}: {file.name}: {reason}; a checkpoint folder is needed"
        ) from None


def check_engine(config: ServeConfig) -> None:
    """Have vLLM check the arguments of a deployment's engines against the model.

    Raises:
        SereError: an argument is unknown, or vLLM refuses one; with its reason in one line.
    """
    from vllm import AsyncEngineArgs

    arguments = {**engine_arguments(config), "model": local(config.model)}
    arguments.pop("additional_config")  # the policy actor's part; checked as the policy is
    own, of_server = [field.name for field in fields(AsyncEngineArgs)], server_arguments()
    known = [*own, *of_server]
    for key in arguments:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see `vllm serve --help`"
            raise SereError(f"engine.{key} = {arguments[key]!r}: vLLM has no such argument; {hint}")
    _build({key: value for key, value in arguments.items() if key in own})


def _build(arguments: dict[str, Any]) -> None:
    from vllm import AsyncEngineArgs

    try:
        AsyncEngineArgs(**arguments).create_model_config()
    except Exception as error:  # whatever vLLM refuses with
        raise SereError(
            f"vLLM refuses the model or its `engine` arguments: {one_line(error)}"
        ) from None


def one_line(error: Exception) -> str:
    """The reason of an exception without the noise of pydantic's."""
    if isinstance(error, ValidationError):
        return "; ".join(_of_field(each) for each in error.errors())
    return " ".join(str(error).split()) or type(error).__name__


def _of_field(error: ErrorDetails) -> str:
    where = ".".join(str(part) for part in error["loc"] if isinstance(part, str))
    value = error["input"]
    shown = f"{where} = {value!r}: " if where and isinstance(value, str | int | float) else ""
    return f"{shown}{error['msg']}"
