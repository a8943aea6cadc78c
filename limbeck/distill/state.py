"""What a run needs to go on with the same bits: weights, optimizer state, rollouts in use, ledger and steps done.

The order of the traces and the dropout are functions of (seed, step), so there is no generator state to keep. Tensors
go to safetensors, numbers to JSON; those of a model in parts go to one file a process (`parts`), and either kind goes
on on any number of processes. A state is written under a temporary name and renamed, and older ones are deleted only
then, so a kill at any moment leaves a whole one.
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
from limbeck.progress import say

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


class State(NamedTuple):
    """What a run goes on from, in memory."""

    step: int
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    """Of the optimizer."""
    record: dict[str, Any]
    """Everything else, JSON-ready."""
    in_parts: bool
    """Whether every process holds a part."""


def take_state(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    cost: Mapping[str, Any],
    identity: str,
    rollouts: Mapping[str, Any] | None = None,
    share: float | None = None,
    *,
    copies: bool = False,
) -> State:
    """The state after `step` steps; `cost` is the ledger's, over all ranks.

    Args:
      copies: on the CPU, in memory of its own, so that training may go on; a model in parts is never copied.
    """
    in_parts = is_sharded(model)
    weights, whole = _trained(model), optimizer.state_dict()
    tensors, numbers = _flatten(whole["state"])
    if copies and not in_parts:
        weights, tensors = (
            {name: tensor.to("cpu", copy=True) for name, tensor in own.items()} for own in (weights, tensors)
        )
    record = {
        "step": step,
        "identity": identity,
        "optimizer": numbers,
        "groups": [{name: group[name] for name in COUNTERS if name in group} for group in whole["param_groups"]],
        "ledger": dict(cost),
        "rollouts": rollouts,
        "share": share,
    }
    return State(step, weights, tensors, record, in_parts)


def write_state(directory: Path, state: State, keep: int = 1) -> None:
    """Write a state below `directory`, where the last `keep` stay.

    One process writes a model that it holds whole; all of them write one in parts, to a directory that all can see.
    """
    final = directory / f"{STATE_PREFIX}{state.step:08d}"
    partial = directory / "state.partial"
    is_first = not state.in_parts or dist.get_rank() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if state.in_parts:
        dist.barrier()
        save_parts(partial, state.weights | state.tensors)
        dist.barrier()
    else:
        _save_whole(state.weights, partial / WEIGHTS)
        _save_whole(state.tensors, partial / "optimizer.safetensors")
    if not is_first:
        return
    write_json(partial / "state.json", state.record)
    # Of later steps are those that could not be read, and were passed over.
    older = [path for path in states_in(directory) if path.name < final.name]
    passed_over = [path for path in states_in(directory) if path.name >= final.name]
    for path in passed_over:
        shutil.rmtree(path)
    partial.rename(final)
    for path in older[: max(0, len(older) + 1 - keep)]:
        shutil.rmtree(path)


def states_in(directory: Path) -> list[Path]:
    """The states below a directory, the oldest first."""
    return sorted(directory.glob(STATE_PREFIX + "*"))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _save_whole(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_state(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ledger: Ledger, identity: str
) -> Resumed | None:
    """Restore the newest whole state below `directory`, in place; None when there is none.

    One that is damaged is passed over where an older one was kept, and told; the run ends with the same bits.

    Raises: CheckpointError when the oldest is damaged too, or one belongs to a run of another identity (config, start,
      traces).
    """
    states = states_in(directory)
    for path in reversed(states):
        try:
            return _load(path, model, optimizer, ledger, identity)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if isinstance(error, CheckpointError):
                raise
            what = " ".join(str(error).split())[:200]
            if path == states[0]:
                raise CheckpointError(
                    f"{path}: damaged, or of a limbeck that shaped the model otherwise ({what}); --overwrite drops it."
                ) from error
            say(f"note: {path}: damaged ({what}); going on from the state before it.")
    return None


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ledger: Ledger, identity: str) -> Resumed:
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
