"""The command ``examples``: what README's commands name, without a clone."""

from pathlib import Path
from typing import Annotated

import typer

from sere_ray.cli.common import user_errors


def examples(
    out: Annotated[
        Path | None, typer.Option(help="Copy them into this folder; without it they are listed.")
    ] = None,
) -> None:
    """List or copy deployment files, pinned requirements, and the demo model with its texts.

    The copied demo model is a checkpoint like yours: calibrate, tune and serve take it.

    Example: sere-ray examples --out .
    """
    with user_errors():
        from sere_ray import assets
        from sere_ray.assets.examples import about, copy_examples, example_files

        if out is not None:
            for path in copy_examples(out):
                print(path)
            return
        files = example_files()
        width = max(map(len, files))
        for name, path in files.items():
            print(f"{name:{width}}  {about(path)}")
        print(f"{'demo/model':{width}}  The demo model, now in {assets.MODEL}")
        print(f"{'demo/data':{width}}  Its texts, now in {assets.DATA}")
        print("\nsere-ray examples --out .    # copies them here; run their commands from here")
