"""Generated broken trace files: reading gives traces, or one line that says what is wrong; never anything else."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from limbeck.errors import LimbeckError
from limbeck.traces.importing import ImportConfig
from limbeck.traces.importing import run as import_traces
from limbeck.traces.sources import TraceConfig, read_problems, read_traces

ODD: list[Any] = [
    None,
    True,
    0,
    -1.5,
    10**40,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\x00",
    "\ud800",
    "<think>",
    "</think>",
    "<think>a</think>",
    "#### ",
    "<|im_start|>",
    "<|im_start|>assistant\n",
    "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<think>",
    "<|begin_of_solution|>",
    "[",
    "[1, 2]",
    '[{"role": "user"}]',
    "[{'role': 'user', 'content': None}]",
    "{}",
    "[" * 3000,
    "\\boxed{" * 50,
    b"\xff\xfe",
    [],
    {},
    [[]],
    [None],
    [{}],
    [{"type": "text"}],
    [{"type": "thinking", "thinking": {}}],
    [{"type": "text", "text": ["x"]}],
    {"role": "user"},
    {"ground_truth": {"ground_truth": 1}},
    ["a", "b"],
    {"0": "x", "1": "y"},
]
KEYS = [
    *("messages", "conversations", "contents", "prompt", "question", "problem", "instruction", "input", "completion"),
    *(
        "response",
        "output",
        "answer",
        "solution",
        "reference",
        "reward_model",
        "correct",
        "cot",
        "reasoning",
        "thinking",
    ),
    *("generations", "correctness_llama", "text", "metadata", "limbeck_trace", "system", "data", "role", "content"),
    *("from", "value", "weight", "train", "tool_calls", "parts", "cot_closed", "source", "Question", "0", ""),
]
WHOLE: list[Callable[[], Any]] = [
    lambda: {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>t</think>a"}]},
    lambda: {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<think>t</think>a"}]},
    lambda: {"prompt": "q", "completion": "<think>t</think>a", "answer": "a", "correct": 1},
    lambda: {"instruction": "q", "input": "x", "output": "<think>t</think>a"},
    lambda: {"question": "q", "cot": "t", "answer": "a", "reference": ["a"]},
    lambda: {"problem": "q", "generations": ["<think>t</think>a", "b"], "correctness_llama": [True, None]},
    lambda: {"question": "q", "answer": "t\n#### a"},
    lambda: {"question": "q", "answer": "a", "metadata": {"answer_cot": "t #### a"}},
    lambda: {"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>t</think>a<|im_end|>"},
    lambda: {"limbeck_trace": 1, "messages": [{"role": "user", "content": "q"}], "cot": "t", "answer": "a"},
    lambda: {"data": [{"prompt": "q", "completion": "<think>t</think>a"}]},
]


def broken(value: Any, chance: random.Random, depth: int = 0) -> Any:
    """A value with something in it exchanged, renamed, dropped, doubled or nested."""
    if depth > 5 or chance.random() < 0.25:
        return chance.choice(ODD)
    if isinstance(value, dict) and value:
        found = dict(value)
        key = chance.choice(list(found))
        act = chance.randrange(5)
        if act == 0:
            found[key] = broken(found[key], chance, depth + 1)
        elif act == 1:
            found[chance.choice(KEYS)] = found.pop(key)
        elif act == 2:
            del found[key]
        elif act == 3:
            found[chance.choice(KEYS)] = chance.choice(ODD)
        else:
            found[key] = chance.choice([json.dumps, str, lambda x: [x], lambda x: {key: x}])(plain(found[key]))
        return found
    if isinstance(value, list) and value:
        place = chance.randrange(len(value))
        choices = (
            value[:place],
            [*value, value[place]],
            [*value[:place], broken(value[place], chance, depth + 1)],
            value[::-1],
        )
        return chance.choice(choices)
    return chance.choice(ODD)


def plain(value: Any) -> Any:
    """The value as JSON can have it."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def files(chance: random.Random, directory: Path) -> Iterator[Path]:
    """A broken file, written in one of the ways in which files are."""
    records: list[Any] = [chance.choice(WHOLE)() for _ in range(chance.randrange(1, 4))]
    for place in range(len(records)):
        for _ in range(chance.randrange(3)):
            records[place] = broken(records[place], chance)
    data = "\n".join(json.dumps(plain(entry)) for entry in records).encode()
    way = chance.randrange(8)
    name = chance.choice(["t.jsonl", "t.json", "t.NDJSON"])
    if way == 0:
        data = json.dumps(plain(records), indent=chance.choice([None, 1])).encode()
    elif way == 1:
        data = "\n".join(json.dumps(plain(entry), indent=2) for entry in records).encode()
    elif way == 2:
        cut = chance.randrange(1 + len(data))
        data = data[:cut] + bytes([chance.randrange(256)]) * chance.randrange(3) + data[cut + chance.randrange(4) :]
    elif way == 3:
        name, data = "t.jsonl.gz", gzip.compress(data)[: chance.choice([-1, 20, 10**6])]
    elif way == 4:
        data = data.decode("utf-8", "replace").encode(chance.choice(["utf-16", "utf-8-sig", "utf-32"]))
    elif way == 5:
        path = directory / "t.parquet"
        try:
            rows = [entry if isinstance(entry, dict) else {"prompt": "x"} for entry in records]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            content = path.read_bytes()
            path.write_bytes(content[: chance.choice([len(content), len(content) // 2, len(content) - 3])])
            yield path
            return
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError):
            path.unlink(missing_ok=True)  # A table cannot hold these records.
    elif way == 6:
        (directory / "data").mkdir()
        (directory / "data" / chance.choice(["a_test.jsonl", "train.json", "x.json"])).write_bytes(data)
        (directory / "data" / "b.csv").write_text("a,b")
        yield directory / "data"
        return
    (directory / name).write_bytes(data)
    yield directory / name


def check(seed: int, directory: Path) -> None:
    """Read one broken file in every way."""
    chance = random.Random(seed)
    for path in files(chance, directory):
        for on_bad in ("error", "skip", "keep"):
            for read in (read_traces, read_problems):
                try:
                    traces, counts = read(TraceConfig(source=str(path), on_bad=on_bad))  # type: ignore[arg-type]
                except LimbeckError as error:
                    assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 1500, (
                        seed,
                        str(error),
                    )
                    continue
                assert len(traces) == counts.kept == counts.read - counts.skipped, seed
                assert all("\n" not in line.replace(str(path), "") for line in counts.lines()), seed
                assert all(trace.messages[-1]["role"] == "user" for trace in traces), seed
        try:
            import_traces(ImportConfig(traces=TraceConfig(source=str(path), on_bad="keep")), directory / "out")
        except LimbeckError:
            continue
        again, _ = read_traces(TraceConfig(source=str(directory / "out"), on_bad="keep"))
        assert again, seed


@pytest.mark.parametrize("seed", range(120))
def test_broken_files_never_raise_anything_else(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(30))
def test_many_broken_files(block: int, tmp_path: Path) -> None:
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        (tmp_path / str(seed)).mkdir()
        check(seed, tmp_path / str(seed))
