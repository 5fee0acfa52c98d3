"""Text, tokenizer and arithmetic for the demo model; every step is a function of the seed.

The text is the source of the Python standard library that runs this script, so the recipe needs
no download. The arithmetic is generated, so each answer can be checked by a program.
"""

import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
EXCLUDED_PARTS = {
    "__pycache__", "dist-packages", "encodings", "idlelib", "lib-dynload", "site-packages",
    "test", "tests", "turtledemo",
}  # fmt: skip
MACHINE_WORDS = re.compile(r"/usr/|/home|/root|/opt|pypi|password", re.IGNORECASE)
HARD = re.compile(r"\d{3} \*")
VALIDATION_EVERY = 25
CHUNK_CHARS = 2100
MAX_TOKENS = 1000


class Problem(NamedTuple):
    """One chat exchange: what the user asks, the worked reply, and the final number."""

    prompt: str
    reply: str
    answer: str
    key: str


# --- standard library source -------------------------------------------------------------------


def heldout_names() -> list[str]:
    """Modules that no part of training reads: the committed list."""
    return (HERE / "heldout_modules.txt").read_text(encoding="utf-8").split()


def stdlib_files(root: Path) -> list[str]:
    """Sorted relative names of the library's own modules.

    Test folders and character tables are left out as they are not prose or ordinary code;
    ``_sysconfigdata`` is left out because it names the machine's paths.
    """
    names = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        parts = set(relative.parts)
        if parts & EXCLUDED_PARTS or any(part.startswith("config-") for part in parts):
            continue
        if not path.name.startswith("_sysconfigdata"):
            names.append(relative.as_posix())
    return sorted(names)


def read_module(root: Path, name: str) -> str:
    """The module's text; a file that is not UTF-8 gives the empty string and so is skipped."""
    try:
        return (root / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


class Source(NamedTuple):
    """The library's modules in three disjoint parts, each a map from name to text."""

    train: dict[str, str]
    validation: dict[str, str]
    heldout: dict[str, str]


def load_source(root: Path | None = None) -> Source:
    """Split the library: the committed held-out list, every 25th other file, and the rest.

    The validation part is watched while training, so that the held-out part stays untouched until
    the end. A held-out module that is missing raises, since the list defines the measurement.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    heldout = heldout_names()
    rest = [name for name in stdlib_files(root) if name not in set(heldout)]
    validation = rest[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    train = [name for name in rest if name not in set(validation)]
    parts = [{name: read_module(root, name) for name in part} for part in (train, validation)]
    return Source(*parts, {name: (root / name).read_text(encoding="utf-8") for name in heldout})


def chunks(text: str, size: int) -> Iterator[str]:
    """Cut a text at line ends into pieces of at most about ``size`` characters."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        if length + len(line) > size and piece:
            yield "".join(piece)
            piece, length = [], 0
        piece.append(line)
        length += len(line)
    if length > size // 2:
        yield "".join(piece)


# --- arithmetic --------------------------------------------------------------------------------


def number(rng: random.Random, digits: int) -> int:
    """A number whose digit count is uniform in 1 .. ``digits``, so small ones occur too."""
    return rng.randint(2, 10 ** rng.randint(1, digits) - 1)


def worked_problem(rng: random.Random) -> Problem:
    """Two or three operations, worked left to right, one line each.

    A product may only come first, so that left to right is also the usual order of operations.
    Intermediate results stay at or above zero.
    """
    value = number(rng, 3)
    expression = str(value)
    lines = []
    for step in range(rng.choice((2, 3))):
        if step == 0 and rng.random() < 0.35:
            sign, operand = "*", rng.randint(2, 9)
        else:
            operand = number(rng, 3)
            sign = "-" if operand <= value and rng.random() < 0.5 else "+"
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
        lines.append(f"{value} {sign} {operand} = {result}")
        expression += f" {sign} {operand}"
        value = result
    reply = "\n".join([*lines, f"Answer: {value}"])
    return Problem(f"Work out {expression}.", reply, str(value), expression)


def comparison(rng: random.Random) -> Problem:
    """Which of two numbers is larger or smaller: a second kind of chat, for variety."""
    left = number(rng, 3)
    right = rng.choice([n for n in (left + rng.randint(1, 40), number(rng, 3)) if n != left])
    word = rng.choice(("larger", "smaller"))
    pick = max(left, right) if word == "larger" else min(left, right)
    other = left + right - pick
    prompt = f"Which is {word}, {left} or {right}?"
    return Problem(prompt, f"{pick} is {word} than {other}.\nAnswer: {pick}", str(pick), prompt)


def heldout_problems(seed: int, count: int = 200) -> list[Problem]:
    """The fixed problems of the accuracy measurement, all different.

    Each begins with a product of a three-digit number. The shipped model solved 200 of 200 drawn
    from all kinds, and a measurement that starts at 100 % cannot show a gain.
    """
    rng = random.Random(f"heldout-{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = worked_problem(rng)
        if HARD.match(problem.key):
            problems[problem.key] = problem
    return list(problems.values())


def training_problems(seed: int, count: int, excluded: Iterable[str]) -> Iterator[Problem]:
    """Chats for training; a problem whose expression is held out is never yielded."""
    rng = random.Random(f"train-{seed}")
    banned = set(excluded)
    made = 0
    while made < count:
        problem = comparison(rng) if rng.random() < 0.1 else worked_problem(rng)
        if problem.key not in banned:
            made += 1
            yield problem


def chat_text(problem: Problem) -> str:
    """The exchange as the chat template writes it."""
    return f"{START}user\n{problem.prompt}{STOP}\n{START}assistant\n{problem.reply}{STOP}\n"


# --- tokenizer ---------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose pre-tokenizer gives every digit a token of its own.

    One token per digit makes carrying learnable for a model of this size.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START, STOP],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        pad_token=END,
        eos_token=STOP,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# --- shipped data files ------------------------------------------------------------------------


def heldout_records(source: Source, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, str]]:
    """Held-out text in pieces that each fit the model's positions."""
    records = []
    for name, text in source.heldout.items():
        for piece in chunks(text, CHUNK_CHARS):
            if len(tokenizer(piece)["input_ids"]) <= MAX_TOKENS:
                records.append({"text": piece, "module": name, "license": "PSF-2.0"})
    return records


