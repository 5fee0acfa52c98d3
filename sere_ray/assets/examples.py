"""Files that README's commands name, for an installation without a clone.

A wheel holds them below ``sere_ray/examples/``; in a clone they lie where they are edited.
"""

import shutil
from pathlib import Path

from sere_ray import assets
from sere_ray.util.errors import SereError

_PACKAGE = Path(__file__).parents[1]
_KINDS = ("deploy/*.yaml", "constraints/*.txt")
DEMO = "demo"
"""Folder of a copy that gets the demo's checkpoint (``model/``) and texts (``data/``)."""


def example_files() -> dict[str, Path]:
    """Deployment files and constraints, by the path that README calls them.

    Raises:
        SereError: this installation lacks them.
    """
    packed = _PACKAGE / "examples"
    root = packed if packed.is_dir() else _PACKAGE.parent
    found = {
        str(path.relative_to(root)): path for kind in _KINDS for path in sorted(root.glob(kind))
    }
    if not found:
        raise SereError(f"{packed}: is missing from this installation of sere-ray: reinstall it")
    return found


def about(path: Path) -> str:
    """What an example file is, in its own words: the first sentence of its first comment."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip().split(". ")[0].rstrip(".")


def copy_examples(folder: Path) -> list[Path]:
    """Copy every example, and the demo's checkpoint and texts beside them.

    A clone's files name the demo model by its place in the clone; the copies name the copied one.

    Args:
        folder: made if it does not exist; commands of the copied files are run from there.

    Returns:
        What was written: the example files and the demo's folder.

    Raises:
        SereError: something is there already, or cannot be written; names it. Nothing is replaced.
    """
    files, demo = example_files(), folder / DEMO
    for target in (*(folder / name for name in files), demo):
        if target.exists():
            raise SereError(
                f"{target}: exists and is not overwritten; remove it, or give --out another folder"
            )
    try:
        for name, source in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8").replace("sere_ray/assets/", f"{DEMO}/")
            (folder / name).write_text(text, encoding="utf-8")
        shutil.copytree(assets.MODEL, demo / "model")
        shutil.copytree(assets.DATA, demo / "data")
    except OSError as error:
        raise SereError(f"--out = {folder}: cannot be written: {error}") from None
    return [*(folder / name for name in files), demo]
