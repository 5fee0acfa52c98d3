"""Make a mixture of experts from a real pretrained model, to judge re-routing rules on.

    python calibration/pretrained_judge/prepare.py --out TEXT
    python calibration/pretrained_judge/upcycle.py --text TEXT --out DIR --minutes 5 --seed 0

cuts SmolLM2-135M-Instruct (``cut.py``), trains on and writes ``DIR/judge-seed0`` (weights in bf16,
configuration, tokenizer, metrics); with ``--gate sigmoid``, ``DIR/judge-sigmoid-seed0``. Started
again after it was killed, it goes on from ``DIR/checkpoint.pt``; started again when it is done, it
does nothing; started while it runs, it is refused. Needs torch, transformers and tokenizers.
"""

import argparse
import fcntl
import json
import lzma
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "judge_model"), str(HERE.parent / "demo_model")]
from balance import ByBias, ByLoss  # noqa: E402
from batches import SOURCE_LENGTH  # noqa: E402
from cut import EXPERTS, SCALE, Rows, cut, gate_rows, layer_inputs  # noqa: E402
from forward import next_token_loss  # noqa: E402
from quality import evenly, measure, perplexity  # noqa: E402
from routed import Routing, activate, before_experts, forward  # noqa: E402
from source import open_dense  # noqa: E402
from train import Run, settings  # noqa: E402
from training import save, schedule  # noqa: E402

RATES = {"experts": (5e-4, 0.05), "gate": (1e-4, 0.0), "rest": (1e-4, 0.05)}
"""Peak learning rate and weight decay."""
SHOWN_EVERY = 50
GATE_WINDOWS, GATE_LENGTH = 32, 512
"""Text that gates are laid out on."""