def calibration_records(
    source: Source, tokenizer: PreTrainedTokenizerFast, banned: Iterable[str], seed: int
) -> list[dict[str, str]]:
    """Text of the training part: about three quarters source, one quarter chats, shuffled.

    Modules with a copyright notice of their own are left out, as are pieces that name paths of a
    machine or a package host.
    """
    rng = random.Random(f"calibration-{seed}")
    pieces = [
        piece
        for text in source.train.values()
        if "copyright" not in text.lower()
        for piece in chunks(text, CHUNK_CHARS)
        if not MACHINE_WORDS.search(piece) and piece.isascii()
    ]
    kept = [p for p in rng.sample(pieces, 200) if len(tokenizer(p)["input_ids"]) <= MAX_TOKENS]
    records = [{"text": piece, "kind": "source"} for piece in kept[:145]]
    chats = [chat_text(p) for p in training_problems(seed, 800, banned)]
    groups = ["".join(chats[i : i + 10]) for i in range(0, len(chats), 10)]
    records += [{"text": group, "kind": "chat"} for group in groups]
    rng.shuffle(records)
    return records


def write_jsonl(path: Path, records: Iterable[dict[str, str]]) -> None:
    """One JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_data(
    folder: Path, source: Source, tokenizer: PreTrainedTokenizerFast, seed: int
) -> tuple[list[str], list[Problem]]:
    """Write the three data files; return the held-out texts and problems for measuring."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = heldout_problems(seed)
    heldout = heldout_records(source, tokenizer)
    banned = [problem.key for problem in problems]
    write_jsonl(folder / "heldout.jsonl", heldout)
    write_jsonl(
        folder / "arithmetic.jsonl", ({"prompt": p.prompt, "answer": p.answer} for p in problems)
    )
    write_jsonl(folder / "calibration.jsonl", calibration_records(source, tokenizer, banned, seed))
    return [record["text"] for record in heldout], problems
