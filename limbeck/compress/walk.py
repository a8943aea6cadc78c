"""The walk: block by block over a model, each behind the compressed ones before it.

    embed -> for every block: load, pass through, stop at each group of linear layers, solve, go on -> write, drop

A block is passed once. At a stop the input of the group has been computed by the layers before it as they are now, so
the attention's output is solved behind the solved query, key and value, and `down` behind all others; the next block
gets what this one now gives. With dense targets a second, untouched copy of the block runs along on its own inputs,
and a group aims at what the dense model's would have given: later layers repair earlier damage.

What is done to the groups is a `Method`. Blocks are written as they are done, with what enters the next one, so a
killed walk goes on and ends with the same bits.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.checkpoint import STATE_PREFIX, write_json
from limbeck.compress.blocks import Blocks, Group, fold_into_norm, groups_of, run_block
from limbeck.compress.calibrate import Rows
from limbeck.compress.problem import LayerProblem, Moments, layer_error, retarget
from limbeck.compress.weights import ShardWriter
from limbeck.errors import CheckpointError
from limbeck.ledger import release_memory
from limbeck.models.experts import fused_state
from limbeck.progress import bar

PRUNED_FROM = 0.05
"""Share of zeros from which a layer counts as pruned: its zeros stay."""
JOURNAL = STATE_PREFIX + "walk.json"


class Solution(NamedTuple):
    """What a method made of a group."""

    weights: list[Tensor]
    """float32 [O I] for each layer, as the walk goes on with them."""
    factors: Tensor | None = None
    """[I] > 0: the weights expect inputs divided by these; the norm before takes the division."""
    kept: list[list[int]] | None = None
    """Groups of inputs that stay, for each layer; None where all do."""


class Method(Protocol):
    """What is done to the groups of linear layers."""

    def wants(self, group: Group) -> bool:
        """Whether the group is worked on; others cost nothing."""
        ...

    def solve(self, group: Group, problems: Sequence[LayerProblem]) -> Solution:
        """New weights for the layers of a group; `problems` have their weights and the moments of their input."""
        ...

    def tensors(self, number: int, block: Any, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """What is written for a finished block, by name within it; called once, after all its groups."""
        ...


class WalkOptions(NamedTuple):
    """How the walk goes, whatever is done."""

    title: str = "compress"
    """Of the progress bar."""
    dense_targets: bool = False
    """Aim at the dense model's outputs."""
    ignore: tuple[str, ...] = ()
    """Layers whose name contains one of these are left as they are."""

    def chosen(self, group: Group) -> Group | None:
        """The group without the layers to ignore; None when nothing is left."""
        linears = {
            name: linear
            for name, linear in group.linears.items()
            if not any(part in f"layers.{group.block}.{name}" for part in self.ignore)
        }
        return group._replace(linears=linears) if linears else None


class Record(NamedTuple):
    """What happened to one layer."""

    name: str
    error: float
    """`layer_error` against the weight it had."""
    seconds: float
    """Of solving, shared by the group's layers."""
    tokens: int
    kept: list[int] | None = None
    """Groups of inputs that stay (neurons, KV groups)."""


class Stops:
    """The stops of one block: moments, problems, solving, and the new weights into the block."""

    def __init__(self, method: Method, options: WalkOptions, dense: Mapping[str, Tensor]) -> None:
        self._method, self._options, self._dense = method, options, dense
        self.records: list[Record] = []

    def __call__(self, group: Group, inputs: Tensor) -> Tensor | None:
        """Solve a group behind the given inputs [tokens I]; returns what its input is to be multiplied by."""
        if (chosen := self._chosen(group)) is None:
            return None
        cross = None
        if group.name in self._dense:
            cross = self._dense[group.name].T @ inputs / max(len(inputs), 1)
        return self.solve(chosen, Moments.of(inputs), cross)

    def from_stored(self, group: Group, moments: Moments) -> None:
        """Solve a group from moments that were collected before."""
        if (chosen := self._chosen(group)) is not None:
            self.solve(chosen, moments, None)

    def _chosen(self, group: Group) -> Group | None:
        chosen = self._options.chosen(group)
        return chosen if chosen is not None and self._method.wants(chosen) else None

    def solve(self, group: Group, moments: Moments, cross: Tensor | None) -> Tensor | None:
        """New weights into the layers of a group, a record of each."""
        start = time.perf_counter()
        linears = group.linears
        problems = [
            LayerProblem(linear.weight.data, moments, f"layers.{group.block}.{name}", _mask(linear.weight.data))
            for name, linear in linears.items()
        ]
        targets = problems if cross is None else [retarget(problem, cross) for problem in problems]
        solution = self._method.solve(group, targets)
        seconds = (time.perf_counter() - start) / len(linears)
        kept: Sequence[list[int] | None] = solution.kept or [None] * len(problems)
        for problem, linear, weight, groups in zip(problems, linears.values(), solution.weights, kept, strict=True):
            plain = weight if solution.factors is None else weight / solution.factors
            error = layer_error(problem, plain)
            self.records.append(Record(problem.name, error, seconds, moments.tokens, groups))
            linear.weight.data = weight
        if solution.factors is None:
            return None
        assert group.norm is not None
        fold_into_norm(group.norm, solution.factors)
        return 1 / solution.factors