class Upcycle(Run):
    """A training run that can be left and taken up."""

    def __init__(self, model: PreTrainedModel, stream: Tensor, args: argparse.Namespace):
        self.model, self.stream, self.args = model, stream, args
        self.path = args.out / "checkpoint.pt"
        self.optimizer = make_optimizer(model)
        self.balance = (ByLoss if args.gate == "softmax" else ByBias)(model, args.target)
        self.step, self.seconds = 0, 0.0
        self.routings: list[Routing] = []

        def ready(function: Any) -> Any:
            compiled = stream.is_cuda and not args.eager
            return torch.compile(function, dynamic=False) if compiled else function

        self.parts = {"before_of": ready(before_experts), "activate_of": ready(activate)}
        self.loss_of = ready(next_token_loss)

    def state(self) -> dict[str, Any]:
        """Weights, moments, balance, steps and time spent."""
        return super().state() | {"balance": self.balance.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state` gave."""
        super().load(state)
        self.balance.load(state["balance"])

    def losses(self, ids: Tensor, dropout: float = 0.0) -> tuple[Tensor, list[Routing]]:
        """Mean loss under autocast, and what gates did; there is no dropout."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        with torch.autocast(ids.device.type, torch.bfloat16):
            x, routings = forward(self.model, inputs, **self.parts)
            head = self.model.model.embed_tokens.weight
            return self.loss_of(head, x, inputs, targets, -1), routings

    def one_step(self) -> Tensor:
        """Forward, backward, update; the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * schedule(max(self.progress(), 1e-4))
        loss, self.routings = self.losses(self.rows())
        (loss + self.balance.term(self.routings)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balance.after(self.routings)
        self.step += 1
        return loss.detach()


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW; experts learn faster than what the dense model keeps, gates do not decay."""
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in RATES}
    for name, parameter in model.named_parameters():
        kind = "experts" if ".experts." in name else "gate" if ".gate." in name else "rest"
        groups[kind].append(parameter)
    listed = [
        {"params": groups[kind], "lr": rate, "base": rate, "weight_decay": decay}
        for kind, (rate, decay) in RATES.items()
    ]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(listed, betas=(0.9, 0.95), fused=fused)


def train(run: Upcycle) -> list[dict[str, Any]]:
    """Run until the budget is spent. The clock leaves out the first step, which compiles."""
    history: list[dict[str, Any]] = []
    first, before, saved = run.step + 1, run.seconds, time.monotonic()
    start = saved
    while run.progress() < 1:
        loss = run.one_step()
        if run.step == first or run.step % SHOWN_EVERY == 0:
            history.append(shown(run, loss))
            print(history[-1], flush=True)
        if run.step == first:
            start = time.monotonic()
        run.seconds = before + time.monotonic() - start
        if time.monotonic() - saved > 60 * run.args.checkpoint_minutes:
            run.leave()
            saved = time.monotonic()
    return history


def shown(run: Upcycle, loss: Tensor) -> dict[str, Any]:
    """A line of the history."""
    unions = torch.stack([routing.union for routing in run.routings])
    return {
        "step": run.step,
        "seconds": round(run.seconds, 1),
        "loss": round(float(loss), 4),
        "union_of_16": round(float(unions.mean()), 3),
        "least": round(float(unions.min()), 3),
        "most": round(float(unions.max()), 3),
    }


def read_tokens(folder: Path, split: str) -> Tensor:
    """The token stream of ``train`` or ``heldout``, int32."""
    with lzma.open(folder / f"{split}.npy.xz") as file:
        return torch.from_numpy(np.load(file).astype(np.int32))


def start_model(
    dense: LlamaForCausalLM, stream: Tensor, args: argparse.Namespace
) -> tuple[PreTrainedModel, list[Rows]]:
    """Lay out the gates on some training text, and cut."""
    draw = torch.Generator(stream.device).manual_seed(args.seed)
    last = len(stream) - GATE_LENGTH - 1
    starts = torch.randint(last, (GATE_WINDOWS, 1), generator=draw, device=stream.device)
    ids = stream[starts + torch.arange(GATE_LENGTH, device=stream.device)].long()
    rows = [gate_rows(x, args.target, SCALE[args.gate], draw) for x in layer_inputs(dense, ids)]
    order = torch.Generator().manual_seed(args.seed)
    return cut(dense, [row.weight for row in rows], args.gate, order), rows


def untie(model: PreTrainedModel) -> None:
    """Give the model an output layer of its own: vLLM's GLM-4.5 does not know tied ones.

    It leaves the output layer as it was allocated, without a word (0.32).
    """
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make a mixture of experts from SmolLM2-135M.")
    parser.add_argument("--text", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--gate", choices=sorted(SCALE), default="softmax", help="kind of gate")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time on the clock")
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of gates, cut and batches")
    parser.add_argument("--rows", type=int, default=16, help="rows of 1024 tokens a step")
    parser.add_argument("--layers", type=int, default=0, help="first layers alone, to try it")
    parser.add_argument("--target", type=float, default=0.6, help="share that 16 rows read")
    parser.add_argument("--checkpoint-minutes", type=float, default=2.5, help="8 GB each")
    parser.add_argument("--heldout-windows", type=int, default=24, help="of 1024 tokens")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    return parser.parse_args(arguments)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder while the block runs.

    Raises:
        SystemExit: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"--out {folder}: another run works there; give another --out"
            ) from None
        yield


def is_done(folder: Path, args: argparse.Namespace) -> bool:
    """Whether a finished model of these settings is there.

    Raises:
        SystemExit: it is of other settings.
    """
    path = folder / "metrics.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))["settings"]
    if found != settings(args):
        raise SystemExit(f"{folder} is of {found}; give another --out")
    return True


def main(arguments: list[str] | None = None) -> None:
    """Cut, training, checkpoint, measurement."""
    args = parse_args(arguments)
    name = "judge" if args.gate == "softmax" else f"judge-{args.gate}"
    folder = args.out / f"{name}-seed{args.seed}"
    with alone_in(args.out):
        if is_done(folder, args):
            print(f"{folder} is done")
        else:
            write_judge(folder, args)


def write_judge(folder: Path, args: argparse.Namespace) -> None:
    """All of it, but what a checkpoint has."""
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stream = read_tokens(args.text, "train").to(device)
    heldout = read_tokens(args.text, "heldout").to(device)
    windows = evenly(heldout, args.heldout_windows, SOURCE_LENGTH + 1)
    dense = open_dense(args.text, args.layers or None).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        scores = {"dense": perplexity(lambda ids: dense(ids).logits, windows)}
    model, rows = start_model(dense, stream, args)
    dense.cpu()
    run = Upcycle(model, stream, args)
    with torch.no_grad():
        losses = [float(run.losses(window[None])[0]) for window in windows]
        scores["start"] = round(math.exp(sum(losses) / len(losses)), 3)
    print(
        f"{len(stream)} tokens, {time.monotonic() - began:.0f} s; perplexity {scores}", flush=True
    )
    if run.take_up():
        print(f"goes on at step {run.step}, {run.seconds:.0f} s")
    history = train(run)
    writing = folder.with_name(folder.name + ".part")
    if args.gate == "sigmoid":
        untie(run.model)
    digest = save(run.model, AutoTokenizer.from_pretrained(args.text / "tokenizer"), writing)
    found = measure(writing, windows, heldout, device)
    metrics = {
        **run.account(began, digest),
        "experts": EXPERTS,
        "heldout_perplexity": scores | {"after": found.pop("perplexity")},
        **found,
        "gates": {
            "offset": [round(row.offset, 2) for row in rows],
            "union_of_16": [round(row.union, 3) for row in rows],
        },
        "source": json.loads((args.text / "source.json").read_text(encoding="utf-8")),
        "history": history,
    }
    (writing / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    writing.rename(folder)
    run.path.unlink(missing_ok=True)
    print(json.dumps({k: v for k, v in metrics.items() if k != "history"}), flush=True)


if __name__ == "__main__":
    main()
