"""The rows of a benchmark: from a local copy, or from the hub where the user says so."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from limbeck.config import checked
from limbeck.errors import ConfigError, TraceFormatError
from limbeck.evaluate.benchmarks import BENCHMARKS, Benchmark, problems_from
from limbeck.evaluate.tasks import Task
from limbeck.traces.directory import trace_files
from limbeck.traces.files import kind_of, read_file
from limbeck.traces.hub import is_saved_dataset, read_hub, read_saved

HUB = "hub"
HARNESS_SEED = 1234


@checked
class BenchmarkConfig:
    """A public benchmark by name, with prompts, shots and filters as lm-evaluation-harness has them."""

    name: Literal["gsm8k", "math-500", "aime24", "aime25", "mmlu", "gpqa", "ifeval"]
    """Which benchmark."""
    data: str | None = None
    """Its rows, needed: a file (.jsonl, .json, .parquet, .csv) or directory on disk, or `hub` to load them from the
    Hugging Face hub, the only case in which the network is used."""
    num_shots: int | None = None
    """Worked examples in front of each problem; null takes as many as the harness does."""
    num_problems: int | None = None
    """The first so many problems; null takes all."""
    seed: int = HARNESS_SEED
    """Seed of the draw of shots and of the order of choices."""

    def __post_init__(self) -> None:
        if self.data is None:
            raise ConfigError(
                f"benchmark {self.name} needs its rows: set benchmark.data to a local copy, or to {HUB} to load "
                f"{BENCHMARKS[self.name].hub} from the Hugging Face hub"
            )
        if (self.num_shots or 0) < 0 or (self.num_problems is not None and self.num_problems < 1):
            raise ConfigError(
                f"benchmark: num_shots {self.num_shots}, num_problems {self.num_problems}; expected num_shots of 0 or "
                "more, num_problems of 1 or more"
            )
        if self.name == "ifeval" and importlib.util.find_spec("lm_eval") is None:
            raise ConfigError(
                "benchmark ifeval is scored by lm_eval, which is not installed: pip install lm-eval[ifeval]"
            )


def benchmark_task(config: BenchmarkConfig) -> Task:
    """The problems of a benchmark.

    Raises: TraceFormatError when the data cannot be read or is another data set's.
    """
    assert config.data is not None
    benchmark = BENCHMARKS[config.name]
    num_shots = benchmark.num_shots if config.num_shots is None else config.num_shots
    rows = list(_rows(config.data, benchmark, benchmark.split))[: config.num_problems]
    shots = []
    if num_shots and benchmark.shot_split is not None:
        shots = list(_rows(config.data, benchmark, benchmark.shot_split))
    try:
        problems = problems_from(benchmark, rows, shots, num_shots, config.seed)
    except TraceFormatError as error:
        raise TraceFormatError(f"benchmark {config.name}: {config.data}: {error}") from error
    return Task(name=config.name, problems=tuple(problems))


def _rows(data: str, benchmark: Benchmark, split: str) -> Iterator[Mapping[str, Any]]:
    """The rows of one split."""
    path = Path(data)
    found: Iterator[Any]
    if data == HUB and not path.exists():
        found = (located.record for located in read_hub(benchmark.hub, benchmark.subset, split))
    elif path.is_file():
        if benchmark.shot_split == split:
            raise TraceFormatError(
                f"{data}: shots are drawn from the split {split}; give a directory with both, or set num_shots 0."
            )
        found = _file_rows(path)
    elif path.is_dir():
        found = _directory_rows(path, benchmark, split)
    else:
        raise TraceFormatError(f"{data}: no such file or directory; `hub` loads {benchmark.hub} from the hub.")
    for number, row in enumerate(found, start=1):
        if not isinstance(row, Mapping):
            raise TraceFormatError(f"{data}: row {number} of {split} is {type(row).__name__}, expected an object.")
        yield row


def _directory_rows(path: Path, benchmark: Benchmark, split: str) -> Iterator[Any]:
    if is_saved_dataset(path):
        yield from (located.record for located in read_saved(path, split, None))
        return
    tables = sorted(file for file in path.rglob("*.csv") if benchmark.subset in (None, file.stem) or split in file.stem)
    if tables:
        for table in tables:
            yield from _file_rows(table)
        return
    subset = benchmark.subset if (path / str(benchmark.subset)).is_dir() else None
    for file in _split_files(path, split, subset):
        yield from _file_rows(file)


def _split_files(path: Path, split: str, subset: str | None) -> list[Path]:
    files = trace_files(path, None, subset).files
    try:
        return trace_files(path, split, subset).files
    except TraceFormatError:
        # Files whose names tell no split hold the only one that there is.
        if split == "train" or len(files) != 1:
            raise
        return files


def _file_rows(path: Path) -> Iterator[Any]:
    if path.suffix.lower() == ".csv" and kind_of(path) is None:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file)
        except (UnicodeDecodeError, csv.Error) as error:
            raise TraceFormatError(f"{path}: damaged table: {' '.join(str(error).split())[:160]}.") from error
        return
    for located in read_file(path):
        if located.problem is not None:
            raise TraceFormatError(f"{located.where}: {located.problem}.")
        yield located.record
