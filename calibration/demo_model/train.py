"""Train the demo mixture-of-experts model and write it as a stock Qwen3-MoE checkpoint.

    python calibration/demo_model/train.py --out DIR --minutes 3 --seed 0

writes ``DIR/model`` (weights, config, tokenizer, metrics, card) and ``DIR/data`` (held-out text,
arithmetic, calibration text). Needs torch, transformers and tokenizers, and no network.
"""

import argparse
import json
import time
from itertools import chain
from pathlib import Path
from typing import Any

import corpus
import measure
import torch
from batches import CHAT_LENGTH, SOURCE_LENGTH, chat_rows, source_stream, windows
from forward import training_losses
from torch import Tensor, nn
from training import make_optimizer, save, schedule, versions
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM


def make_config(tokenizer: PreTrainedTokenizerFast, aux: float) -> Qwen3MoeConfig:
    """The smallest Qwen3-MoE with enough experts to re-route among.

    All widths are multiples of 32, which block-wise CPU and GPU kernels ask for.
    """
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=48,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=aux,
        max_position_embeddings=SOURCE_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def validation_loss(model: Qwen3MoeForCausalLM, stream: Tensor) -> float:
    """Mean loss on up to 32 evenly spaced rows of the validation source."""
    last = stream.numel() - SOURCE_LENGTH - 1
    starts = torch.linspace(0, last, 32 if stream.is_cuda else 2, device=stream.device).long()
    with torch.autocast(stream.device.type, torch.bfloat16):
        return float(training_losses(model, windows(stream, starts))[0])


def train(
    model: Qwen3MoeForCausalLM, stream: Tensor, chats: Tensor, valid: Tensor, args: Any
) -> dict[str, float]:
    """Run the loop until the budget is spent; return what was spent.

    The budget is wall-clock time unless ``--steps`` is given. The first step compiles the graph
    and is left out of the clock.
    """
    device = stream.device
    draw = torch.Generator(device=device).manual_seed(args.seed)
    optimizer = make_optimizer(model, args.rate, args.decay)
    losses = torch.compile(training_losses, dynamic=False) if stream.is_cuda else training_losses
    step, start, shown = 0, time.monotonic(), 0.0
    while True:
        elapsed = time.monotonic() - start
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if progress >= 1 and step > 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.rate * schedule(max(progress, 1e-4))
        picks = (stream.numel() - SOURCE_LENGTH - 1, args.rows), (len(chats), args.chat_rows)
        starts, rows = [
            torch.randint(high, (n,), generator=draw, device=device) for high, n in picks
        ]
        with torch.autocast(device.type, torch.bfloat16):
            text, text_balance = losses(model, windows(stream, starts), args.dropout)
            chat, chat_balance = losses(model, chats[rows].long())
        balance = (text_balance + chat_balance) / 2
        (text + chat + args.aux * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1:
            text.item()
            start = time.monotonic()
        if step % 20 == 0 and elapsed - shown > 10:
            shown = elapsed
            values = f"source {text.item():.3f} chat {chat.item():.3f} balance {balance.item():.2f}"
            watched = validation_loss(model, valid)
            print(f"{elapsed:5.0f} s step {step} {values} validation {watched:.3f}", flush=True)
    source_tokens = step * args.rows * SOURCE_LENGTH
    return {
        "steps": step,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "source_tokens": source_tokens,
        "source_epochs": round(source_tokens / stream.numel(), 1),
        "chat_tokens": step * args.chat_rows * CHAT_LENGTH,
        "validation_loss": round(validation_loss(model, valid), 4),
    }


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo model of sere-ray.")
    parser.add_argument("--out", type=Path, required=True, help="folder for model/ and data/")
    parser.add_argument("--minutes", type=float, default=3.0, help="training time on the clock")
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and batches")
    parser.add_argument("--rows", type=int, default=12, help="source rows of 1024 tokens a step")
    parser.add_argument("--chat-rows", type=int, default=64, help="chat rows of 256 tokens a step")
    parser.add_argument("--chats", type=int, default=300_000, help="generated chats to train on")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=1.0, help="weight decay of matrices")
    parser.add_argument("--dropout", type=float, default=0.25, help="dropout on the source rows")
    parser.add_argument("--aux", type=float, default=0.02, help="weight of the balancing term")
    parser.add_argument("--vocab", type=int, default=1024, help="size of the vocabulary")
    return parser.parse_args()


def main() -> None:
    """Data, tokenizer, training, checkpoint, measurement."""
    args = parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = corpus.load_source()
    banned = [problem.key for problem in corpus.heldout_problems(args.seed)]
    chats = [corpus.chat_text(p) for p in corpus.training_problems(args.seed, args.chats, banned)]
    tokenizer = corpus.train_tokenizer(chain(source.train.values(), chats[:10_000]), args.vocab)
    heldout, problems = corpus.write_data(args.out / "data", source, tokenizer, args.seed)
    stream = source_stream(tokenizer, source.train).to(device)
    valid = source_stream(tokenizer, source.validation).to(device)
    rows = chat_rows(tokenizer, chats).to(device)
    print(f"source {stream.numel()} tokens, validation {valid.numel()}, chat rows {len(rows)}")

    model = Qwen3MoeForCausalLM(make_config(tokenizer, args.aux)).to(device)
    spent = train(model, stream, rows, valid, args)
    folder = args.out / "model"
    digest = save(model, tokenizer, folder)
    metrics = {
        "run": {**versions(device), "seed": args.seed, **spent},
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "weights_sha256": digest,
        "parameters": sum(p.numel() for p in model.parameters()),
        "source_train_tokens": stream.numel(),
        **measure.measure(folder, heldout, problems, stream.cpu(), device),
    }
    measure.write_results(folder, metrics)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
