"""Self-contained HTML pages of results: one frame, one style, pictures inside the file."""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sere_ray.util.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:78rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-size:.9rem}"
    "td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}"
    "td:first-child,th:first-child{text-align:left}"
    "small{color:#666}.wide{overflow-x:auto}"
)


def write_page(path: Path, title: str, body: str, style: str = "") -> None:
    """Write a page in one step.

    Args:
        path: the HTML file; replaced.
        title: plain text; also the heading of the page.
        body: HTML below the heading.
        style: CSS beside that of every page.
    """
    name = html.escape(title)
    content = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}{style}</style><h1>{name}</h1>{body}</html>"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def picture(figure: "Figure", about: str) -> str:
    """HTML of a figure: an SVG inside the page, with ``about`` for those who cannot see it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(about)}" src="data:image/svg+xml;base64,{data}">'


def items(pairs: Iterable[tuple[Any, Any]]) -> str:
    """HTML list of names and values; a mapping is written as ``name value, name value``."""
    lines = (
        f"<li><b>{html.escape(str(name))}</b>: {html.escape(_plain(value))}</li>"
        for name, value in pairs
    )
    return f"<ul>{''.join(lines)}</ul>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return str(value)
