"""Any task of lm-eval: its own command asks the endpoint, and we read each item's score."""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from sere_ray.loadtest.compare.ask import Endpoint
from sere_ray.loadtest.compare.scores import Scores
from sere_ray.util.errors import SereError
from sere_ray.util.http import environment_for

PROGRAM = "lm_eval"
_SAMPLES = re.compile(r"samples_(.+)_\d{4}-\d\d-\d\dT[^_]*\.jsonl")
_FAILURES = (
    (
        r"Tasks? not found|not found in|No task|task .* not found",
        "lm-eval knows no such task; `lm_eval ls tasks` lists them, and a FILE.yaml may be named",
    ),
    (
        r"[Ll]oglikelihood.* not supported",
        "it scores given texts; those are prompts, which are "
        "always exact, so no policy would differ: take a task that generates",
    ),
)


def find_lm_eval(task: str) -> str:
    """The program.

    Raises:
        SereError: it is not installed; says how.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise SereError(
            f"--tasks {task}: needs lm-eval, whose program {PROGRAM!r} is not on the PATH: "
            "pip install 'lm_eval[api]', in an environment of its own if you like"
        )
    return program


def task_name(task: str) -> tuple[str, Path | None]:
    """The name that lm-eval knows a task by, and the folder of its file where it is one.

    Raises:
        SereError: a file that cannot be read, or is no task.
    """
    path = Path(task)
    if path.suffix not in (".yaml", ".yml"):
        return task, None
    try:
        # lm-eval's own tags, such as !function, say nothing here
        content = yaml.load(path.read_text(encoding="utf-8"), _Lenient)
    except OSError as error:
        raise SereError(f"--tasks {task}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SereError(f"--tasks {task}: not a YAML file ({type(error).__name__})") from None
    name = content.get("task") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise SereError(f"--tasks {task}: no task of lm-eval: it has no key 'task' with its name")
    return name, path.resolve().parent


class _Lenient(yaml.SafeLoader):
    """Takes tags that it does not know as nothing."""


_Lenient.add_multi_constructor("", lambda *_: None)


def run_lm_eval(
    endpoint: Endpoint, task: str, items: int | None, options: list[str]
) -> list[Scores]:
    """Runs a task; one result for each of its parts, filters and metrics that say right or wrong.

    Args:
        endpoint: whom to ask, through its chat route.
        task: name, or file of a task.
        items: of each part; None = all.
        options: further ones of lm-eval's command.

    Raises:
        SereError: lm-eval fails, or nothing in the task is right or wrong.
    """
    name, folder = task_name(task)
    arguments = (
        f"model={endpoint.model},base_url={endpoint.url.rstrip('/')}/v1/chat/completions,"
        f"num_concurrent={endpoint.concurrency}"
    )
    with tempfile.TemporaryDirectory() as out:
        command = [find_lm_eval(task), "--model", "local-chat-completions", "--tasks", name]
        command += ["--model_args", arguments, "--apply_chat_template", "--log_samples"]
        command += ["--output_path", out, *(["--include_path", str(folder)] if folder else [])]
        command += [*(["--limit", str(items)] if items else []), *options]
        environment = environment_for(endpoint.url)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SereError(f"--tasks {task}: {failure(done.stderr)}")
        found = [
            scores
            for path in sorted(Path(out).rglob("samples_*.jsonl"))
            for scores in read_samples(path)
        ]
    if not found:
        raise SereError(
            f"--tasks {task}: none of its metrics says right or wrong of an item, so there are no "
            "flips to count"
        )
    return found


def failure(log: str) -> str:
    """What lm-eval's log says went wrong, in one line."""
    for pattern, meaning in _FAILURES:
        if re.search(pattern, log):
            return meaning
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"lm_eval failed: {lines[-1] if lines else 'it said nothing'}"


def read_samples(path: Path) -> list[Scores]:
    """The scores of a part of a task, from the file of its samples.

    A record is an item under one filter; a metric counts where all items have 0 or 1 of it.
    """
    named = _SAMPLES.fullmatch(path.name)
    task = named[1] if named else path.stem
    records: list[dict[str, Any]] = [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()
    ]
    found = []
    for name in dict.fromkeys(record["filter"] for record in records):
        of_filter = [record for record in records if record["filter"] == name]
        characters = {str(r["doc_id"]): float(len(_answer(r))) for r in of_filter}
        for metric in of_filter[0]["metrics"]:
            values = {str(record["doc_id"]): record[metric] for record in of_filter}
            if all(value in (0, 1) for value in values.values()):
                scored_by = metric if name == "none" else f"{metric}, {name}"
                right = {item: bool(value) for item, value in values.items()}
                found.append(Scores(task, scored_by, right, {"characters": characters}))
    return found


def _answer(record: dict[str, Any]) -> str:
    """What the model wrote: of several tries the first."""
    answer = record["resps"]
    while isinstance(answer, list):
        answer = answer[0]
    return str(answer)
