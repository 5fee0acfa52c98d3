"""Tables of docs/serve.md: routes, limits, headers and status codes are as the code has them."""

import ast
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

import sere_ray.serve.gateway
from sere_ray.bench.differential import INTENDED
from sere_ray.policy.tiers import HEADER, TIERS
from sere_ray.serve.gateway.access import VISITORS, AccessConfig
from sere_ray.serve.gateway.control_api import control_app
from sere_ray.serve.gateway.routes import HEALTH, MODELS, SERVED, WITH_BODY
from sere_ray.serve.gateway.ui import PATHS

DOC = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
GATEWAY = Path(sere_ray.serve.gateway.__file__).parent


def table(heading):
    """Cells of the rows below a heading's words."""
    lines = DOC.partition(heading)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|")) + 2
    for line in lines[start:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


ROWS = list(table("## Routes, limits, headers, status codes"))


def of(kind):
    return [row[1:] for row in ROWS if row[0] == kind]


def test_rows_are_of_known_kinds():
    assert {row[0] for row in ROWS} == {"route", "limit", "switch", "header", "status"}
    assert {len(row) for row in ROWS} == {4}


def test_routes():
    served = {(("POST" if p in WITH_BODY else "GET"), p) for p in SERVED}
    served.add(("GET", MODELS + "/{id}"))
    for route in control_app().routes:
        if isinstance(route, APIRoute) and not route.path.startswith("/ui/"):
            served |= {(method, f"/sere{route.path}") for method in route.methods - {"HEAD"}}
    served |= {("GET", "/sere/openapi.json"), ("GET", min(PATHS))}
    listed = {tuple(name.strip("`").split()): who for name, who, _ in of("route")}
    assert set(listed) == served
    for (_, path), who in listed.items():
        is_open = path == HEALTH or path.startswith("/sere/ui")
        assert who == (
            "no key" if is_open else "API key" if path.startswith("/v1") else "admin token"
        )


def test_limits_and_switches():
    fields = {f"`access.{k}`": v.default for k, v in AccessConfig.model_fields.items()}
    del fields["`access.keys_file`"]
    fields["requests without a key"] = VISITORS
    words = {False: "false", (): "none"}
    expected = {name: words.get(value, str(value)) for name, value in fields.items()}
    assert {name: value for name, value, _ in of("limit") + of("switch")} == expected


def test_the_tiers_header():
    values = {name.strip("`"): value for name, value, _ in of("header")}
    assert sorted(values[HEADER].replace("`", "").split(", ")) == sorted(TIERS)


def refusals():
    """``(status, code)`` of every refusal in the sources."""
    for path in GATEWAY.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            values = [a.value if isinstance(a, ast.Constant) else None for a in call.args[:2]]
            if call.func.id == "Refusal" and values[0] is not None:
                yield values[0], str(values[1])
            elif call.func.id == "as_vllm" and values[0] is not None:
                yield values[0], str(values[0])


def test_status_codes():
    listed = {
        (int(status), code.strip("` "))
        for status, codes, _ in of("status")
        for code in codes.split(",")
    }
    handled = {(405, "405")}  # Starlette's, worded by `http_error`
    assert listed == set(refusals()) | handled


@pytest.mark.parametrize("intended", INTENDED, ids=lambda intended: intended.what)
def test_intended_differences(intended):
    assert [intended.what, intended.reason] in list(table("**Against vLLM's own server**"))


def test_no_difference_is_listed_that_is_none():
    assert len(list(table("**Against vLLM's own server**"))) == len(INTENDED)
