"""The generator against an independent client, `vllm bench serve`, on the same endpoint.

    python loadtest/cross_check.py --tokenizer sere_ray/assets/model --out FILE
        # on the generator's stub: 50 tokens/s for each stream, whatever else the machine does
    python loadtest/cross_check.py --url http://127.0.0.1:8000 --tokenizer ... --out FILE
        # on a deployment; its API key is in OPENAI_API_KEY

Same prompts, same answer lengths, the same number of streams, in turns. `vllm bench serve` is
started through its module: the CPU build of vLLM has no working `vllm` command.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from sere_ray.loadtest.driver import LoadPlan, Target
from sere_ray.loadtest.endpoint import find_model, read_keys
from sere_ray.loadtest.figures import figures, sample
from sere_ray.loadtest.generator import generator
from sere_ray.loadtest.slo import Slo
from sere_ray.loadtest.stub import stub
from sere_ray.loadtest.workload import text_workload
from sere_ray.util.results import write_result

BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main;"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser;"
    "parser = Parser(); add_cli_args(parser); main(parser.parse_args())"
)
METRICS = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "latency": "e2el"}
"""Our names and theirs."""
OUTPUT_TOKENS = (32, 64)


def main():
    """The stub or a deployment."""
    options = parse()
    if options.url is None:
        with stub(None) as address:
            return check(options, Target(f"{address}/50/v1", "stub"))
    keys = read_keys(None)
    model = find_model(options.url, keys, None)
    return check(options, Target(f"{options.url}/v1", model, keys=tuple(keys)))


def check(options, target):
    """All rounds; the exit code."""
    entries = text_workload(
        requests=200,
        prompt_words=(20, 60),
        output_tokens=OUTPUT_TOKENS,
        seed=1,
    )
    records = ({"prompt": e.prompt, "output_tokens": e.max_tokens} for e in entries)
    rounds = []
    with tempfile.TemporaryDirectory() as folder, generator() as sender:
        data = Path(folder) / "prompts.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        for number in range(options.rounds):
            theirs = vllm_bench(options, target, data, Path(folder) / f"{number}.json")
            plan = LoadPlan(
                target, tuple(entries), options.seconds, 2.0, options.streams, seed=number
            )
            ours = figures(sample(sender.run(plan), Slo()), None)
            rounds.append(compared(ours, theirs))
            print(json.dumps(rounds[-1]), flush=True)
    rows = [summary(name, rounds) for name in METRICS]
    content = {"model": target.model, "streams": options.streams, "rows": rows}
    write_result(options.out, content, command=["python", "loadtest/cross_check.py", *sys.argv[1:]])
    print(json.dumps(rows, indent=1))
    return int(any(abs(row["ratio"] - 1) > options.allowed for row in rows))


def vllm_bench(options, target, data, result):
    """One run of `vllm bench serve`; its result document."""
    arguments = {
        "backend": "openai-chat",
        "base-url": target.base_url.removesuffix("/v1"),
        "endpoint": "/v1/chat/completions",
        "model": target.model,
        "tokenizer": options.tokenizer,
        "dataset-name": "custom",
        "dataset-path": data,
        "custom-output-len": -1,  # those of the data
        "num-prompts": options.requests,
        "max-concurrency": options.streams,
        "percentile-metrics": ",".join(METRICS.values()),
        "result-dir": result.parent,
        "result-filename": result.name,
        "temperature": 0,
    }
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    switches = ["--save-result", "--ignore-eos", "--disable-tqdm", "--disable-shuffle"]
    switches.append("--skip-chat-template")  # the server applies it
    command = [sys.executable, "-c", BENCH, *flags, *switches]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"vllm bench serve failed:\n{done.stderr[-2000:]}")
    return json.loads(result.read_text())


def compared(ours, theirs):
    """Medians of one round, in milliseconds."""
    found = {"requests": [ours["requests"], theirs["completed"]]}
    for own, other in METRICS.items():
        found[own] = [ours[f"{own}_ms_p50"], round(theirs[f"median_{other}_ms"], 3)]
    return found


def summary(name, rounds):
    """Median over the rounds of each client, and their ratio."""
    ours, theirs = (median(one[name][i] for one in rounds) for i in (0, 1))
    return {
        "metric": f"{name}_ms_p50",
        "sere_ray_loadtest": ours,
        "vllm_bench_serve": theirs,
        "ratio": round(ours / theirs, 4),
        "rounds": [one[name] for one in rounds],
    }


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a deployment [the stub]")
    parser.add_argument("--tokenizer", required=True, help="folder of the served model")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--requests", type=int, default=80, help="of vllm bench serve, a round")
    parser.add_argument("--seconds", type=float, default=15, help="of ours, a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--allowed", type=float, default=0.05, help="difference of medians")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
