"""Measure a trained demo checkpoint through the stock transformers model.

Nothing of the training forward pass is used here, so the numbers describe the files that are
shipped. ``train.py`` calls this; ``python measure.py --out DIR`` repeats it for a finished run.
"""

import argparse
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

import corpus
import torch
import torch.nn.functional as F
from batches import source_stream
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

BIGRAM_K = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
DEAD_SHARE = 0.01
MAX_NEW_TOKENS = 96


@contextmanager
def watched_gates(model: nn.Module, take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Give ``take`` each gate's layer and ids ``[T, K]`` while the context is open."""

    def hook(layer: int) -> Any:
        return lambda _module, _inputs, output: take(layer, output[2])

    gates = enumerate(layer.mlp.gate for layer in model.model.layers)
    handles = [gate.register_forward_hook(hook(index)) for index, gate in gates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def expert_counts(model: nn.Module) -> Iterator[list[Tensor]]:
    """Per layer, how often each expert is chosen while the context is open."""
    size = len(model.model.layers[0].mlp.gate.weight)
    counts = [torch.zeros(size, dtype=torch.long) for _ in model.model.layers]

    def count(layer: int, ids: Tensor) -> None:
        counts[layer] += ids.flatten().bincount(minlength=size).cpu()

    with watched_gates(model, count):
        yield counts


@torch.no_grad()
def text_loss(model: nn.Module, rows: list[Tensor]) -> float:
    """Total negative log-likelihood, in nats, of every token after the first of each record."""
    total = 0.0
    for ids in rows:
        logits = model(ids.unsqueeze(0).to(model.device)).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, ids[1:].to(model.device), reduction="sum"))
    return total


def bigram_loss(stream: Tensor, rows: list[Tensor], vocab: int, k: float) -> float:
    """The same sum under a bigram table with ``k`` added to every count."""
    pairs = stream[:-1].long() * vocab + stream[1:].long()
    table = torch.bincount(pairs, minlength=vocab * vocab).view(vocab, vocab).double() + k
    table = (table / table.sum(1, keepdim=True)).log()
    return -sum(float(table[ids[:-1], ids[1:]].sum()) for ids in rows)


def perplexity(model: nn.Module, tokenizer: Any, texts: list[str], stream: Tensor) -> dict:
    """Perplexity and bits per byte on held-out text, for the model and for the best bigram.

    The bigram's ``k`` is the one that does best on the held-out text itself, which favours the
    bigram.
    """
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    tokens = sum(len(ids) - 1 for ids in rows)
    size = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in rows)
    loss = text_loss(model, rows)
    losses = {k: bigram_loss(stream, rows, model.config.vocab_size, k) for k in BIGRAM_K}
    best = min(losses, key=losses.__getitem__)

    def scores(nats: float) -> dict[str, float]:
        bits = nats / math.log(2) / size
        return {
            "perplexity": round(math.exp(nats / tokens), 3), "bits_per_byte": round(bits, 4)
        }  # fmt: skip

    return {
        "device": model.device.type,
        "records": len(rows),
        "tokens": tokens,
        "bytes": size,
        "model": scores(loss),
        "bigram": {**scores(losses[best]), "k": best},
    }


@torch.no_grad()
def arithmetic(model: nn.Module, tokenizer: Any, problems: list[corpus.Problem]) -> dict:
    """Greedy exact match of the final ``Answer:`` line, and how many tokens a reply takes."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p.prompt}], tokenize=False, add_generation_prompt=True
        )
        for p in problems
    ]
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
    )[:, batch["input_ids"].shape[1] :]
    stop = tokenizer.eos_token_id
    lengths = [int((row == stop).nonzero()[0, 0]) + 1 if stop in row else len(row) for row in out]
    right = 0
    replies = tokenizer.batch_decode(out, skip_special_tokens=True)
    for row, problem in zip(replies, problems, strict=True):
        found = re.search(r"Answer: (-?\d+)\s*$", row)
        right += found is not None and found.group(1) == problem.answer
    return {
        "device": model.device.type,
        "problems": len(problems),
        "correct": right,
        "accuracy": round(right / len(problems), 4),
        "reply_tokens_mean": round(sum(lengths) / len(lengths), 1),
        "reply_tokens_min": min(lengths),
        "reply_tokens_max": max(lengths),
    }


def usage(counts: list[Tensor]) -> dict:
    """Per layer, the least and most used expert relative to an even share, and the dead ones.

    An expert is dead when its share of the choices is below 1 % of the even share 1/E.
    """
    shares = [count.double() / count.sum() * len(count) for count in counts]
    return {
        "dead_below_share_of_uniform": DEAD_SHARE,
        "layers": [
            {
                "min_load": round(float(share.min()), 3),
                "max_load": round(float(share.max()), 3),
                "dead": int((share < DEAD_SHARE).sum()),
            }
            for share in shares
        ],
    }


def measure(
    folder: Path,
    texts: list[str],
    problems: list[corpus.Problem],
    stream: Tensor,
    device: torch.device,
) -> dict[str, Any]:
    """All measurements of the checkpoint in ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.set_experts_implementation("eager")
    model.to(device).eval()
    with expert_counts(model) as on_text:
        heldout = perplexity(model, tokenizer, texts, stream)
    with expert_counts(model) as on_chats:
        accuracy = arithmetic(model, tokenizer, problems)
    return {
        "heldout": heldout,
        "arithmetic": accuracy,
        "experts_on_heldout_text": usage(on_text),
        "experts_on_arithmetic": usage(on_chats),
    }


def write_results(folder: Path, metrics: dict[str, Any]) -> None:
    """Write ``metrics.json`` and the model card, whose numbers come from the metrics alone."""
    text = json.dumps(metrics, indent=2) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    run, held, sums = metrics["run"], metrics["heldout"], metrics["arithmetic"]
    layers = metrics["experts_on_heldout_text"]["layers"]
    rows = [
        f"| {i} | {layer['min_load']} | {layer['max_load']} | {layer['dead']} |"
        for i, layer in enumerate(layers)
    ]
    values = {
        **{f"run_{key}": value for key, value in run.items()},
        **{f"sums_{key}": value for key, value in sums.items()},
        **{f"held_{key}": value for key, value in held.items()},
        **{f"model_{key}": value for key, value in held["model"].items()},
        **{f"bigram_{key}": value for key, value in held["bigram"].items()},
        "accuracy_percent": f"{100 * sums['accuracy']:.1f}",
        "million_parameters": f"{metrics['parameters'] / 1e6:.2f}",
        "million_source": f"{run['source_tokens'] / 1e6:.0f}",
        "million_unique": f"{metrics['source_train_tokens'] / 1e6:.2f}",
        "million_chat": f"{run['chat_tokens'] / 1e6:.0f}",
        "sha256": metrics["weights_sha256"],
        "usage_rows": "\n".join(rows),
        "note": textwrap.fill(metrics.get("note", ""), 100),
    }
    template = Template((corpus.HERE / "card.md.in").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(template.substitute(values), encoding="utf-8")


def main() -> None:
    """Measure a finished run again on this machine, with the training tokens of its library."""
    parser = argparse.ArgumentParser(description="Measure a trained demo model again.")
    parser.add_argument("--out", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--seed", type=int, default=0, help="the seed that train.py ran with")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = (args.out / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(args.out / "model")
    stream = source_stream(tokenizer, corpus.load_source().train)
    problems = corpus.heldout_problems(args.seed)
    texts = [json.loads(line)["text"] for line in lines]
    print(json.dumps(measure(args.out / "model", texts, problems, stream, device), indent=2))


if __name__ == "__main__":
    main()
