"""Second moments on disk: collected once on the dense model, then any solver runs from them.

One file a block, `moments-....safetensors`, with the moments of every group of linear layers by the group's name.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.checkpoint import Checkpoint, output_directory, write_manifest
from limbeck.compress import journal
from limbeck.compress.blocks import Blocks, Group
from limbeck.compress.calibrate import CalibrationConfig, calibration_rows
from limbeck.compress.folds import Fold
from limbeck.compress.method import Solution
from limbeck.compress.problem import LayerProblem, Moments
from limbeck.compress.tokenizer_fit import check_tokens
from limbeck.compress.walk import WalkOptions, walk
from limbeck.compress.weights import SafetensorSource, ShardWriter
from limbeck.config import checked, config_hash
from limbeck.errors import CheckpointError
from limbeck.ledger import Ledger
from limbeck.models.load import load_tokenizer, model_hash
from limbeck.models.placement import here
from limbeck.stage import How

_PARTS = ("gram", "absolute_mean", "absolute_max")


@checked
class MomentsConfig:
    """Collect the second moments of a model's layers."""

    model: str
    """Directory, alias or hub id."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """The tokens."""


class _Collect:
    """The method that changes nothing and writes what it saw."""

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}

    folds = False

    def wants(self, group: Group) -> bool:
        return True

    def check(self, blocks: Blocks, groups: Sequence[Group]) -> None:
        pass

    def solve(self, group: Group, problems: Sequence[LayerProblem], fold: Fold | None) -> Solution:
        moments = problems[0].moments
        for part in _PARTS:
            self._seen[f"{group.name}.{part}"] = getattr(moments, part)
        self._seen[f"{group.name}.tokens"] = torch.tensor(moments.tokens)
        return Solution([problem.weight for problem in problems])

    def tensors(self, number: int, block: Any, blocks: Blocks) -> dict[str, Tensor]:
        seen, self._seen = self._seen, {}
        return {blocks.prefix(number) + name: tensor.cpu() for name, tensor in seen.items()}


def run(config: MomentsConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write the moments of all layers of a model into `out`."""
    device = here().device
    ledger, key = Ledger(device), model_hash(config.model)
    blocks = Blocks(config.model)
    tokenizer = load_tokenizer(config.model)
    rows = calibration_rows(config.calibration, tokenizer, config.model)
    check_tokens(config.model, tokenizer, blocks.config.get_text_config().vocab_size, rows.input_ids)
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as working:
        writer = ShardWriter(working, len(blocks), stem="moments")
        fingerprint = config_hash({"config": config_hash(config), "model": key})
        with ledger.phase("calibration"):
            records = walk(blocks, rows, _Collect(), WalkOptions("moments"), writer, fingerprint, device)
        metrics = {"layers": len(records), "calibration_tokens": rows.tokens}
        write_manifest(
            working,
            stage="moments",
            config=config,
            inputs={"model": key},
            ledger=ledger.as_dict(),
            metrics=metrics,
        )
        journal.remove(working)
    return Checkpoint(out)


class StoredMoments:
    """Reads the moments of a group, for `solve_stored`."""

    def __init__(self, directory: Path, model: str) -> None:
        made_for = Checkpoint(directory).manifest["inputs"].get("model")
        if made_for != model_hash(model):
            raise CheckpointError(f"{directory}: the moments are of another model than {model}; collect them for it.")
        self._directory, self._source = directory, SafetensorSource(directory)

    def __call__(self, group: Group) -> Moments:
        """Moments of the inputs of a group.

        Raises: CheckpointError when they are not there.
        """
        prefix = f"model.layers.{group.block}.{group.name}."
        if f"{prefix}gram" not in self._source.names():
            raise CheckpointError(f"{self._directory}: no moments of {group.name}; collect them again.")
        return self._read(prefix)

    def named(self, roles: Sequence[str]) -> dict[str, Moments]:
        """The moments of all groups of some roles, by their names."""
        wanted = re.compile(rf"model\.layers\.\d+\.(layers\.\d+\.(?:{'|'.join(roles)})(?:\.\d+)?)\.gram$")
        found = [(name, match[1]) for name in sorted(self._source.names()) if (match := wanted.match(name))]
        return {group: self._read(name.removesuffix("gram")) for name, group in found}

    def _read(self, prefix: str) -> Moments:
        gram, mean, largest, tokens = (self._source.tensor(prefix + part) for part in (*_PARTS, "tokens"))
        return Moments(gram, mean, largest, int(tokens)).to(here().device)


@contextmanager
def stored_or_collected(directory: Path | None, model: str, calibration: CalibrationConfig) -> Iterator[StoredMoments]:
    """Moments from a directory, or collected for the length of the block where there is none."""
    if directory is not None:
        yield StoredMoments(directory, model)
        return
    with tempfile.TemporaryDirectory() as scratch:
        run(MomentsConfig(model=model, calibration=calibration), Path(scratch) / "moments")
        yield StoredMoments(Path(scratch) / "moments", model)