def walk(
    blocks: Blocks,
    rows: Rows,
    method: Method,
    options: WalkOptions,
    writer: ShardWriter,
    fingerprint: str,
    device: torch.device,
) -> list[Record]:
    """Compress every block and write it as a shard.

    Args:
      blocks: the model.
      rows: calibration tokens.
      method: what is done.
      options: how.
      writer: takes shard number k for block k; with the journal of an interrupted walk of the same fingerprint in its
        directory the walk goes on.
      fingerprint: hash of all that decides the result.
      device: where blocks compute.
    Returns: a record for every solved layer.
    Raises: CheckpointError when the journal there is of another walk.
    """
    directory = writer.directory
    done, records = _read_journal(directory, fingerprint)
    hidden, calls = blocks.embed(rows.input_ids, device)
    streams = {"compressed": hidden, "dense": hidden} if options.dense_targets else {"compressed": hidden}
    if done:
        streams = {name: tensor.to(device) for name, tensor in load_file(_hidden(directory, done)).items()}
    valid = rows.valid.to(device)
    with bar(options.title, len(blocks)) as progress:
        progress.advance(done)
        for number in range(done, len(blocks)):
            with blocks.block(number, device) as block:
                dense = _run_dense(block, number, streams, calls[number], valid) if "dense" in streams else {}
                stops = Stops(method, options, dense)
                streams["compressed"] = run_block(block, number, streams["compressed"], calls[number], stops, valid)
                _write_block(blocks, number, block, method, writer)
            records += stops.records
            _write_journal(directory, fingerprint, number + 1, records, streams)
            # The block's weights are garbage by now, and would add up before the collector comes by.
            release_memory()
            progress.advance(1, note=f"mean error {_mean(stops.records):.3g}")
    return records


def solve_stored(
    blocks: Blocks,
    moments: Callable[[Group], Moments],
    method: Method,
    options: WalkOptions,
    writer: ShardWriter,
    device: torch.device,
) -> list[Record]:
    """As `walk`, from moments that were collected before: nothing is passed through, no layer sees another's change."""
    records: list[Record] = []
    with bar(options.title, len(blocks)) as progress:
        for number in range(len(blocks)):
            with blocks.block(number, device) as block:
                stops = Stops(method, options, {})
                for group in groups_of(block, number):
                    stops.from_stored(group, moments(group._replace(block=blocks.kept[number])))
                _write_block(blocks, number, block, method, writer)
            records += stops.records
            progress.advance(1, note=f"mean error {_mean(stops.records):.3g}")
    return records


def write_rest(blocks: Blocks, writer: ShardWriter) -> int:
    """Write what is in no block, and the index; removes the journal. Returns the bytes of the weights."""
    writer.write(len(blocks), {name: blocks.source.tensor(name) for name in blocks.rest})
    for file in writer.directory.glob(STATE_PREFIX + "*"):
        file.unlink()
    return writer.finish()


def _write_block(blocks: Blocks, number: int, block: Any, method: Method, writer: ShardWriter) -> None:
    tensors = method.tensors(number, block, blocks.dtypes)
    writer.write(number, {blocks.prefix(number) + name: tensor.cpu() for name, tensor in tensors.items()})


def _mask(weight: Tensor) -> Tensor | None:
    """What is not zero, in a layer that was pruned before; a few zeros are chance."""
    mask = weight != 0
    return mask if float(mask.float().mean()) < 1 - PRUNED_FROM else None


def stored_state(block: Any, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """The weights of a block in the dtypes of the file it came from."""
    return {name: tensor.to(dtypes[name]) for name, tensor in fused_state(block).items()}


def _run_dense(
    block: Any, number: int, streams: dict[str, Tensor], call: dict[str, Any], valid: Tensor
) -> dict[str, Tensor]:
    """Pass an untouched copy of the block on the dense model's inputs; returns the input of every group."""
    inputs: dict[str, Tensor] = {}

    def keep(group: Group, flat: Tensor) -> None:
        # The tokens of an expert differ between the two models, so their inputs cannot be paired.
        if "experts" not in next(iter(group.linears)):
            inputs[group.name] = flat

    streams["dense"] = run_block(copy.deepcopy(block), number, streams["dense"], call, keep, valid)
    return inputs


def _read_journal(directory: Path, fingerprint: str) -> tuple[int, list[Record]]:
    path = directory / JOURNAL
    if not path.is_file():
        return 0, []
    tree = json.loads(path.read_text(encoding="utf-8"))
    if tree["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{directory}: the interrupted run there has another model, calibration or method; remove it, or give "
            "another --out."
        )
    return tree["blocks"], [Record(*record) for record in tree["records"]]


def _write_journal(
    directory: Path, fingerprint: str, blocks: int, records: list[Record], streams: dict[str, Tensor]
) -> None:
    """The hidden states first, under a name of their own: the journal decides which of them count."""
    path = _hidden(directory, blocks)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.cpu().clone() for name, tensor in streams.items()}, partial)
    partial.replace(path)
    write_json(directory / JOURNAL, {"fingerprint": fingerprint, "blocks": blocks, "records": records})
    _hidden(directory, blocks - 1).unlink(missing_ok=True)


def _hidden(directory: Path, blocks: int) -> Path:
    """What enters the block after the first `blocks`."""
    return directory / f"{STATE_PREFIX}hidden-{blocks:05d}.safetensors"


def _mean(records: list[Record]) -> float:
    return sum(record.error for record in records) / max(len(records), 1)
