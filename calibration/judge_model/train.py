"""Train a mixture of experts to judge re-routing rules on: Qwen3-MoE, 64 experts, top-8.

    python calibration/judge_model/text.py --out TEXT
    python calibration/judge_model/train.py --text TEXT --out DIR --minutes 5 --seed 0

writes ``DIR/judge-seed0`` (weights in bf16, configuration, tokenizer, metrics). Started again after
it was killed, it goes on from ``DIR/checkpoint.pt``. Needs torch, transformers and tokenizers.
"""

import argparse
import json
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "demo_model")]
from batches import SOURCE_LENGTH, encode, windows  # noqa: E402
from corpus import END  # noqa: E402
from forward import next_token_loss, run_layer, training_losses  # noqa: E402
from measure import expert_counts, perplexity, usage  # noqa: E402
from text import read_documents  # noqa: E402
from training import make_optimizer, save, schedule, versions  # noqa: E402

CHECKPOINT_SECONDS = 60
SHOWN_EVERY = 100
MEASURED_RECORDS = 200


def make_config(
    tokenizer: PreTrainedTokenizerFast, aux: float, hidden: int, layers: int
) -> Qwen3MoeConfig:
    """64 experts of width 64, top-8 with normalised weights; all widths are multiples of 32."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 192, 1),
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        router_aux_loss_coef=aux,
        max_position_embeddings=SOURCE_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.03,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents in one row, each preceded by the end-of-text token."""
    documents = encode(tokenizer, [END + text for text in texts])
    return torch.tensor(list(chain.from_iterable(documents)), dtype=torch.int16)


