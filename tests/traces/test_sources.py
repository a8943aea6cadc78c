"""Files, directories, the hub and tasks as sources; all broken input gives one line with its place."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from limbeck.config import build
from limbeck.errors import ConfigError, LimbeckError, TraceFormatError
from limbeck.traces.sources import ReadCounts, TraceConfig, read_traces
from limbeck.traces.trace import Trace


def record(number: int = 0, reply: str = "<think>c</think>a") -> dict[str, Any]:
    turns = [{"role": "user", "content": f"Q{number}"}, {"role": "assistant", "content": reply}]
    return {"messages": turns}


GOOD = json.dumps(record()).encode() + b"\n"


def read(source: Path | str, **config: Any) -> tuple[list[Trace], ReadCounts]:
    return read_traces(TraceConfig(source=str(source), **config))


def prompts(traces: list[Trace]) -> list[str]:
    return [trace.messages[-1]["content"] for trace in traces]


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")
    return path


def write_parquet(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def bad_line(line: bytes | dict[str, Any] | list[Any] | str | int) -> bytes:
    """A file whose first line is good and whose third, after a blank one, is `line`."""
    return GOOD + b"\n" + (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"


def messages_with(**turn: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", **turn}]}


BROKEN_LINES: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{'messages': 1}", "not JSON: Expecting property name"),
    "two records in a line": (b"{} {}", "not JSON: Extra data"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8: byte 15"),
    "UTF-16": ('{"messages": 1}'.encode("utf-16"), "not UTF-8: byte 1"),
    "deep nesting": (b"[" * 200_000 + b"]" * 200_000, "not JSON: "),
    "huge number": (b'{"n": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
    "a list": ([record()], "not an object: the record is list"),
    "a string": ("text", "not an object: the record is str"),
    "a number": (3, "not an object: the record is int"),
    "null": (b"null", "not an object: the record is NoneType"),
    "other fields": ({"text": "x"}, "unknown format: the record's keys are text"),
    "messages null": ({"messages": None}, "unknown format: the record's keys are messages (null)"),
    "messages empty": ({"messages": []}, "no turns"),
    "no assistant": ({"messages": record()["messages"][:1]}, "no reply"),
    "no user": ({"messages": record()["messages"][1:]}, "no user turn"),
    "user last": ({"messages": record()["messages"][::-1]}, "no reply"),
    "unknown role": ({"messages": [{"role": "judge", "content": "x"}]}, "unknown role: 'judge'"),
    "tool": ({"messages": [{"role": "tool", "content": "x"}]}, "no assistant turn"),
    "content null": (messages_with(content=None), "no content"),
    "content a number": (messages_with(content=1), "content is not text"),
    "image": (messages_with(content=[{"type": "image_url"}]), "content is not text"),
    "no thought": (record(reply="a"), "no thought"),
    "empty thought": (record(reply="<think></think>a"), "empty thought"),
    "missing end marker": (record(reply="<think>c"), "missing end marker"),
    "markers exchanged": (record(reply="c</think>a<think>"), "markers exchanged"),
    "two thoughts": (record(reply="<think>c</think><think>c</think>a"), "two thoughts"),
    "text before the thought": (record(reply="x<think>c</think>a"), "text before the thought"),
    "empty answer": (record(reply="<think>c</think>"), "empty answer"),
    "empty reply": (record(reply=""), "empty reply"),
    "lone surrogate": (record(reply="<think>\ud83d</think>a"), "not valid Unicode"),
    "bad verdict": ({**record(), "correct": "maybe"}, "verdict is not true, false or null"),
}


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES.values(), ids=BROKEN_LINES)
def test_broken_line(tmp_path: Path, line: Any, reason: str) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(bad_line(line))
    with pytest.raises(TraceFormatError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: {reason}"), message
    assert "on_bad" in message and "\n" not in message and len(message) < 500

    traces, counts = read(path, on_bad="skip")
    assert (len(traces), counts.read, counts.kept, counts.skipped) == (1, 2, 1, 1)
    assert sum(counts.reasons.values()) == 1 and reason.startswith(next(iter(counts.reasons)))

    traces, counts = read(path, on_bad="keep")
    keepable = reason in ("no thought", "empty thought", "missing end marker", "no reply")
    assert (counts.kept, counts.kept_bad, counts.skipped) == ((2, 1, 0) if keepable else (1, 0, 1))


def saved_without_rows(path: Path) -> None:
    datasets.Dataset.from_dict({"messages": []}).save_to_disk(str(path))


def damaged_saved(path: Path) -> None:
    datasets.Dataset.from_list([record()]).save_to_disk(str(path))
    for file in path.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:40])


def cut_parquet(path: Path) -> None:
    content = write_parquet(path, [record(number) for number in range(50)]).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def scribbled_parquet(path: Path) -> None:
    content = bytearray(write_parquet(path, [record(number) for number in range(500)]).read_bytes())
    content[200:1200] = bytes(1000)
    path.write_bytes(content)


BROKEN_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("traces.jsonl", lambda path: None, "no such file or directory"),
    "missing in a folder": ("traces", lambda path: None, "no such file or directory"),
    "empty": ("traces.jsonl", lambda path: path.touch(), "the file holds no records"),
    "blank lines only": ("traces.jsonl", lambda path: path.write_text("\n \n"), "the file holds no records"),
    "byte order mark only": (
        "traces.jsonl",
        lambda path: path.write_bytes(b"\xef\xbb\xbf"),
        "the file holds no records",
    ),
    "unknown suffix": ("traces.csv", lambda path: path.write_text("a,b"), "unknown kind of file, '.csv'"),
    "no suffix": ("traces", lambda path: path.write_text("a,b"), "unknown kind of file, no suffix"),
    "JSON list cut": ("t.json", lambda path: path.write_text('[\n{"a": 1},\n{"a"'), "not JSON"),
    "JSON list not UTF-8": ("t.json", lambda path: path.write_bytes(b'["\xff"]'), "not UTF-8"),
    "JSON list empty": ("t.json", lambda path: path.write_text("[]"), "the file holds no records"),
    "Parquet empty file": ("t.parquet", lambda path: path.touch(), "the file holds no records"),
    "Parquet no rows": (
        "t.parquet",
        lambda path: pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array([], "string")}), path),
        "the file holds no records",
    ),
    "Parquet text": (
        "t.parquet",
        lambda path: path.write_text("hello, this is no Parquet"),
        "damaged Parquet file",
    ),
    "Parquet cut": ("t.parquet", cut_parquet, "damaged Parquet file"),
    "Parquet scribbled": ("t.parquet", scribbled_parquet, "damaged Parquet file"),
    "directory empty": ("traces", lambda path: path.mkdir(), "the directory holds no trace files"),
    "directory of others": (
        "traces",
        lambda path: (path.mkdir(), (path / "README.md").write_text("x")),
        "the directory holds no trace files",
    ),
    "directory of hidden files": (
        "traces",
        lambda path: write_lines(path / ".cache" / "t.jsonl", [record()]),
        "the directory holds no trace files",
    ),
    "saved, no rows": ("saved", saved_without_rows, "damaged or empty data set"),
    "saved, damaged": ("saved", damaged_saved, "damaged or empty data set"),
    "saved, bad state": (
        "saved",
        lambda path: (path.mkdir(), (path / "state.json").write_text("{}")),
        "damaged or empty data set",
    ),
}


@pytest.mark.parametrize("on_bad", ["error", "skip", "keep"])
@pytest.mark.parametrize(("name", "make", "reason"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_source(tmp_path: Path, name: str, make: Callable[[Path], object], reason: str, on_bad: str) -> None:
    """What cannot be read at all stops whatever `on_bad` says."""
    path = tmp_path / name
    make(path)
    with pytest.raises(TraceFormatError) as caught:
        read(path, on_bad=on_bad)
    message = str(caught.value)
    assert message.startswith(str(path)) and reason in message, message
    assert "\n" not in message and len(message) < 500


def test_truncated_last_line(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(GOOD + GOOD[:-20])
    with pytest.raises(TraceFormatError, match=r"traces\.jsonl:2: cut off: the last line is not whole JSON"):
        read(path)
    assert read(path, on_bad="skip")[1].reasons == {"cut off": 1}


def test_nothing_left_names_the_first_problem(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "traces.jsonl", [record(reply="a"), record(reply="b")])
    with pytest.raises(
        TraceFormatError, match=r"no trace is left of 2; the first problem is .*traces\.jsonl:1: no thought"
    ):
        read(path, on_bad="skip")


def test_byte_order_mark_blank_lines_and_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    second = json.dumps(record(1, "<think>c\u2028d\x85e</think>a"), ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\n  \n" + second)
    traces, counts = read(path)
    assert [trace.source for trace in traces] == [f"{path}:1", f"{path}:4"]
    assert traces[1].cot == "c\u2028d\x85e" and counts.read == 2


@pytest.mark.parametrize("text", ["\ufeff [\n{0},\n{1}]", "{0}\n{1}\n"], ids=["list", "lines"])
def test_json_file_is_a_list_or_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "traces.json"
    lines = [json.dumps(record(number)) for number in range(2)]
    path.write_text(text.replace("{0}", lines[0]).replace("{1}", lines[1]), encoding="utf-8")
    assert prompts(read(path)[0]) == ["Q0", "Q1"]


def test_bad_entry_of_a_json_list(tmp_path: Path) -> None:
    path = tmp_path / "traces.json"
    path.write_text(json.dumps([record(), 3]))
    with pytest.raises(TraceFormatError, match=r"traces\.json:record 2: not an object"):
        read(path)


def test_bad_row_of_parquet(tmp_path: Path) -> None:
    rows = [record(number) for number in range(100)]
    rows[70] = record(reply="<think>c")
    path = write_parquet(tmp_path / "traces.parquet", rows)
    with pytest.raises(TraceFormatError, match=r"traces\.parquet:row 71: missing end marker"):
        read(path)
    assert read(path, on_bad="skip")[1].kept == 99


def test_several_generations_are_counted_one_by_one(tmp_path: Path) -> None:
    row = {"problem": "Q", "generations": ["<think>c</think>a", "<think>c", "x", "c</think>b"]}
    path = write_lines(tmp_path / "traces.jsonl", [row])
    traces, counts = read(path, on_bad="skip")
    assert [trace.answer for trace in traces] == ["a", "b"]
    assert (counts.read, counts.kept, counts.skipped) == (4, 2, 2)
    assert counts.reasons == {"missing end marker": 1, "no thought": 1}


def test_each_record_is_asked_for_its_format(tmp_path: Path) -> None:
    worked = [{"question": f"Q{n}", "answer": f"{n}\n#### {n}"} for n in range(2)]
    open_chat = {"messages": [{"role": "user", "content": "Hello?"}]}
    path = write_lines(
        tmp_path / "t.jsonl", [open_chat, {"x": 1}, *worked, {"question": "Q", "answer": "4"}, record(7)]
    )
    traces, counts = read(path, on_bad="skip")
    assert prompts(traces) == ["Q0", "Q1", "Q7"]
    assert counts.reasons == {"no reply": 2, "unknown format": 1}


def test_limit_stops_before_later_errors(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(GOOD * 3 + b"broken\n")
    traces, counts = read(path, num_traces=3)
    assert (len(traces), counts.read) == (3, 3)


def test_renamed_field_must_exist(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "traces.jsonl", [{"q": "Q", "r": "<think>c</think>a"}])
    assert prompts(read(path, fields={"q": "prompt", "r": "completion"})[0]) == ["Q"]
    with pytest.raises(TraceFormatError, match=r":1: missing field: 'p' of fields; the record's keys are q, r"):
        read(path, fields={"p": "prompt"})


def test_directory_reads_its_files_in_order_each_in_its_format(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", [{"prompt": "second", "completion": "<think>c</think>a"}])
    write_parquet(tmp_path / "deep" / "c.parquet", [{"question": "third", "answer": "x #### 3"}])
    write_lines(tmp_path / "a.jsonl", [record()])
    (tmp_path / "README.md").write_text("x")
    assert prompts(read(tmp_path)[0]) == ["Q0", "second", "third"]


@pytest.mark.parametrize("layout", ["{0}.jsonl", "data/{0}-00000-of-00001.jsonl", "{0}/part.jsonl"])
def test_directory_with_splits(tmp_path: Path, layout: str) -> None:
    for number, split in enumerate(("train", "test")):
        write_lines(tmp_path / layout.format(split), [record(number)])
    assert prompts(read(tmp_path)[0]) == ["Q0"]
    assert prompts(read(tmp_path, split="test")[0]) == ["Q1"]
    with pytest.raises(TraceFormatError, match="no split 'dev'; the splits are test, train"):
        read(tmp_path, split="dev")


def test_saved_dataset(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([record(number) for number in range(5)])
    rows.select([3, 1]).save_to_disk(str(tmp_path / "one"))
    traces, _ = read(tmp_path / "one")
    assert prompts(traces) == ["Q3", "Q1"] and traces[1].source == f"{tmp_path / 'one'}:row 2"
    with pytest.raises(TraceFormatError, match="no split 'test'"):
        read(tmp_path / "one", split="test")

    datasets.DatasetDict({"test": rows.select([0]), "train": rows.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert prompts(read(tmp_path / "two")[0]) == ["Q1"]
    assert prompts(read(tmp_path / "two", split="test")[0]) == ["Q0"]
    with pytest.raises(TraceFormatError, match="no split 'dev'; the splits are test, train"):
        read(tmp_path / "two", split="dev")


def test_hub_id_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        asked.update(options, id=path)
        return datasets.Dataset.from_list([record(7)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    traces, _ = read("someone/traces", subset="math", split="test")
    assert asked == {"id": "someone/traces", "name": "math", "split": "test"}
    assert prompts(traces) == ["Q7"] and traces[0].source == "someone/traces:row 1"
    read("someone/traces")
    assert asked["split"] == "train"


def test_empty_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = datasets.Dataset.from_dict({"messages": []})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: empty)
    with pytest.raises(TraceFormatError, match="someone/traces: the data set holds no rows"):
        read("someone/traces")


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TraceFormatError) as caught:
        read("someone/traces")
    assert str(caught.value).startswith("someone/traces: no such file or directory, and it cannot be read from the")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["traces", "./a/b", "a/b/c", "../traces", "runs/traces.jsonl", "here/traces"])
def test_mistyped_path_never_reaches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(TraceFormatError, match="no such file or directory; expected a path"):
        read(source)


def test_local_sources_open_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    datasets.Dataset.from_list([record()]).save_to_disk(str(tmp_path / "saved"))
    read(tmp_path / "saved")
    read(write_lines(tmp_path / "traces.jsonl", [record()]))
    read("reasoning-gym:gsm_symbolic", num_traces=2)


def test_reading_files_loads_neither_pandas_nor_torch(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "traces.parquet", [record()])
    code = (
        "import sys; from limbeck.traces.sources import TraceConfig, read_traces;"
        f"read_traces(TraceConfig(source={str(path)!r}));"
        "print([name for name in ('pandas', 'datasets', 'torch', 'reasoning_gym') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_gsm_symbolic_is_seeded_and_complete() -> None:
    traces, counts = read("reasoning-gym:gsm_symbolic", num_traces=40, seed=3)
    assert (counts.read, counts.kept, len(traces)) == (40, 40, 40)
    assert all(trace.cot and "####" not in trace.cot and trace.correct for trace in traces)
    assert all(trace.answer == trace.reference for trace in traces)
    assert read("reasoning-gym:gsm_symbolic", num_traces=40, seed=3)[0] == traces
    assert prompts(read("reasoning-gym:gsm_symbolic", num_traces=40, seed=4)[0]) != prompts(traces)
    json.dumps([dict(trace.metadata) for trace in traces])


def test_gym_task_without_solutions() -> None:
    with pytest.raises(
        TraceFormatError, match="reasoning-gym:chain_sum seed 0 number 0: no thought: the task 'chain_sum'"
    ):
        read("reasoning-gym:chain_sum", num_traces=2)
    traces, counts = read("reasoning-gym:chain_sum", num_traces=2, on_bad="keep")
    assert [trace.cot for trace in traces] == [None, None] and counts.kept_bad == 2


def test_builtin_chain() -> None:
    traces, counts = read("builtin:chain", num_traces=6, chain_min_steps=3, chain_max_steps=4, seed=5)
    assert counts == ReadCounts(read=6, kept=6, skipped=0, kept_bad=0, reasons={})
    assert {trace.metadata["num_steps"] for trace in traces} <= {3, 4}
    assert read("builtin:chain", num_traces=6, chain_min_steps=3, chain_max_steps=4, seed=5)[0] == traces


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"source": " "}, "source: empty"),
        ({"source": "x.jsonl", "format": "sharegtp"}, "did you mean 'sharegpt'"),
        ({"source": "x.jsonl", "markers": ("<a>", " ")}, "markers"),
        ({"source": "x.jsonl", "markers": ("<a>", "<a>")}, "markers"),
        ({"source": "x.jsonl", "num_traces": 0}, "num_traces: 0"),
        ({"source": "builtin:chain"}, "num_traces: not set"),
        ({"source": "reasoning-gym:gsm_symbolic"}, "num_traces: not set"),
        ({"source": "builtin:chian", "num_traces": 1}, "did you mean 'builtin:chain'"),
        ({"source": "reasoning-gym:gsm_symbolc", "num_traces": 1}, "did you mean 'gsm_symbolic'"),
        ({"source": "reasoning-gym:composite", "num_traces": 1}, "cannot be made without settings"),
        ({"source": "builtin:chain", "num_traces": 1, "split": "train"}, "leave split out"),
        ({"source": "builtin:chain", "num_traces": 1, "chain_min_steps": 0}, "min_steps 0"),
    ],
)
def test_config_refuses(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_traces(TraceConfig(**config))


def test_split_of_a_single_file_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "traces.jsonl", [record()])
    with pytest.raises(ConfigError, match="is a single file; leave subset out"):
        read(path, subset="math")


def test_config_is_built_from_a_recipe() -> None:
    tree = {"source": "x.jsonl", "markers": ["[[", "]]"], "fields": {"q": "prompt"}, "on_bad": "keep"}
    config = build(TraceConfig, tree, "recipe.yaml")
    assert config.markers == ("[[", "]]") and config.fields == {"q": "prompt"}
    for change in ({"on_bad": "ignore"}, {"markers": ["[["]}, {"fields": ["q"]}, {"formats": "auto"}):
        with pytest.raises(LimbeckError) as caught:
            build(TraceConfig, tree | change, "recipe.yaml")
        assert str(caught.value).startswith("recipe.yaml: ") and "\n" not in str(caught.value)
