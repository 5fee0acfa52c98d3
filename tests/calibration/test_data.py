import bz2
import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sere_ray.calibration.data import make_batches, make_windows, open_texts
from sere_ray.util.errors import DataError


class Characters:
    """A tokenizer of one token per character."""

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        self.characters += len(text)
        return {"input_ids": [ord(c) for c in text]}


def windows_of(texts: list[str], sequences: int, length: int) -> list[str]:
    windows = make_windows(iter(texts), Characters(), sequences, length)
    return ["".join(map(chr, window)) for window in windows]


def test_first_windows_of_all_documents_come_first() -> None:
    texts = ["aaabbbcccd", "xy", "AAABBBC", "eee"]
    assert windows_of(texts, 7, 3) == ["aaa", "AAA", "eee", "bbb", "BBB", "ccc", "xy"]


def test_enough_long_documents_are_one_window_each_and_the_rest_is_not_read() -> None:
    def endless() -> Iterator[str]:
        for number in range(4):
            yield chr(ord("a") + number) * 10
        raise AssertionError("read too far")

    windows = make_windows(endless(), Characters(), 4, 5)
    assert [len(w) for w in windows] == [5] * 4
    assert len({w[0] for w in windows}) == 4


def test_a_very_long_document_is_not_tokenised_whole() -> None:
    tokenizer = Characters()
    make_windows(["x" * 10_000_000], tokenizer, 4, 8)
    assert tokenizer.characters < 10_000


def test_a_document_of_rare_tokens_is_read_on() -> None:
    class Runs(Characters):
        def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [1] * (len(text) // 100)}

    assert len(make_windows(["x" * 100_000], Runs(), 4, 64)) == 4


def test_too_little_text_names_both_numbers() -> None:
    with pytest.raises(DataError, match=r"gives 2 windows of up to 3 tokens.*sequences = 5"):
        windows_of(["aaabb", "c"], 5, 3)


@pytest.mark.parametrize(("sequences", "length"), [(0, 3), (3, 0)])
def test_numbers_must_be_positive(sequences: int, length: int) -> None:
    with pytest.raises(DataError, match="= 0: must be at least 1"):
        windows_of(["abc"], sequences, length)


def test_batches_are_padded_on_the_right() -> None:
    first, second = make_batches([[5, 6, 7], [8], [9, 9]], 2, pad_id=1)
    assert first.input_ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert first.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert second.input_ids.tolist() == [[9, 9]]
    assert first.input_ids.dtype == torch.long
    with pytest.raises(DataError, match="batch_size = 0"):
        make_batches([[1]], 0)


def write_parquet(path: Path, **columns: list[object]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_reads_parquet_jsonl_and_text(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet", text=["one", None, "two"], n=[1, 2, 3])
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({"text": t}) for t in ("one", "two")) + "\n\n")
    plain = tmp_path / "a.md"
    plain.write_text("one\ntwo\n", encoding="utf-8")
    assert list(open_texts(parquet).texts) == ["one", "two"]
    assert list(open_texts(str(lines)).texts) == ["one", "two"]
    source = open_texts(str(plain))
    assert list(source.texts) == ["one\ntwo\n"]
    assert source.sha256 is not None
    assert len(source.sha256) == 64
    assert source.revision is None


ROWS = [{"text": "one"}, {"text": "two"}]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.Json.BZ2", bz2.compress(json.dumps(ROWS).encode())),
        ("a.v1.ndjson.xz", lzma.compress(LINES)),
    ],
)
def test_endings_say_what_a_file_is(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert list(open_texts(str(path)).texts) == ["one", "two"]


def test_upper_case_parquet_and_compressed_text(tmp_path: Path) -> None:
    assert list(open_texts(write_parquet(tmp_path / "A.PARQUET", text=["one"])).texts) == ["one"]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n"))
    assert list(open_texts(str(tmp_path / "a.txt.gz")).texts) == ["one\n"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.zst", "a.TSV.gz", "a.parquet.gz", "a.zip"])
def test_other_syntax_is_refused_and_not_taken_for_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text\none\n")
    with pytest.raises(DataError, match=r"files are not read; allowed: a \.parquet"):
        open_texts(str(tmp_path / name))


def test_another_column(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["one"])
    assert list(open_texts(path, "body").texts) == ["one"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_missing_column_names_those_that_exist(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        write_parquet(path, body=["one"], n=[1])
    else:
        path.write_text('{"body": "one", "n": 1}\n')
    with pytest.raises(DataError, match=r"no column 'text'; it has 'body', 'n'"):
        list(open_texts(str(path)).texts)


def test_column_of_numbers(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=[1, 2])
    with pytest.raises(DataError, match="column 'text' holds int, must be text"):
        list(open_texts(path).texts)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_no_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, text=["", " "])
    else:
        path.write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        list(open_texts(str(path)).texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("a.bin", b"\xff\xfe\x00\x80", "not a text file"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2'.*not a line of JSON"),
        ("a.jsonl", b"[1, 2]\n", "must be an object with 'text'"),
        ("a.json", b"[1, 2]\n", "entry 0'.*must be an object with 'text'"),
        ("a.json", b'"one"', "must be a list of objects with 'text'"),
        ("a.json", b'{"text": "x", ', "not a line of JSON"),
        ("a.json", b'{"body": "x"}', "no column 'text'"),
        ("a.jsonl.gz", LINES, "not a text file"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "not a text file"),
        ("a.jsonl.xz", b"no", "not a text file"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(open_texts(str(path)).texts)


@pytest.mark.parametrize("name", ["nowhere.parquet", "./nowhere", "/nowhere/at-all", "~/none"])
def test_missing_file(name: str) -> None:
    with pytest.raises(DataError, match=r"no such file; allowed: a \.parquet, \.jsonl"):
        open_texts(name)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; allowed"):
        open_texts(str(tmp_path))


def test_unreachable_dataset_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        open_texts("someone/some-dataset")
    message = str(caught.value)
    assert message.startswith("data = 'someone/some-dataset': no such file, and not a dataset")
    assert "download it and give the file" in message
    assert "\n" not in message


def test_hub_rows_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    class Api:
        def dataset_info(self, name: str) -> object:
            return type("Info", (), {"sha": "c0ffee"})()

    def load_dataset(name: str, *, revision: str, split: str, streaming: bool) -> list[object]:
        assert (name, revision, split, streaming) == ("some/set", "c0ffee", "train", True)
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_texts("some/set")
    assert source.revision == "c0ffee"
    assert list(source.texts) == ["one", "two"]
