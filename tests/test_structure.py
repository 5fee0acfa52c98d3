"""The house: few rooms, imports that point down, small files, private modules of others named."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sere_ray"
LEVELS = (
    {"cli"},
    {"demo", "advise"},
    {"bench", "loadtest"},
    {"serve"},
    {"observe"},
    {"evaluation"},
    {"engine"},
    {"masks"},
    {"calibration", "dispatch", "kernel"},
    {"policy"},
    {"rules"},
    {"artifact"},
    {"assets", "proxy"},
    {"util"},
)
"""Rooms, top first (docs/design.md). A room imports rooms below its own level only."""
ENTRANCES = {"__init__", "__main__"}
"""Modules beside the rooms. The package itself re-exports names of rooms; `__main__` is `cli`."""
LATE = {
    # A back end of vLLM's kernels derives from vLLM's class: imported where an engine asks for it.
    ("sere_ray.engine.cpu.dispatch", "sere_ray.engine.cpu.dispatch_backend"),
}
"""Imports in a function that close a circle on purpose."""
MOST_ENTRIES = 21
MOST_LINES = 300
PUBLIC_VLLM = {"LLM", "SamplingParams", "AsyncEngineArgs", "AsyncLLMEngine"}
"""Names of ``vllm`` itself that any room may import; so may it ``vllm.sampling_params``."""
PRIVATE_RAY = {
    "serve/by_experts/router.py",
    "serve/gateway/application.py",
    "serve/policy_actor/locate.py",
    "serve/policy_actor/store.py",
    "serve/replica/engine.py",
    "serve/replica/server.py",
    "serve/run.py",
}
"""Files that may import Ray's private or experimental modules."""


@cache
def modules():
    """Path below ``sere_ray`` of each module, by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.relative_to(PACKAGE)
    return found


@cache
def imports(name):
    """``(imported name, whether at import time)`` of each import in a module, in any function."""
    path = PACKAGE / modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node, at_import):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - child.level]
                start = ".".join([*above, child.module or ""]) if child.level else child.module
                yield from ((f"{start}.{alias.name}", at_import) for alias in child.names)
            else:
                is_later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                yield from visit(child, at_import and not is_later and not for_types)

    return tuple(visit(ast.parse(path.read_text()), True))


def own(imported):
    """The module of this package that an imported name belongs to, None for others' names."""
    if imported.split(".")[0] != "sere_ray":
        return None
    while imported not in modules():
        imported = imported.rpartition(".")[0]
    return imported


def room(name):
    return name.split(".")[1] if "." in name else "__init__"


def test_every_folder_is_a_room():
    entries = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert entries == set().union(*LEVELS) | ENTRANCES
    assert len(entries) <= MOST_ENTRIES


def test_imports_point_down():
    height = {name: -level for level, rooms in enumerate(LEVELS) for name in rooms}
    wrong = []
    for name in modules():
        if room(name) in ENTRANCES:
            continue
        for imported, _ in imports(name):
            target = own(imported)
            # `sere_ray` itself has the version; what else it has is imported from its own room.
            if target == "sere_ray":
                if imported not in ("sere_ray.__version__", "sere_ray"):
                    wrong.append(f"{name}: {imported}, import it from its room")
            elif (
                target and room(target) != room(name) and height[room(target)] >= height[room(name)]
            ):
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_no_import_circle():
    """Counts imports in functions, too: they would only hide a circle."""
    graph, late = defaultdict(set), set()
    for name in modules():
        for imported, at_import in imports(name):
            target = own(imported)
            if (name, target) in LATE and not at_import:
                late.add((name, target))
            elif target not in (None, name, "sere_ray"):
                graph[name].add(target)
    assert late == LATE
    done, path = set(), []

    def walk(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in sorted(graph[name]):
            walk(target)
        done.add(path.pop())

    for name in sorted(graph):
        walk(name)


def test_files_are_short():
    lines = {
        str(path): len((PACKAGE / path).read_text().splitlines()) for path in modules().values()
    }
    longer = {path: count for path, count in lines.items() if count > MOST_LINES}
    assert not longer


def test_only_engine_imports_internals_of_vllm():
    """Others ask ``engine/vllm_internals.py``, where each use has its reason and its end."""
    public = {f"vllm.{name}" for name in PUBLIC_VLLM}
    wrong = [
        f"{name} imports {imported}"
        for name in modules()
        if room(name) != "engine"
        for imported, _ in imports(name)
        if imported.split(".")[0] == "vllm"
        and imported not in public
        and not imported.startswith("vllm.sampling_params.")
    ]
    assert not wrong


def test_the_public_names_of_vllm_are_public():
    import vllm

    assert set(vllm.__all__) >= PUBLIC_VLLM


def test_private_modules_of_ray_are_imported_in_named_files():
    found = {
        str(modules()[name])
        for name in modules()
        for imported, _ in imports(name)
        if imported.split(".")[0] == "ray"
        and any(part.startswith("_") or part == "experimental" for part in imported.split("."))
    }
    assert found == PRIVATE_RAY


def test_the_entrance_is_the_command():
    """``python -m sere_ray`` and the entry point of pyproject.toml are one."""
    assert [imported for imported, _ in imports("sere_ray.__main__")] == ["sere_ray.cli.main.app"]
    assert 'sere-ray = "sere_ray.cli.main:app"' in (ROOT / "pyproject.toml").read_text()


@cache
def names_of(name):
    """What a module of this repository has at its top, and the modules below it."""
    path = ROOT / Path(*name.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    found = {each.stem for each in path.iterdir()} if path.is_dir() else set()

    def visit(body):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found.update((a.asname or a.name).split(".")[0] for a in node.names)
            elif isinstance(node, ast.If | ast.Try | ast.With | ast.For):
                visit(ast.iter_child_nodes(node))
            elif isinstance(node, ast.stmt):
                stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
                found.update(n.id for n in stored if isinstance(n.ctx, ast.Store))

    visit(ast.parse(file.read_text()).body if file.exists() else [])
    return found


def test_what_tests_import_is_there():
    """Also in functions, which only a GPU host runs."""
    missing = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                if node.module.split(".")[0] not in ("sere_ray", "tests"):
                    continue
                unknown = {alias.name for alias in node.names} - names_of(node.module)
                missing += [f"{path.relative_to(ROOT)}: {node.module}.{u}" for u in unknown]
    assert missing == []
