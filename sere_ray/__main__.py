"""``python -m sere_ray`` is the command ``sere-ray``."""

from sere_ray.cli.main import app

app(prog_name="sere-ray")
