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
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from limbeck.compress import journal
from limbeck.compress.blocks import Blocks, Group, groups_of
from limbeck.compress.calibrate import Rows
from limbeck.compress.folds import Fold, find_folds
from limbeck.compress.method import Method, Record
from limbeck.compress.problem import Moments
from limbeck.compress.stops import Solving, Watching, output_of, stopping
from limbeck.compress.weights import ShardWriter
from limbeck.ledger import release_memory
from limbeck.progress import bar

_PROBE = 8
"""Tokens of the sequence that folds are tried on."""


class WalkOptions(NamedTuple):
    """How the walk goes, whatever is done."""

    title: str = "compress"
    """Of the progress bar."""
    dense_targets: bool = False
    """Aim at the dense model's outputs."""
    ignore: tuple[str, ...] = ()
    """Layers whose name contains one of these are left as they are."""


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
    done, records = journal.read(writer.directory, fingerprint)
    probe = _Probe(blocks, device) if method.folds else None
    hidden, calls = blocks.embed(rows.input_ids, device)
    streams = {"compressed": hidden, "dense": hidden} if options.dense_targets else {"compressed": hidden}
    if done:
        path = journal.hidden_path(writer.directory, done)
        streams = {name: tensor.to(device) for name, tensor in load_file(path).items()}
    valid = rows.valid.to(device)
    with bar(options.title, len(blocks)) as progress:
        progress.advance(done)
        for number in range(done, len(blocks)):
            with blocks.block(number, device) as block:
                groups = _chosen(block, number, method, options)
                folds = {} if probe is None else probe.folds(block, number, groups)
                dense: dict[str, Tensor] = {}
                if "dense" in streams:
                    dense, streams["dense"] = _run_dense(block, groups, streams["dense"], calls[number], valid)
                stops = [Solving(g, method, valid, folds.get(g.name), dense.get(g.name)) for g in groups]
                with stopping(block, stops, valid):
                    streams["compressed"] = output_of(block, streams["compressed"], calls[number])
                _write_block(blocks, number, block, method, writer)
            solved = list(itertools.chain.from_iterable(stop.records for stop in stops))
            records += solved
            journal.write(writer.directory, fingerprint, number + 1, records, streams)
            # The block's weights are garbage by now, and would add up before the collector comes by.
            release_memory()
            progress.advance(1, note=_note(solved))
    return records


def solve_stored(
    blocks: Blocks,
    moments: Callable[[Group], Moments],
    method: Method,
    options: WalkOptions,
    writer: ShardWriter,
    device: torch.device,
) -> list[Record]:
    """As `walk`, from moments that are at hand: nothing is passed through, no layer sees another's change."""
    records: list[Record] = []
    probe = _Probe(blocks, device) if method.folds else None
    with bar(options.title, len(blocks)) as progress:
        for number in range(len(blocks)):
            with blocks.block(number, device) as block:
                groups = _chosen(block, number, method, options)
                folds = {} if probe is None else probe.folds(block, number, groups)
                solved: list[Record] = []
                for group in groups:
                    stop = Solving(group, method, None, folds.get(group.name), None)
                    stop.solve(moments(group._replace(block=blocks.kept[number])))
                    solved += stop.records
                _write_block(blocks, number, block, method, writer)
            records += solved
            progress.advance(1, note=_note(solved))
    return records


def write_rest(blocks: Blocks, writer: ShardWriter) -> int:
    """Write what is in no block, and the index. Returns the bytes of the files."""
    outer = {name: blocks.source.tensor(name) for name in blocks.rest}
    writer.write(len(blocks), blocks.source.as_stored(blocks.model, outer))
    return writer.finish()


class _Probe:
    """A short sequence behind the embedding, on which folds are tried."""

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        ids = torch.arange(_PROBE)[None] % blocks.config.vocab_size
        self._hidden, self._calls = blocks.embed(ids, device)

    def folds(self, block: Any, number: int, groups: list[Group]) -> dict[str, Fold]:
        return find_folds(block, groups, self._hidden, self._calls[number])


def foldable(blocks: Blocks, method: Method, options: WalkOptions, device: torch.device) -> dict[str, bool]:
    """For every group of the first block that feeds on a normalisation, whether it has a fold."""
    with blocks.block(0, device) as block:
        groups = _chosen(block, 0, method, options)
        return dict.fromkeys((group.name for group in groups), False) | dict.fromkeys(
            _Probe(blocks, device).folds(block, 0, groups), True
        )


def _chosen(block: Any, number: int, method: Method, options: WalkOptions) -> list[Group]:
    groups = (group.without(options.ignore) for group in groups_of(block, number))
    return [group for group in groups if group is not None and method.wants(group)]


def _write_block(blocks: Blocks, number: int, block: Any, method: Method, writer: ShardWriter) -> None:
    writer.write(number, method.tensors(number, block, blocks))


def _run_dense(
    block: Any, groups: list[Group], hidden: Tensor, call: dict[str, Any], valid: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Pass an untouched copy of the block on the dense model's inputs; the input of every group, and the output."""
    block = copy.deepcopy(block)
    # The tokens of an expert differ between the two models, so their inputs cannot be paired.
    watched = [Watching(group, valid) for group in groups if "experts" not in next(iter(group.linears))]
    with stopping(block, watched, valid):
        output = output_of(block, hidden, call)
    return {stop.group.name: stop.seen for stop in watched if stop.seen is not None}, output


def _note(records: list[Record]) -> str:
    return f"mean error {sum(record.error for record in records) / max(len(records), 1):.3g}"
