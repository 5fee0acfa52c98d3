"""Whether the commands of a plan are commands at all, before a GPU host is paid for."""

import shlex
from pathlib import Path
from typing import Any

from sere_ray.bench.host import OUT, Plan, command_of
from sere_ray.util.errors import SereError


def check_commands(plan: Plan, command_line: Any, folder: Path) -> None:
    """Parse each `sere-ray` command as the command line does, and look for files of others.

    Args:
        plan: to check.
        command_line: of `sere-ray`, as a command of click.
        folder: in which commands run.

    Raises:
        SereError: names the lane and what is wrong.
    """
    for lane in plan.lanes:
        for text in lane.commands:
            command_of(text, folder)
            program, *arguments = shlex.split(text)
            if program == "sere-ray":
                reason = _refusal(command_line, arguments)
            else:
                files = [a for a in arguments if a.endswith(".py") or a.startswith("tests/")]
                missing = [f for f in files if not Path(folder, f.split("::")[0]).exists()]
                reason = f"{missing[0]}: no such file" if missing else None
            if reason is not None:
                raise SereError(f"lane {lane.name}: {text!r}: {reason}")


def _refusal(command: Any, arguments: list[str]) -> str | None:
    """Why the command line refuses arguments; None = it takes them.

    Args:
        command: of click, which typer may have of its own.
        arguments: what follows its name.
    """
    arguments = [argument.replace(OUT, "results") for argument in arguments]
    context, name = None, "sere-ray"
    try:
        while hasattr(command, "resolve_command"):  # a group
            context = command.make_context(name, arguments, parent=context)
            rest = [*context._protected_args, *context.args]
            name, command, arguments = command.resolve_command(context, rest)
        command.make_context(name, arguments, parent=context)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return str(error.format_message())
    return None
