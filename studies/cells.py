"""Measurements that a study has finished, one a line, so that an interrupted study goes on where it stopped."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import torch

from limbeck.config import config_hash
from limbeck.errors import CheckpointError
from limbeck.progress import track

Cell = TypeVar("Cell", bound=tuple)


def measure_cells(
    measure: Callable[[Any, Cell], dict[str, Any]],
    config: Any,
    cells: Sequence[Cell],
    path: Path,
    description: str,
    num_workers: int,
) -> dict[Cell, dict[str, Any]]:
    """`measure(config, cell)` for every cell that the file does not hold yet; all results by cell.

    Args:
      measure: a function of a module, since it is sent to other processes.
      cells: tuples of JSON values; the longest first keeps the workers busy to the end.
      path: where results are appended; its first line names the config that they belong to.
      num_workers: processes, one thread each; 1 stays in this process.
    Raises: CheckpointError when the file belongs to another config.
    """
    results = _read(path, config)
    left = [cell for cell in cells if cell not in results]
    with path.open("a", encoding="utf-8") as file:
        for cell, result in track(_each(measure, config, left, num_workers), description, total=len(left)):
            results[cell] = result
            file.write(json.dumps([list(cell), result]) + "\n")
            file.flush()
    return {cell: results[cell] for cell in cells}


def _each(measure: Callable, config: Any, cells: Sequence[Cell], num_workers: int) -> Any:
    jobs = [(measure, config, cell) for cell in cells]
    if num_workers <= 1 or len(jobs) < 2:
        yield from map(_work, jobs)
        return
    with get_context("spawn").Pool(min(num_workers, len(jobs)), initializer=_begin_worker) as pool:
        yield from pool.imap_unordered(_work, jobs)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    # A killed parent leaves its jobs in the pipe: without this its workers would go on through them.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: tuple[Callable, Any, Cell]) -> tuple[Cell, dict[str, Any]]:
    measure, config, cell = job
    return cell, measure(config, cell)


def _read(path: Path, config: Any) -> dict:
    belongs_to = config_hash(config)
    if not path.exists():
        path.write_text(json.dumps({"config_hash": belongs_to}) + "\n", encoding="utf-8")
        return {}
    # The last line may be half-written when the run was killed: it is cut off and its cell measured again.
    complete, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
    if rest:
        path.write_text(complete + "\n", encoding="utf-8")
    first, *lines = [json.loads(line) for line in complete.splitlines()] or [{}]
    if first.get("config_hash") != belongs_to:
        raise CheckpointError(f"{path.parent}: begun with another config. Choose another output or leave out --resume.")
    return {tuple(cell): result for cell, result in lines}
