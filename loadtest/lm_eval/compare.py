"""A task of lm-eval against a sere-ray deployment, once under each policy.

    python loadtest/lm_eval/compare.py --policies off,S=2,rule=margin:tau=0.01:union=local --out X

It sets each policy through the control API (admin token in SERE_ADMIN_TOKEN), runs the command of
docs/quality.md, and reports what lm-eval scored with the concurrency, the length of the answers and
the experts that the engines read. `lm_eval` is on the PATH: `pip install 'lm_eval[api]'`, in an
environment of its own if you like. From the repository's root.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from rich.console import Console

from sere_ray.calibration.loading import load_tokenizer
from sere_ray.loadtest.options import find_model, read_keys
from sere_ray.loadtest.policies import kept_policy, parse_policies, whole_policy
from sere_ray.observe.stats import means
from sere_ray.serve.client import Deployment, set_policy
from sere_ray.util.errors import SereError
from sere_ray.util.results import write_result

TASKS = Path(__file__).parent
COMMAND = ["python", "loadtest/lm_eval/compare.py", *sys.argv[1:]]
FILTERS = ("strict-match", "flexible-extract")


def main():
    """All policies, one after the other; the exit code."""
    options = parse()
    try:
        compare(options)
    except SereError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def compare(options):
    """Write the result file; it grows with each policy."""
    changes = parse_policies(options.policies)
    model = find_model(options.url, read_keys(None), None)
    tokenizer = load_tokenizer(options.tokenizer)
    about = {"task": options.task, "model": model, "concurrency": options.concurrency}
    rows = []
    with kept_policy(options.url, Console(stderr=True)) as before:
        for name, change in changes.items():
            set_policy(options.url, whole_policy(before, change, name))
            deployment = Deployment(options.url)
            deployment.read_counters()
            scores, answers = lm_eval(options, model)
            counted = means(deployment.read_counters()["decode_only"])
            rows.append({"policy": name, **row(scores, answers, tokenizer, counted)})
            print(json.dumps(rows[-1]), flush=True)
            content = {**about, "lm_eval": scores["lm_eval_version"], "rows": rows}
            write_result(options.out, content, command=COMMAND)


def lm_eval(options, model):
    """One run: its document of results, and the answers of the model."""
    endpoint = f"base_url={options.url}/v1/chat/completions,num_concurrent={options.concurrency}"
    with tempfile.TemporaryDirectory() as folder:
        command = ["lm_eval", "--model", "local-chat-completions", "--tasks", options.task]
        command += ["--model_args", f"model={model},{endpoint}", "--apply_chat_template"]
        command += ["--include_path", str(TASKS), "--output_path", folder, "--log_samples"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SereError(f"lm_eval failed:\n{done.stderr[-2000:]}")
        (results,) = Path(folder).rglob("results_*.json")
        (samples,) = Path(folder).rglob("samples_*.jsonl")
        records = [json.loads(line) for line in samples.read_text().splitlines()]
        # each answer is there once for every filter
        answers = [r["resps"][0][0] for r in records if r["filter"] == FILTERS[0]]
        return json.loads(results.read_text()), answers


def row(scores, answers, tokenizer, counted):
    """What is reported of one policy."""
    (score,) = scores["results"].values()
    found = {"problems": len(answers)}
    for name in FILTERS:
        found[name.replace("-", "_")] = round(score[f"exact_match,{name}"], 4)
        found[f"{name.replace('-', '_')}_stderr"] = round(score[f"exact_match_stderr,{name}"], 4)
    lengths = [len(tokenizer(answer)["input_ids"]) for answer in answers]
    experts = counted["experts_after"]  # exact routing counts none
    return {
        **found,
        "output_tokens_mean": round(mean(lengths), 2),
        "output_tokens_max": max(lengths),
        "experts_read": experts and round(experts, 2),
        "rows_per_step": counted["rows"] and round(counted["rows"], 2),
    }


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the deployment")
    parser.add_argument("--task", default="demo_arithmetic", help="with gsm8k's two filters")
    parser.add_argument("--policies", default="off,S=2", help="as for sere-ray loadtest ab")
    parser.add_argument("--concurrency", type=int, default=16, help="requests under way")
    parser.add_argument("--tokenizer", default="sere_ray/assets/model", help="folder of the model")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
