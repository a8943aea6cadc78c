"""Where a run's numbers go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow or Trackio.

A tracker is asked for by `training.track`; it is given every line of metrics.jsonl when that is written, and the
speed, which the file leaves out so that a resumed run has the same lines. Each needs its own package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from limbeck.errors import ConfigError

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Tracker(Protocol):
    """Takes the numbers of one run, step by step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers by name, at a step; steps grow."""

    def close(self) -> None:
        """Nothing more comes."""


def open_tracker(name: TrackerName, run: str, directory: Path, config: Mapping[str, Any]) -> Tracker:
    """A tracker for a run.

    Args:
      run: what it is called there.
      directory: for trackers that write files.
      config: of the run, plain values.
    Raises: ConfigError when its package is not installed.
    """
    try:
        return _OPEN[name](run, directory, config)
    except ImportError as error:
        raise ConfigError(f"training.track {name}: {error.name} is not installed; pip install {error.name}.") from error


class _Calls:
    """A tracker of two functions."""

    def __init__(self, log: Callable[[int, Mapping[str, float]], object], close: Callable[[], object]) -> None:
        self._log, self._close = log, close

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._log(step, numbers)

    def close(self) -> None:
        self._close()


def _tensorboard(run: str, directory: Path, config: Mapping[str, Any]) -> Tracker:
    importlib.import_module("tensorboard")  # torch's own message does not name it
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(directory / "tensorboard"))

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return _Calls(log, writer.close)


def _wandb(run: str, directory: Path, config: Mapping[str, Any]) -> Tracker:
    # Trackio has wandb's functions.
    return _like_wandb("wandb", run, config)


def _trackio(run: str, directory: Path, config: Mapping[str, Any]) -> Tracker:
    return _like_wandb("trackio", run, config)


def _like_wandb(package: str, run: str, config: Mapping[str, Any]) -> Tracker:
    module = importlib.import_module(package)
    module.init(project="limbeck", name=run, config=dict(config))
    return _Calls(lambda step, numbers: module.log(dict(numbers), step=step), module.finish)


def _mlflow(run: str, directory: Path, config: Mapping[str, Any]) -> Tracker:
    module = importlib.import_module("mlflow")
    module.start_run(run_name=run)
    module.log_dict(dict(config), "config.json")
    return _Calls(lambda step, numbers: module.log_metrics(dict(numbers), step=step), module.end_run)


_OPEN: dict[str, Callable[[str, Path, Mapping[str, Any]], Tracker]] = dict(
    zip(get_args(TrackerName), (_tensorboard, _wandb, _mlflow, _trackio), strict=True)
)
