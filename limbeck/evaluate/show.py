"""`limbeck evaluate show`: what a model was asked, what it wrote, and how that was judged, wrong ones first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from limbeck.config import checked
from limbeck.errors import CheckpointError, ConfigError
from limbeck.evaluate.answers import Verdict
from limbeck.evaluate.run import RESULTS_FILE

ORDER = (Verdict.WRONG.value, Verdict.UNKNOWN.value, Verdict.RIGHT.value)
STYLES = {Verdict.WRONG.value: "red", Verdict.UNKNOWN.value: "yellow", Verdict.RIGHT.value: "green"}
_FIELDS = ("prompt", "reference", "outputs", "answers", "verdicts")


@checked
class ShowResultsConfig:
    """Which results are shown."""

    run: Path
    """Directory that `limbeck evaluate` wrote, or its results.jsonl."""
    verdict: Literal["all", "wrong", "unknown", "right"] = "all"
    """Show outputs of this verdict only."""
    num: int = 10
    """How many outputs are shown, >= 1."""
    start: int = 0
    """Number of the first one, counted from 0 in the order of showing."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.start < 0:
            raise ConfigError(f"num {self.num}, start {self.start}; expected num of 1 or more and start of 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One output and how it was judged."""

    problem: int
    """Number of the problem, counted from 0."""
    sample: int
    prompt: str
    output: str
    answer: str | None
    """The extracted answer; None where there is none."""
    reference: str | None
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Some judged outputs, and how many there are of each verdict."""

    outputs: Sequence[Judged]
    counts: Mapping[str, int]
    start: int

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"counts": dict(self.counts), "outputs": [asdict(output) for output in self.outputs]}


def run(config: ShowResultsConfig) -> Shown:
    """The outputs that are asked for, wrong ones first, then unknown ones, each in the order of the problems.

    Raises: CheckpointError where there are no results, or they are damaged or without texts; ConfigError when `start`
      is beyond the last.
    """
    outputs = sorted(read_results(config.run), key=lambda output: ORDER.index(output.verdict))
    counts = {verdict: sum(output.verdict == verdict for output in outputs) for verdict in ORDER}
    chosen = [output for output in outputs if config.verdict in ("all", output.verdict)]
    if config.start >= len(chosen):
        raise ConfigError(f"start: {config.start}; {config.run} has {len(chosen)} such outputs, counted from 0.")
    return Shown(outputs=chosen[config.start : config.start + config.num], counts=counts, start=config.start)


def read_results(path: Path) -> list[Judged]:
    """Every output of an evaluation, in the order of problems and samples.

    Raises: CheckpointError.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path}: no {RESULTS_FILE}; name a directory that `limbeck evaluate` wrote on problems.")
    found: list[Judged] = []
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            found += _outputs(number, json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:100]
        raise CheckpointError(
            f"{file}: line {number + 1} is no result with its texts ({missing}); evaluate again."
        ) from error
    return found


def print_results(shown: Shown) -> None:
    """The outputs for people, on standard output."""
    console = Console()
    for number, output in enumerate(shown.outputs, start=shown.start):
        style = STYLES[output.verdict]
        heading = f"{number}: {output.verdict} (problem {output.problem}, sample {output.sample})"
        console.print(Text(heading, style=f"bold {style}"), soft_wrap=True)
        for name, text in (("prompt", output.prompt), ("output", output.output)):
            console.print(Text(f"[{name}] ", style="bold") + Text(printable(text)), soft_wrap=True)
        answer = "none found" if output.answer is None else output.answer
        console.print(Text(f"[answer] {printable(answer)}", style=style), soft_wrap=True)
        console.print(Text(f"[reference] {printable(str(output.reference))}\n"), soft_wrap=True)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in shown.counts.items())
    console.print(f"{len(shown.outputs)} outputs shown of {sum(shown.counts.values())}: {counts}", highlight=False)


def printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _outputs(number: int, row: Mapping[str, Any]) -> list[Judged]:
    prompt, reference, outputs, answers, verdicts = (row[name] for name in _FIELDS)
    return [
        Judged(
            problem=number,
            sample=sample,
            prompt=str(prompt),
            output=str(output),
            answer=answer,
            reference=reference,
            verdict=Verdict(verdict).value,
        )
        for sample, (output, answer, verdict) in enumerate(zip(outputs, answers, verdicts, strict=True))
    ]
