"""The frame of all stages that train: processes, threads, random numbers, and a directory that gets its name last."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from limbeck.checkpoint import output_directory
from limbeck.distill.config import TrainingConfig
from limbeck.distill.guard import BEST_PREFIX
from limbeck.distill.parallel import Ranks, join, wait
from limbeck.progress import hushed
from limbeck.runner.threads import threads
from limbeck.stage import How


@contextmanager
def training_job(training: TrainingConfig, out: Path, how: How) -> Iterator[tuple[Ranks, Path]]:
    """This process among its peers, and the directory that all of them work in; the first one makes it `out`.

    Args:
      training: says how many threads there are and how processes work together.
      out, how: as for every stage.
    """
    ranks = join(training.parallel.tensor_parallel_size, training.parallel.timeout_minutes)
    # Steps seed torch's own generators; behind the job they go on as if it had not been.
    generators = [ranks.device] if ranks.device.type == "cuda" else []
    with threads(training.num_threads), hushed(not ranks.is_first), torch.random.fork_rng(devices=generators):
        if ranks.is_first:
            with output_directory(out, overwrite=how.overwrite, resume=how.resume) as working:
                yield ranks, working
                for state in working.glob("state*"):
                    shutil.rmtree(state)
                for best in working.glob(BEST_PREFIX + "*"):
                    best.unlink()
        else:
            yield ranks, out.with_name(out.name + ".partial")
        wait(ranks)
