"""What a run needs to go on with the same bits: weights, optimizer state, rollouts in use, ledger and steps done.

The order of the traces and the dropout are functions of (seed, step), so there is no generator state to keep. Tensors
go to safetensors, numbers to JSON; those of a model in parts go to one file a process (`parts`), and either kind goes
on on any number of processes. A state is written under a temporary name and renamed, and the one before it is deleted
only then, so a kill at any moment leaves a whole one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.checkpoint import STATE_PREFIX, write_json
from limbeck.distill.parts import kinds_in, read_parts, save_parts
from limbeck.errors import CheckpointError
from limbeck.ledger import Ledger
from limbeck.models.sharded import is_sharded
from limbeck.optim.settings import COUNTERS

WEIGHTS = "weights.safetensors"
"""File of a state in one piece."""


class Resumed(NamedTuple):
    """Where an interrupted run goes on."""

    step: int
    """Steps already done."""
    rollouts: dict[str, Any] | None
    """The rollouts in use (`Rollouts.state`)."""
    share: float | None
    """Share of whole traces that a controller has raised (`StopControl.share`)."""


def save_state(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    cost: Mapping[str, Any],
    identity: str,
    rollouts: Mapping[str, Any] | None = None,
    share: float | None = None,
) -> None:
    """Write the state after `step` steps below `directory`; `cost` is the ledger's, over all ranks.

    One process writes a model that it holds whole; all of them write one in parts, to a directory that all can see.
    """
    final = directory / f"{STATE_PREFIX}{step:08d}"
    partial = directory / "state.partial"
    in_parts = is_sharded(model)
    is_first = not in_parts or dist.get_rank() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    weights = _trained(model)
    whole = optimizer.state_dict()
    tensors, numbers = _flatten(whole["state"])
    if in_parts:
        dist.barrier()
        save_parts(partial, weights | tensors)
        dist.barrier()
    else:
        _save_whole(weights, partial / WEIGHTS)
        _save_whole(tensors, partial / "optimizer.safetensors")
    if not is_first:
        return
    groups = [{name: group[name] for name in COUNTERS if name in group} for group in whole["param_groups"]]
    write_json(
        partial / "state.json",
        {
            "step": step,
            "identity": identity,
            "optimizer": numbers,
            "groups": groups,
            "ledger": dict(cost),
            "rollouts": rollouts,
            "share": share,
        },
    )
    older = list(directory.glob(STATE_PREFIX + "*"))
    partial.rename(final)
    for path in older:
        shutil.rmtree(path)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _save_whole(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_state(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ledger: Ledger, identity: str
) -> Resumed | None:
    """Restore the newest whole state below `directory`, in place; None when there is none.

    Raises: CheckpointError when it is damaged or belongs to a run of another identity (config, start, traces).
    """
    states = sorted(directory.glob(STATE_PREFIX + "*"))
    if not states:
        return None
    path = states[-1]
    try:
        tree = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if tree["identity"] != identity:
            raise CheckpointError(
                f"{path}: this state belongs to another config or other traces; use the same ones or drop --resume."
            )
        resumed = Resumed(int(tree["step"]), tree["rollouts"], tree.get("share"))
        if is_sharded(model) or not (path / WEIGHTS).exists():
            _restore_parts(path, model, optimizer, tree["optimizer"])
        else:
            entries = _unflatten(load_file(path / "optimizer.safetensors"), tree["optimizer"])
            _restore(model, optimizer, load_file(path / WEIGHTS), entries)
        for group, counters in zip(optimizer.param_groups, tree["groups"], strict=True):
            group.update(counters)
        ledger.restore(tree["ledger"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        what = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: damaged, or of a limbeck that shaped the model otherwise ({what}); --overwrite drops it."
        ) from error
    return resumed


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    entries: dict[int, dict[str, Any]],
) -> None:
    trainable = _trained(model)
    if set(trainable) != set(weights):
        raise ValueError(f"its weights are not the student's: {sorted(set(trainable) ^ set(weights))[:3]}")
    for name, parameter in trainable.items():
        parameter.copy_(weights[name])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})


def _restore_parts(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, numbers: dict[str, Any]) -> None:
    """Each process's part of a state in parts, or in one piece, into a model of either kind."""
    weights = _trained(model)
    kinds = kinds_in(path)
    if missing := sorted(weights.keys() - kinds.keys()):
        raise ValueError(f"it has no {missing[0]}")
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors = {}
    for name, (size, dtype) in kinds.items():
        if name not in weights:
            # What an optimizer keeps of a parameter has its shape, or is a number.
            like = params[int(name.partition(".")[0])].detach()
            tensors[name] = torch.zeros_like(like, dtype=dtype) if len(size) else torch.zeros((), dtype=dtype)
    read_parts(path, weights | tensors)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": _unflatten(tensors, numbers)})


def _flatten(state: dict[int, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, numbers = {}, {}
    for index, entries in state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach()
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def _unflatten(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return state
