"""Write the last part of design.md: every file of the package and the kernels, in its own words.

    python docs/list_files.py

A file says what it is in the first sentence of its docstring or first comment.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design.md"
START = "<!-- docs/list_files.py writes what follows -->\n"
OTHERS = {
    "sere_ray/assets/model/": "the demo model, with its card",
    "sere_ray/assets/data/": "held-out text, arithmetic and calibration text, with their licence",
    "sere_ray/engine/gpu/tiles/": "tuned tiles of the expert GEMMs, by shape and GPU",
    "sere_ray/serve/gateway/ui/static/index.html": "the page's frame",
    "sere_ray/serve/gateway/ui/static/page.css": "its looks",
    "sere_ray/serve/gateway/ui/static/icon.svg": "its icon",
    "sere_ray/serve/gateway/ui/static/uPlot": "uPlot, as its npm package has it, with its licence",
}
"""Files and folders that cannot speak for themselves, by the start of their path."""
LONGEST = 110
"""Characters of a sentence; a longer one ends at its colon or semicolon."""


def about(path: Path) -> str:
    """The first sentence of a Python, CUDA, JavaScript or Lua file; empty if it has none."""
    mark = "--" if path.suffix == ".lua" else "//"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = "\n".join(re.findall(rf"\A(?:{mark} ?.*\n)+", text)).replace(mark, "")
    first = " ".join(text.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[\w`)])\.(?: |$)", first)[0]
    if len(sentence) > LONGEST:
        sentence = re.split(r"[:;] ", sentence)[0]
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", sentence).replace("``", "`").rstrip(":.")


def files() -> list[str]:
    """Paths of all files that are listed, a folder's own files before those below it."""
    found = [
        path.relative_to(ROOT)
        for room in ("sere_ray", "kernels")
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".md", ".pyc")
    ]
    found.sort(key=lambda path: (path.parts[0] == "kernels", path.parent, path.name))
    return list(map(str, found))


def listing() -> str:
    """A line for each folder, in the words of its ``__init__.py``, and for each file."""
    rooms: dict[str, list[str]] = {}
    for name in files():
        other = next((start for start in OTHERS if name.startswith(start)), None)
        path = other.rstrip("/") if other else name
        folder, file = path.rsplit("/", 1)
        lines = rooms.setdefault(folder, [f"**`{folder}/`**", ""])
        mark = "/" if other and other.endswith("/") else "*" if other and name != other else ""
        line = f"- `{file}{mark}`: {OTHERS[other] if other else about(ROOT / name)}"
        if file == "__init__.py":
            lines[0] += f": {about(ROOT / name)}"
        elif line not in lines:
            lines.append(line)
    return "\n\n".join("\n".join(lines) for lines in rooms.values()) + "\n"


if __name__ == "__main__":
    head = PAGE.read_text(encoding="utf-8").split(START)[0]
    PAGE.write_text(f"{head}{START}\n{listing()}", encoding="utf-8")
