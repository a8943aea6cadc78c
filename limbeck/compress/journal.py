"""The journal of a walk: how many blocks are written, their records, and what enters the next one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from limbeck.checkpoint import STATE_PREFIX, write_json
from limbeck.compress.method import Record
from limbeck.errors import CheckpointError
from limbeck.models.weight_files import write_tensors

JOURNAL = STATE_PREFIX + "walk.json"


def read(directory: Path, fingerprint: str) -> tuple[int, list[Record]]:
    """Blocks that are done, and their records; 0 and none where there is no journal.

    Raises: CheckpointError when the journal is of another walk.
    """
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


def write(directory: Path, fingerprint: str, blocks: int, records: list[Record], streams: Mapping[str, Tensor]) -> None:
    """The hidden states first, under a name of their own: the journal decides which of them count."""
    write_tensors(hidden_path(directory, blocks), {name: tensor.cpu().clone() for name, tensor in streams.items()})
    write_json(directory / JOURNAL, {"fingerprint": fingerprint, "blocks": blocks, "records": records})
    hidden_path(directory, blocks - 1).unlink(missing_ok=True)


def remove(directory: Path) -> None:
    """When everything is written, and not before: a failure at the end leaves the finished blocks for --resume."""
    for file in directory.glob(STATE_PREFIX + "*"):
        file.unlink()


def hidden_path(directory: Path, blocks: int) -> Path:
    """What enters the block after the first `blocks`."""
    return directory / f"{STATE_PREFIX}hidden-{blocks:05d}.safetensors"
