"""The same run on several gloo processes and on one, and what differs between them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from tiny_runs import join_all, metrics_of, start, weights_of

from limbeck.config import build, to_dict
from limbeck.distill import train
from limbeck.distill.config import DistillConfig
from limbeck.stage import How

EXACT = 1e-6
"""Largest difference between runs on different numbers of processes, in float32."""


def on_ranks(processes: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(*arguments)` in each of several processes, started as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_all([start(_as_rank, rank, processes, port, work, arguments) for rank in range(processes)])


def _as_rank(rank: int, processes: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    work(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


class Stopped(BaseException):
    """Stands for a kill between two steps."""


def distill(config: DistillConfig, out: Path, processes: int, stop: int | None = None, resume: bool = False) -> Path:
    """Train on so many processes, from the last state on with `resume`, and break off after `stop` steps."""
    on_ranks(processes, _distill, to_dict(config), out, stop, resume)
    return out


def _distill(tree: dict[str, Any], out: Path, stop: int | None, resume: bool) -> None:
    whole_step = train._step

    def step(setup: Any, number: int) -> dict[str, Any]:
        if number == stop:
            raise Stopped
        return whole_step(setup, number)

    train._step = step
    try:
        train.run(build(DistillConfig, tree), out, how=How(resume=resume))
    except Stopped:
        assert stop is not None


def torchrun(config: DistillConfig, out: Path, processes: int, *options: str) -> Path:
    """`torchrun --nproc-per-node PROCESSES -m limbeck distill RECIPE --out OUT`."""
    recipe = out.with_name(out.name + ".yaml")
    recipe.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "limbeck", "distill", str(recipe), "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return out


def loss_difference(one: Path, other: Path) -> float:
    """Largest difference between two runs' lines of metrics.jsonl, over steps and columns."""
    mine, theirs = metrics_of(one), metrics_of(other)
    assert [line.keys() for line in mine] == [line.keys() for line in theirs]
    return max(abs(a[name] - b[name]) for a, b in zip(mine, theirs, strict=True) for name in a if a[name] is not None)


def weight_difference(one: Path, other: Path) -> float:
    """Largest difference between two runs' weights."""
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    return max(float((weight - theirs[name]).abs().max()) for name, weight in mine.items())


def assert_same(one: Path, other: Path, tolerance: float = EXACT) -> None:
    assert loss_difference(one, other) <= tolerance
    assert weight_difference(one, other) <= tolerance
