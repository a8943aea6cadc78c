"""What `limbeck evaluate show` prints of an evaluation, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.cli import main
from limbeck.errors import CheckpointError, ConfigError
from limbeck.evaluate.show import ShowResultsConfig, read_results, run


def row(prompt: str, *samples: tuple[str, str | None, str], reference: str | None = "4") -> dict[str, Any]:
    outputs, answers, verdicts = zip(*samples, strict=True)
    return {
        "key": prompt,
        "prompt": prompt,
        "reference": reference,
        "outputs": outputs,
        "answers": answers,
        "verdicts": verdicts,
    }


ROWS = [
    row("2+2?", ("I say 4", "4", "right"), ("I say 5", "5", "wrong")),
    row("1+3?", ("\x1b[31mno idea", None, "wrong"), ("four or so", "four or so", "unknown")),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    lines = "".join(json.dumps(entry) + "\n" for entry in ROWS)
    (tmp_path / "results.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_wrong_ones_come_first(results: Path) -> None:
    shown = run(ShowResultsConfig(run=results))
    assert [(one.verdict, one.problem, one.sample) for one in shown.outputs] == [
        ("wrong", 0, 1),
        ("wrong", 1, 0),
        ("unknown", 1, 1),
        ("right", 0, 0),
    ]
    assert shown.counts == {"wrong": 2, "unknown": 1, "right": 1}
    assert shown.outputs[0].output == "I say 5" and shown.outputs[0].answer == "5"
    some = run(ShowResultsConfig(run=results / "results.jsonl", verdict="wrong", start=1, num=5))
    assert [one.output for one in some.outputs] == ["\x1b[31mno idea"]


def test_the_command_prints_every_part(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "show", str(results), "--num", "2"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    parts = ("[prompt] 2+2?", "[output] I say 5", "[answer] 5", "[reference] 4", "[answer] none found", "0: wrong")
    assert all(part in printed for part in parts)
    assert "\x1b[31m" not in printed and "2 outputs shown of 4: 2 wrong, 1 unknown, 1 right" in printed
    with pytest.raises(SystemExit):
        main(["evaluate", "show", str(results), "--json"])
    assert json.loads(capsys.readouterr().out)["counts"] == {"wrong": 2, "unknown": 1, "right": 1}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"prompt": "x"}',
        "[]",
        "3",
        '{"prompt": "x", "reference": "4", "outputs": ["a"], "answers": [], "verdicts": []}',
    ],
)
def test_damaged_results_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.jsonl").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="line 1 is no result with its texts") as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no results\.jsonl; name a directory that `limbeck evaluate` wrote"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"start: 4; .* has 4 such outputs"):
        run(ShowResultsConfig(run=results, start=4))
    with pytest.raises(ConfigError, match="expected num of 1 or more"):
        ShowResultsConfig(run=results, num=0)
