"""What a run says of the traces that it does not train on, before its first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import run_config

from limbeck.distill.data import Data, prepare
from limbeck.errors import ConfigError
from limbeck.models.tiny import symbol_tokenizer
from limbeck.traces.select import validation_size

TOKENIZER = symbol_tokenizer()


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    lines = [
        json.dumps({"prompt": prompt, "completion": f"<think>{cot}</think>4", "tags": ["x"]}) for prompt, cot in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def made(source: str, **changes: object) -> Data:
    base = {"traces.source": source, "traces.num_traces": None, "num_validation": 0}
    return prepare(run_config({**base, **changes}), TOKENIZER)


def told(source: str, **changes: object) -> list[str]:
    return list(made(source, **changes).notes)


@pytest.mark.parametrize(
    ("traces", "asked", "held_out"),
    [(9, None, 0), (10, None, 1), (50, None, 5), (640, None, 64), (5000, None, 64), (50, 0, 0), (50, 20, 20)],
)
def test_a_tenth_is_held_out_by_default(traces: int, asked: int | None, held_out: int) -> None:
    assert validation_size(traces, asked) == held_out


def test_what_is_held_out_is_told(tmp_path: Path) -> None:
    source = write(tmp_path / "t.jsonl", [(f"{n}+1", "2+2=4") for n in range(20)])
    data = made(source, num_validation=None)
    assert (len(data.train), len(data.validation)) == (18, 2)
    assert data.notes[-1] == "2 of 20 traces are held out for validation and not trained (num_validation)"
    few = made(source, num_validation=1)
    assert not any("held out" in note for note in few.notes), "5 % and less is no news"
    with pytest.raises(ConfigError, match="all 20 traces would be held out; lower num_validation"):
        made(source, num_validation=20)


def test_duplicates_and_columns_are_told(tmp_path: Path) -> None:
    source = write(tmp_path / "t.jsonl", [(f"{n % 5}+1", f"{n}") for n in range(20)])
    columns, duplicates = told(source)
    assert columns == "columns that are no part of the text, with the replies that have them: tags (20)"
    assert duplicates.startswith("15 of 20 traces are left out: 15 duplicate prompt; select.deduplicate false")
    assert len(told(source, **{"select.deduplicate": False})) == 1


def test_traces_without_a_loss_are_told(tmp_path: Path) -> None:
    rows = [(" ".join("1" * 40), "2") for _ in range(4)] + [(f"{n}+1", "2+2=4 " * 9) for n in range(6)]
    rows = [(f"{number} {prompt}", cot) for number, (prompt, cot) in enumerate(rows)]
    found = told(write(tmp_path / "t.jsonl", rows), **{"truncation.lead_fraction": 0.5})
    assert found[-1].startswith("4 of 10 traces have no supervised token left after the cut, so they give no loss")


def test_the_best_of_nothing_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "t.jsonl", [(f"{n}+1", "2+2=4") for n in range(6)])
    best = {"training.keep_best": "ce", "training.validate_every_steps": 1}
    with pytest.raises(ConfigError, match="keep_best needs held-out traces, and of 6 none is; set num_validation"):
        made(source, num_validation=None, **best)
