"""Every command of ``sere-ray``."""

import typer.main

from sere_ray.cli.main import app


def every_command(command=None, words=()):
    """Words of every command, of groups' commands, too."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        yield words
    for name, child in getattr(command, "commands", {}).items():
        yield from every_command(child, (*words, name))
