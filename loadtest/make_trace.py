"""Makes the small traces of this folder, in the forms of Mooncake and BurstGPT.

    python loadtest/make_trace.py          # writes loadtest/traces/small.jsonl and small.csv

They are made up: bursts of requests with short prompts, of which some share a prefix, for models
with a context of 512 tokens. No recorded trace is distributed here.
"""

import json
import random
from pathlib import Path

SEED = 7
REQUESTS = 60
HEAD = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
FOLDER = Path(__file__).parent / "traces"


def main():
    """Write both files; the same requests in both."""
    draw = random.Random(SEED)
    mooncake, burst_gpt = (
        [],
        ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"],
    )
    at = 0.0
    for _ in range(REQUESTS):
        at += draw.gammavariate(0.4, 2.5)  # one request per second, in bursts
        length, output = draw.randint(8, 120), draw.randint(8, 64)
        record = {"timestamp": round(1e3 * at), "input_length": length, "output_length": output}
        mooncake.append(json.dumps({**record, "hash_ids": [draw.randint(0, 15)]}))
        burst_gpt.append(f"{at:.3f},made-up,{length},{output},{length + output},Conversation log")
    (FOLDER / "small.jsonl").write_text("\n".join(mooncake) + "\n")
    (FOLDER / "small.csv").write_text("\n".join(burst_gpt) + "\n")


if __name__ == "__main__":
    main()
