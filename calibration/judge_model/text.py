"""The text of the judge models: the standard library and the packages that this project pins.

    python calibration/judge_model/text.py --out TEXT

needs no network: it reads what `make install` installed. A package is in training, in validation or
held out as a whole, by a hash of its name, so that no package is on two sides. Long lines of
held-out documents that training text has, too, are counted; documents of many such are left out.
"""

import argparse
import hashlib
import importlib.metadata
import json
import lzma
import platform
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "demo_model"))
from corpus import chunks, read_module, stdlib_files, train_tokenizer, write_jsonl  # noqa: E402

PINS = HERE.parents[1] / "constraints" / "cpu.txt"
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
LEFT_OUT = {"test", "tests", "testing", "_vendor", "vendor", "licenses", "__pycache__"}
PACKAGE_CHARACTERS = 1_200_000
"""Most text of a package: without it a few large ones would be half of all."""
LENGTHS = range(400, 120_000)
"""Characters of a document; longer files are tables and generated code."""
LONG_LINE = 40
MOST_SEEN = 0.2
"""Share of a held-out document's long lines that training may have, too."""
PIECE = 2100
"""Characters of a piece of the data files: some 600 tokens."""
PIECES = 600


class Document(NamedTuple):
    """A file's text."""

    package: str
    name: str
    text: str


def split_of(package: str) -> str:
    """``train``, ``validation`` or ``heldout``: a hash of the name decides."""
    number = int(hashlib.sha256(package.encode()).hexdigest(), 16) % 16
    return {0: "heldout", 1: "validation"}.get(number, "train")


def library_documents() -> Iterator[Document]:
    """The standard library; each of its top-level modules is a package of its own."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in stdlib_files(root):
        package = "stdlib/" + name.split("/")[0].removesuffix(".py")
        yield Document(package, name, read_module(root, name))


def pinned_documents(pins: Path = PINS) -> Iterator[Document]:
    """Source, stubs, documents and descriptions of the packages in ``pins``, by name."""
    lines = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", pins.read_text(), re.MULTILINE)
    for package, version in sorted((normal(name), version) for name, version in lines):
        try:
            found = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # pinned for another platform
        if found.version != version:
            raise SystemExit(f"{package} is {found.version}, {pins.name} pins {version}")
        for path in sorted(found.files or [], key=str):
            if (path.suffix in SUFFIXES or path.name == "METADATA") and not LEFT_OUT & set(
                path.parts
            ):
                name = path.as_posix()
                yield Document(package, name, read_module(Path(str(found.locate_file(""))), name))


def normal(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def select(documents: Iterable[Document]) -> list[Document]:
    """Without duplicates, tables and notices; of each package a sample, by a hash of the name."""
    chosen: list[Document] = []
    seen: set[str] = set()
    size: Counter[str] = Counter()
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        text = document.text
        key = hashlib.sha256("".join(text.split()).encode()).hexdigest()
        prose = len(text) in LENGTHS and len(text) < 100 * text.count("\n") and text.isascii()
        notice = Path(document.name).name.lower().startswith(("licen", "notice", "copying"))
        if not prose or notice or key in seen:
            continue
        seen.add(key)
        if size[document.package] + len(text) <= PACKAGE_CHARACTERS:
            size[document.package] += len(text)
            chosen.append(document)
    return chosen


def long_lines(text: str) -> set[int]:
    """Hashes of the lines that are long enough to tell where they are from."""
    lines = (line.strip() for line in text.splitlines())
    return {hash(line) for line in lines if len(line) >= LONG_LINE}


def unseen(heldout: list[Document], train: list[Document]) -> tuple[list[Document], float]:
    """Held-out documents that are new, and the share of their long lines that are not."""
    known: set[int] = set()
    for document in train:
        known |= long_lines(document.text)
    kept, total, shared = [], 0, 0
    for document in heldout:
        lines = long_lines(document.text)
        if lines and len(lines & known) <= MOST_SEEN * len(lines):
            kept.append(document)
            total, shared = total + len(lines), shared + len(lines & known)
    return kept, shared / max(total, 1)


def pieces(documents: list[Document], count: int) -> list[dict[str, str]]:
    """Pieces of documents in a fixed random order: the packages take turns."""
    rng = random.Random(0)
    of_packages: dict[str, list[dict[str, str]]] = {}
    for document in documents:
        cut = list(chunks(document.text, PIECE))
        for text in rng.sample(cut, min(2, len(cut))):
            of_packages.setdefault(document.package, []).append(
                {"text": text, "package": document.package}
            )
    queues = [rng.sample(own, len(own)) for own in of_packages.values()]
    rounds = ([own[i] for own in queues if i < len(own)] for i in range(max(map(len, queues))))
    found = [record for turn in rounds for record in rng.sample(turn, len(turn))]
    return found[:count]


def write_documents(path: Path, parts: dict[str, list[Document]]) -> None:
    """Training and validation text as compressed JSON lines."""
    with lzma.open(path, "wt", encoding="utf-8", preset=9) as file:
        for split in ("train", "validation"):
            for document in sorted(parts[split]):
                record = {"split": split, "text": document.text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_documents(folder: Path) -> dict[str, list[str]]:
    """Training and validation texts, by the name of the split."""
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    with lzma.open(folder / "documents.jsonl.xz", "rt", encoding="utf-8") as file:
        for record in map(json.loads, file):
            texts[record["split"]].append(record["text"])
    return texts


def collect() -> tuple[dict[str, list[Document]], float]:
    """Documents by split, and the share of held-out long lines that training has, too."""
    parts: dict[str, list[Document]] = {"train": [], "validation": [], "heldout": []}
    for document in select([*library_documents(), *pinned_documents()]):
        parts[split_of(document.package)].append(document)
    parts["heldout"], shared = unseen(parts["heldout"], parts["train"])
    return parts, shared


def main() -> None:
    """Select, split, train the tokenizer, write."""
    parser = argparse.ArgumentParser(description="Collect the text of the judge models.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab", type=int, default=8192, help="size of the vocabulary")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parts, shared = collect()
    write_documents(args.out / "documents.jsonl.xz", parts)
    write_jsonl(args.out / "heldout.jsonl", pieces(parts["heldout"], PIECES))
    write_jsonl(args.out / "calibration.jsonl", pieces(parts["train"], PIECES))
    tokenizer = train_tokenizer((d.text for d in parts["train"][::4]), args.vocab)
    tokenizer.save_pretrained(args.out / "tokenizer")
    manifest = describe(args.out, parts, shared)
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps(manifest, indent=2))


def describe(folder: Path, parts: dict[str, list[Document]], shared: float) -> dict[str, Any]:
    """Counts, and hashes by which another machine's text can be told to be the same."""
    files = ("documents.jsonl.xz", "heldout.jsonl", "calibration.jsonl", "tokenizer/tokenizer.json")
    return {
        "python": platform.python_version(),
        **counts(parts, shared),
        "sha256": {name: sha256(folder / name) for name in files},
    }


def counts(parts: dict[str, list[Document]], shared: float) -> dict[str, Any]:
    """How much text of what there is."""
    return {
        "documents": {split: len(part) for split, part in parts.items()},
        "characters": {split: sum(len(d.text) for d in part) for split, part in parts.items()},
        "packages": len({d.package for part in parts.values() for d in part}),
        "heldout_packages": sorted({d.package for d in parts["heldout"]}),
        "heldout_long_lines_in_training": round(shared, 4),
    }


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
