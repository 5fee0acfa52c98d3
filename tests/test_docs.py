"""The docs say what is there: commands, options, files, links, figures of the README."""

import doctest
import importlib.util
import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import typer.main

from sere_ray.cli.main import app
from tests.commands import every_command

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
HISTORY = {"CHANGELOG.md"}
"""Names what is gone."""
RETIRED = "last commit"
"""Marks a line that names a command which this version has no more."""
HEDGES = (
    r"we\s+take\s+it",
    r"\bas\s+seen",
    r"\bseen\s+(not\s+)?to\b",
    r"\blikewise\s*[:.]",
    r"see\s+the\s+base\s+class",
)
"""Words that leave the reader to find out what is meant."""
CODE = (".py", ".cu", ".cuh", ".js", ".html", ".yaml", ".yml", ".sh", ".toml", "Makefile")


@cache
def tracked():
    """Paths of this repository's files, new ones too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


PAGES = [name for name in tracked() if name.endswith(".md")]


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page):
    titles = re.findall(r"^#+ (.*)", read(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


# --- README -----------------------------------------------------------------------------------


def test_the_readme_is_read_in_three_minutes():
    assert len(read("README.md").split()) <= 700
    assert [line for line in read("README.md").splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", ["README.md", *(n for n in tracked() if n.startswith("deploy/"))])
def test_no_tau_that_was_found_on_another_model(page):
    assert re.search(r"\btau\b", read(page)) is None, "name the file that `sere-ray tune` wrote"


def test_make_targets_exist():
    for page in ("README.md", "CONTRIBUTING.md", "docs/quickstart.md"):
        for target in re.findall(r"make ([a-z-]+)\b", "\n".join(code_of(page))):
            assert f"\n{target}:" in read("Makefile"), target


def rows(name):
    """Measured rows of a result file."""
    content = json.loads((RESULTS / f"{name}.json").read_text())
    return content.get("rows") or content["runs"]


def only(found):
    (row,) = found
    return row


def test_the_table_of_the_readme_is_what_the_result_files_hold():
    """Step time at 16 rows under the skewed router; quality of both judge models; right answers."""
    steps = {
        (row["arm"], file): row
        for file in ("step-time-h200", "step-time-margin-h200")
        for row in rows(file)
        if row["model"].startswith("qwen3") and (row["router"], row["batch"]) == ("skewed", 16)
    }
    files = (rows(f"frontier-judge-seed{seed}") for seed in (0, 1))
    judged = [[r for r in of_seed if (r["batch"], r["ranks"]) == (16, 1)] for of_seed in files]
    answers = {row["policy"]: row["answers_right"] for row in rows("loadtest-cpu")}
    cases = (
        ("exact", ("stock", "step-time-h200"), {"rule": "exact"}, "off"),
        ("`margin`, medium", None, {"rule": "margin", "settings": {"tau": 0.02}}, None),
        ("`sere`, S = 2", ("S=2", "step-time-h200"), of_sere(2), "S=2"),
        (
            "`margin`, strongest",
            ("margin", "step-time-margin-h200"),
            {"rule": "margin", "settings": {"tau": 1.0}},
            None,
        ),
        ("`sere`, S = 1", ("S=1", "step-time-h200"), of_sere(1), "S=1"),
    )
    for name, arm, setting, policy in cases:
        step = steps[arm] if arm else None
        quality = [only(r for r in of if setting.items() <= r.items()) for of in judged]
        cells = [
            f"{step['step_ms']:.2f} ms" if step else "not measured",
            f"{step['experts_read']:.0f}" if step else "not measured",
            both(f"{q['experts_read_mean']:.0f}" for q in quality),
            both("0" if not q["kl_mean"] else f"{q['kl_mean']:.3f}" for q in quality),
            both(f"{100 * q['top1_agreement']:.0f}" for q in quality) + " %",
            f"{100 * answers[policy]:.0f} %" if policy else "not measured",
        ]
        line = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", read("README.md"), re.MULTILINE)
        shown = [re.sub(r" of \d+", "", cell.strip()) for cell in line[1].split("|")]
        assert shown == cells, name


def test_the_table_of_families_is_what_the_result_file_holds():
    said = {True: "yes", False: "no", None: ""}
    for row in rows("families-cpu"):
        before, after = row["experts_before"], row["experts_after"]
        cells = [f"`{row['family']}`"]
        cells += [said[row[key]] for key in ("calibrates", "starts", "equal_at_k")]
        cells.append(f"{before:.1f}, {after:.1f}" if row["starts"] else "")
        assert f"| {' | '.join(cells)} |" in read("docs/limits.md"), row


def of_sere(slots):
    return {"rule": "sere", "settings": {"select_top_k": slots, "min_primary_experts": 0}}


def both(texts):
    """One number if both models have it, else both."""
    return ", ".join(dict.fromkeys(texts))


# --- commands ---------------------------------------------------------------------------------


def code_of(page):
    """Code of a page, a command in one line: blocks, spans, comments of YAML."""
    text = read(page)
    if not page.endswith(".md"):
        return re.sub(r"\\\n#?", " ", text).splitlines()
    kept = "\n".join(line for line in text.splitlines() if RETIRED not in line)
    blocks = re.findall(r"^```.*?\n(.*?)^```", kept, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?\n.*?^```", "", kept, flags=re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^ {4}.*(?:\n {4}.*)*", rest, re.MULTILINE)
    rest = re.sub(r"^ {4}.*$", "", rest, flags=re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    return [*re.sub(r"\\\n", " ", "\n".join(blocks)).splitlines(), *spans]


def mistake(words, command):
    """What is wrong with the words behind `sere-ray`; None if nothing."""
    path = ["sere-ray"]
    while hasattr(command, "commands"):
        if not words or words[0] == "...":
            return None
        if words[0] not in command.commands:
            known = {"--help", "--version"} if path == ["sere-ray"] else {"--help"}
            return None if words[0] in known else f"{' '.join(path)} has no {words[0]!r}"
        path.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    given = {word.partition("=")[0].rstrip(".,;:)") for word in words if word.startswith("--")}
    return f"{' '.join(path)} has no {sorted(given - known)}" if given - known else None


def test_every_command_and_option_exists():
    pages = [*PAGES, *(n for n in tracked() if n.startswith(("deploy/", "k8s/")))]
    pages = [page for page in pages if page not in HISTORY and not page.endswith(".json")]
    command, seen, wrong = typer.main.get_command(app), 0, []
    for page in pages:
        for line in code_of(page):
            for words in re.findall(r"(?<!-n )(?<![\w/.-])sere-ray((?: +[^\s|;&#()`]+)+)", line):
                seen += 1
                if said := mistake(words.split(), command):
                    wrong.append(f"{page}: {said}")
    assert not wrong, "\n".join(wrong)
    assert seen > 100


def test_a_mistake_is_found():
    command = typer.main.get_command(app)
    assert mistake(["bench", "failover"], command) == "sere-ray bench has no 'failover'"
    assert mistake(["tune", "M", "--budget", "1"], command) == "sere-ray tune has no ['--budget']"
    assert mistake(["policy", "set", "mode=off"], command) is None


def test_every_command_is_in_the_list():
    listed = set(re.findall(r"`(sere-ray [^`]+)`", read("docs/quickstart.md")))
    assert {" ".join(("sere-ray", *words)) for words in every_command()} - listed == set()


# --- files and links ----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", read(page)):
        if target.startswith("https://"):
            continue
        file = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert file.exists(), target
        if heading:
            assert heading in anchors(file.relative_to(ROOT)), f"{target}#{heading}"


def test_pages_that_code_names_exist():
    wrong = []
    for name in tracked():
        if not name.endswith(CODE) or "uPlot" in name:
            continue
        for page, heading in re.findall(r"(docs/[\w/-]+\.(?:md|json|png))#?([\w-]*)", read(name)):
            if page not in tracked() or (heading and heading not in anchors(page)):
                wrong.append(f"{name}: {page}#{heading}")
    assert not wrong, "\n".join(wrong)


def test_files_that_pages_name_exist():
    """Those named with a folder; of which one, the end of the path says."""
    pattern, wrong = r"(?<![\w/*-])(\w[\w.-]*(?:/[\w.-]+)+\.(?:py|cuh?|h|yaml))", []
    for page in set(PAGES) - HISTORY:
        for code in code_of(page):
            for path in re.findall(pattern, code):
                known = any(f"/{name}".endswith(f"/{path}") for name in tracked())
                if not known and not path.startswith("my/"):  # an overlay of the reader's own
                    wrong.append(f"{page}: {path}")
    assert not wrong, "\n".join(wrong)


@cache
def list_files():
    spec = importlib.util.spec_from_file_location("list_files", DOCS / "list_files.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_design_lists_every_file():
    script = list_files()
    listed = read("docs/design.md").partition(script.START)[2].split("\n")
    wanted = script.listing().split("\n")
    changes = [f"+ {line}" for line in wanted if line not in listed]
    changes += [f"- {line}" for line in listed if line not in wanted]
    assert not changes, "\n".join(["run: python docs/list_files.py", *changes])
    assert listed == ["", *wanted]
    assert [line for line in wanted if line.endswith("`: ")] == [], "say in a docstring what it is"


def test_the_list_of_files_misses_none():
    script = list_files()
    kinds = (".md", ".gitignore")
    assert set(script.files()) >= {
        name
        for name in tracked()
        if name.startswith(("sere_ray/", "kernels/")) and not name.endswith(kinds)
    }


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in DOCS.glob("*.md"))])
def test_a_caveat_is_a_sentence_with_a_place(page):
    assert re.search(r"\| there \|", read(page), re.IGNORECASE) is None


def test_a_sentence_stands_by_itself():
    texts = [n for n in tracked() if n.endswith((".md", *CODE)) and n not in HISTORY]
    found = [(n, p) for n in texts for p in HEDGES if re.search(p, read(n), re.IGNORECASE)]
    assert found == []


def test_examples_in_the_docs():
    results = doctest.testfile(str(DOCS / "quality.md"), module_relative=False)
    assert results.failed == 0
    assert results.attempted > 0
