"""What files hold, whatever they are called: lines, lists, objects over many lines, compressed, in directories."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from limbeck.errors import TraceFormatError
from limbeck.traces.directory import split_of
from limbeck.traces.sources import ReadCounts, TraceConfig, read_traces


def record(number: int) -> dict[str, str]:
    return {"prompt": f"Q{number}", "completion": f"<think>c{number}</think>a{number}"}


LINES = "".join(json.dumps(record(number)) + "\n" for number in range(3)).encode()


def read(source: Path, **config: Any) -> tuple[list[str], ReadCounts]:
    traces, counts = read_traces(TraceConfig(source=str(source), **config))
    return [trace.messages[-1]["content"] for trace in traces], counts


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.ndjson", LINES),
        ("T.JSONL", LINES),
        ("t.v2.jsonl", LINES),
        ("t.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("t.jsonl", json.dumps([record(n) for n in range(3)], indent=1).encode()),
        ("t.json", json.dumps([record(n) for n in range(3)]).encode()),
        ("t.json", "".join(json.dumps(record(n), indent=2) for n in range(3)).encode()),
        ("t.json", json.dumps({"version": 1, "data": [record(n) for n in range(3)]}, indent=1).encode()),
        ("t.json", json.dumps({"train": [record(n) for n in range(3)], "test": [record(9)]}).encode()),
        ("t.jsonl", b"\xef\xbb\xbf" + json.dumps([record(n) for n in range(3)], indent=1).encode()),
        ("t.jsonl.gz", gzip.compress(LINES)),
        ("t.JSONL.GZ", gzip.compress(LINES)),
        ("t.jsonl.gz", b"".join(gzip.compress(line + b"\n") for line in LINES.split(b"\n") if line)),
        ("t.json.gz", gzip.compress(json.dumps([record(n) for n in range(3)], indent=1).encode())),
        ("t.jsonl.bz2", bz2.compress(LINES)),
        ("t.jsonl.xz", lzma.compress(LINES)),
    ],
)
def test_the_same_records(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name)[0] == ["Q0", "Q1", "Q2"]


def test_zstd(tmp_path: Path) -> None:
    with pyarrow.CompressedOutputStream(str(tmp_path / "t.jsonl.zst"), "zstd") as file:
        file.write(LINES)
    assert read(tmp_path / "t.jsonl.zst")[0] == ["Q0", "Q1", "Q2"]


def test_places_in_objects_over_many_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(record(0), indent=1) + "\n" + json.dumps({"x": 1}, indent=1))
    with pytest.raises(TraceFormatError, match=r"t\.json:5: unknown format: the record's keys are x"):
        read(path)
    path.write_text(json.dumps({"data": [record(0), {"prompt": "x", "completion": "y"}]}))
    with pytest.raises(TraceFormatError, match=r"t\.json:1, data\[1\]: no thought"):
        read(path)


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl.bz2", "t.jsonl.xz", "t.jsonl.zst"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"no " + data, lambda data: data[:3]]
)
def test_damaged_compression_is_one_line(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    makers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path = tmp_path / name
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(LINES * 50)
        data = path.read_bytes()
    else:
        data = makers[path.suffix](LINES * 50)
    path.write_bytes(damage(data))
    with pytest.raises(TraceFormatError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}") and "\n" not in str(caught.value)


def test_a_broken_first_line_leaves_the_others(tmp_path: Path) -> None:
    for first in (b"{'prompt': 1}\n", b"[1, 2\n", b"\xff\xfe\n", b"// comment\n"):
        path = tmp_path / "t.jsonl"
        path.write_bytes(first + LINES)
        asked, counts = read(path, on_bad="skip")
        assert asked == ["Q0", "Q1", "Q2"] and counts.skipped == 1


def test_bytes_of_a_binary_column_are_text(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": [b"Q0"], "completion": [record(0)["completion"].encode()]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet")[0] == ["Q0"]
    table = pyarrow.table({"prompt": [b"Q\xff"], "completion": [b"x"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(
        TraceFormatError, match="row 1: content is not text: a turn of the user is bytes that are not UTF"
    ):
        read(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("mydata_train.jsonl", "train"),
        ("my-data.test.jsonl.gz", "test"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("test/part-0.jsonl", "test"),
        ("latest.jsonl", None),
        ("contest_results.jsonl", None),
        ("train_and_test.jsonl", None),
        ("test/train.jsonl", "train"),
    ],
)
def test_split_of_a_name(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split


def put(directory: Path, **files: int) -> Path:
    for name, number in files.items():
        path = directory / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record(number)) + "\n")
    return directory


def test_files_for_tests_are_left_out_and_told(tmp_path: Path) -> None:
    put(tmp_path, sums_train_dot_jsonl=0, sums_test_dot_jsonl=1)
    asked, counts = read(tmp_path)
    assert asked == ["Q0"] and "1 file not read (of another split, set split): sums_test.jsonl" in counts.lines()[0]
    assert read(tmp_path, split="test")[0] == ["Q1"]
    other = put(tmp_path / "other", part_dot_jsonl=2, part_test_dot_jsonl=3)
    assert read(other)[0] == ["Q2"]
    assert read(put(tmp_path / "only", test_dot_jsonl=4))[0] == ["Q4"]


def test_a_subset_is_a_folder(tmp_path: Path) -> None:
    put(tmp_path, easy__train_dot_jsonl=0, hard__train_dot_jsonl=1, hard__test_dot_jsonl=2)
    assert read(tmp_path, subset="hard")[0] == ["Q1"]
    assert read(tmp_path, subset="hard", split="test")[0] == ["Q2"]
    with pytest.raises(TraceFormatError, match=r"there is no subset \(folder\) 'hrad'; did you mean 'hard'"):
        read(tmp_path, subset="hrad")
    asked, counts = read(tmp_path)
    assert asked == ["Q0", "Q1"]
    assert any("several folders are read together (easy, hard); subset reads one" in line for line in counts.lines())


def test_kinds_that_are_mixed_and_kinds_that_are_not_read(tmp_path: Path) -> None:
    put(tmp_path, a_dot_jsonl=0)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(record(1)).encode()))
    (tmp_path / "c.json").write_text(json.dumps([record(2)], indent=1))
    (tmp_path / "d.csv").write_text("prompt,completion\n")
    (tmp_path / "e.json").write_text(json.dumps({"learning_rate": 1}))
    (tmp_path / "README.md").write_text("words")
    asked, counts = read(tmp_path)
    assert asked == ["Q0", "Q1", "Q2"]
    told = " ".join(counts.lines())
    assert "d.csv" in told and "e.json: not read: it holds no record of a known format" in told
    assert "files of several kinds are read together: a.jsonl, b.jsonl.gz, c.json" in told and "README" not in told


def test_of_an_output_the_traces_are_read(tmp_path: Path) -> None:
    put(tmp_path, traces_dot_jsonl=0, results_dot_jsonl=1)
    (tmp_path / "limbeck.json").write_text("{}")
    assert read(tmp_path)[0] == ["Q0"]