class Run:
    """A training run that can be left and taken up: weights, moments, steps and time spent."""

    def __init__(self, model: Qwen3MoeForCausalLM, stream: Tensor, args: argparse.Namespace):
        self.model, self.stream, self.args = model, stream, args
        self.path = args.out / "checkpoint.pt"
        self.optimizer = make_optimizer(model, args.rate, args.decay)
        self.step, self.seconds = 0, 0.0
        on_gpu = stream.is_cuda
        self.parts = {
            "layer_of": torch.compile(run_layer, dynamic=False) if on_gpu else run_layer,
            "loss_of": torch.compile(next_token_loss, dynamic=False) if on_gpu else next_token_loss,
        }

    def progress(self) -> float:
        """Share of the budget that is spent: time on the clock, or steps."""
        args = self.args
        return self.step / args.steps if args.steps else self.seconds / (60 * args.minutes)

    def take_up(self) -> bool:
        """Go on from the checkpoint, if there is one of the same settings.

        Raises:
            SystemExit: it is of other settings.
        """
        if not self.path.exists():
            return False
        state = torch.load(self.path, map_location=self.stream.device, weights_only=True)
        if state["settings"] != settings(self.args):
            raise SystemExit(f"{self.path} is of {state['settings']}; give another --out")
        self.load(state)
        return True

    def load(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def state(self) -> dict[str, Any]:
        """Weights, moments, steps and time spent."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def leave(self) -> None:
        """Write the checkpoint in one step."""
        temporary = self.path.with_suffix(".tmp")
        torch.save({"settings": settings(self.args), **self.state()}, temporary)
        temporary.replace(self.path)

    def rows(self) -> Tensor:
        """The batch of this step, a function of seed and step alone."""
        device = self.stream.device
        draw = torch.Generator(device).manual_seed(self.args.seed * 2**32 + self.step)
        last = len(self.stream) - SOURCE_LENGTH - 1
        starts = torch.randint(last, (self.args.rows,), generator=draw, device=device)
        return windows(self.stream, starts)

    def losses(self, ids: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """Loss and balancing term under autocast."""
        with torch.autocast(ids.device.type, torch.bfloat16):
            return training_losses(self.model, ids, dropout, **self.parts)

    def one_step(self) -> tuple[Tensor, Tensor]:
        """Forward, backward, update."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.rate * schedule(max(self.progress(), 1e-4))
        torch.manual_seed(self.args.seed * 2**32 + self.step)  # of dropout
        loss, balance = self.losses(self.rows(), self.args.dropout)
        (loss + self.args.aux * balance).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach(), balance.detach()

    def account(self, began: float, digest: str) -> dict[str, Any]:
        """The first fields of ``metrics.json``: what was run, how, and what came of it.

        Args:
            began: reading of the monotonic clock at the start, data and compilation included.
            digest: hash of the weights.
        """
        tokens = self.step * self.args.rows * SOURCE_LENGTH
        return {
            "run": {
                **versions(self.stream.device),
                "steps": self.step,
                "minutes": round(self.seconds / 60, 2),
                "minutes_with_data_and_compilation": round((time.monotonic() - began) / 60, 2),
                "tokens": tokens,
                "epochs": round(tokens / len(self.stream), 2),
            },
            "settings": settings(self.args),
            "weights_sha256": digest,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def settings(args: argparse.Namespace) -> dict[str, float | str]:
    """What two halves of one run must have in common."""
    kinds = (int, float, str)  # paths are none of them
    return {key: value for key, value in vars(args).items() if isinstance(value, kinds)}


def train(run: Run, valid: Tensor) -> list[dict[str, float]]:
    """Run until the budget is spent; a validation loss every 100 steps.

    The clock leaves out the first step and the first validation, which compile.
    """
    history: list[dict[str, float]] = []
    first, before, saved = run.step + 1, run.seconds, time.monotonic()
    start = saved
    while run.progress() < 1:
        loss, balance = run.one_step()
        run.seconds = before + time.monotonic() - start
        if run.step == first or run.step % SHOWN_EVERY == 0:
            history.append(
                {
                    "step": run.step,
                    "seconds": round(run.seconds, 1),
                    "loss": round(float(loss), 3),
                    "balance": round(float(balance), 3),
                    "validation_loss": validation_loss(run, valid),
                }
            )
            print(history[-1], flush=True)
        if run.step == first:
            start, run.seconds = time.monotonic(), before
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            run.leave()
            saved = time.monotonic()
    run.leave()
    return history


@torch.no_grad()
def validation_loss(run: Run, valid: Tensor) -> float:
    """Mean loss on evenly spaced rows of the validation text, as many as a batch has."""
    last = len(valid) - SOURCE_LENGTH - 1
    starts = torch.linspace(0, last, run.args.rows, device=valid.device).long()
    return round(float(run.losses(windows(valid, starts), 0.0)[0]), 4)


def measure(folder: Path, text: Path, stream: Tensor, device: torch.device) -> dict[str, Any]:
    """Perplexity on held-out pieces and use of the experts, by the stock model in bf16."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    lines = (text / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:MEASURED_RECORDS]
    with expert_counts(model) as counts:
        heldout = perplexity(model, tokenizer, [json.loads(line)["text"] for line in lines], stream)
    return {"heldout": heldout, "experts_on_heldout_text": usage(counts)}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a model to judge re-routing rules on.")
    parser.add_argument("--text", type=Path, required=True, help="folder that text.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time on the clock")
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument("--rows", type=int, default=32, help="rows of 1024 tokens a step")
    parser.add_argument("--hidden", type=int, default=384, help="width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=10, help="decoder layers")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.5, help="weight decay of matrices")
    parser.add_argument("--dropout", type=float, default=0.1, help="on what each block adds")
    parser.add_argument("--aux", type=float, default=0.01, help="weight of the balancing term")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Text, training, checkpoint, measurement."""
    args = parse_args(arguments)
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.text / "tokenizer")
    texts = read_documents(args.text)
    stream, valid = (
        token_stream(tokenizer, texts[split]).to(device) for split in ("train", "validation")
    )
    print(f"{len(stream)} tokens, validation {len(valid)}: {time.monotonic() - began:.0f} s")

    torch.manual_seed(args.seed)
    config = make_config(tokenizer, args.aux, args.hidden, args.layers)
    run = Run(Qwen3MoeForCausalLM(config).to(device), stream, args)
    if run.take_up():
        print(f"goes on at step {run.step}, {run.seconds:.0f} s")
    history = train(run, valid)
    folder = args.out / f"judge-seed{args.seed}"
    digest = save(run.model, tokenizer, folder)
    metrics = {
        **run.account(began, digest),
        "train_tokens": len(stream),
        "text": json.loads((args.text / "manifest.json").read_text(encoding="utf-8")),
        "history": history,
        **measure(folder, args.text, stream.cpu(), device),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in metrics.items() if k != "history"}, indent=2))


if __name__ == "__main__":
    main()
