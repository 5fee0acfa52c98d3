"""The stranger's walk: what README and quickstart say, in a fresh clone and environment, timed.

    python tests/walk.py docs/results/durations-cpu.json

Commands are taken from the documents. Nothing else should run on the machine meanwhile; with
``--tests`` also ``make test``. Ends with 1 where a command fails.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
WRITE = """
import json, sys
from pathlib import Path
from sere_ray.util.results import write_result
write_result(Path(sys.argv[1]), json.load(sys.stdin), command=["python", "tests/walk.py", "FILE"])
"""
SERVING, SERVE_SECONDS = "serving ", 600
"""What `sere-ray serve` says when it answers, and how long it may take to."""


def block(document, heading):
    """Commands of the indented block below a heading; long ones are one line."""
    text = (ROOT / document).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^ {4}(.+)$", text.replace("\\\n", " "), re.MULTILINE)
    return [re.sub(r"\s+#.*| {2,}", " ", line).strip() for line in lines]


class Walk:
    """Runs commands as one shell after the other would, and keeps how long they took."""

    def __init__(self, folder):
        self.folder, self.rows, self.serving = folder, [], None
        self.environment = {**os.environ, "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}"}

    def run(self, command):
        print(f"$ {command}", flush=True)
        start = time.perf_counter()
        if command.startswith("cd "):
            self.folder = self.folder / command[3:]
            return
        if command.startswith("sere-ray serve"):
            self._serve(command)
        else:
            subprocess.run(
                command, shell=True, cwd=self.folder, env=self.environment, check=True, timeout=7200
            )
        seconds = round(time.perf_counter() - start, 1)
        print(f"  {seconds} s", flush=True)
        self.rows.append({"step": command, "seconds": seconds})

    def _serve(self, command):
        log = self.folder / "serve.log"
        with log.open("w") as output:
            self.serving = subprocess.Popen(
                command.split(), cwd=self.folder, env=self.environment, stdout=output, stderr=output
            )
        deadline = time.monotonic() + SERVE_SECONDS
        while SERVING not in log.read_text():
            if self.serving.poll() is not None or time.monotonic() > deadline:
                raise subprocess.CalledProcessError(1, command, log.read_text())
            time.sleep(0.5)

    def stop(self):
        if self.serving is not None and self.serving.poll() is None:
            self.serving.send_signal(signal.SIGINT)
            self.serving.wait(60)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tests", action="store_true", help="also `make test`")
    options = parser.parse_args()
    commands = ["make install", "make demo", *(["make test"] if options.tests else [])]
    for command in block("docs/quickstart.md", "The same on a laptop"):
        commands += command.split(" && ")
    with tempfile.TemporaryDirectory() as parent:
        clone = Path(parent) / "sere-ray"
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        walk = Walk(clone)
        try:
            for command in commands:
                walk.run(command)
        except subprocess.CalledProcessError as error:
            sys.exit(f"failed: {error}\n{error.output or ''}")
        finally:
            walk.stop()
        write = [clone / ".venv/bin/python", "-c", WRITE, options.out.resolve()]
        rows = json.dumps({"runs": walk.rows})
        subprocess.run(write, cwd=clone, input=rows, text=True, check=True)


if __name__ == "__main__":
    main()
