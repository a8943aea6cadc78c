"""A live teacher: a model in this process that reads the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.ledger import Ledger, backbone_forward_flops, head_forward_flops
from limbeck.models.anatomy import NOTHING_GIVEN, Given, head_of, hidden_rows, sizes_of
from limbeck.models.sharded import is_sharded
from limbeck.teacher.dense import DenseTargets
from limbeck.traces.batch import Batch, Example


class LiveTeacher:
    """Gives its last hidden states and its head; the loss makes the logits a chunk at a time."""

    def __init__(self, model: Any, vocab_size: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self._sizes = sizes_of(model, vocab_size)
        self.in_step = is_sharded(model)
        """Whether all processes must ask together, because each holds a part of the model."""

    def targets(
        self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger, given: Given = NOTHING_GIVEN
    ) -> DenseTargets:
        """Dense targets for the tokens at flat indices `rows` of the batch."""
        with ledger.phase("teacher"), torch.no_grad():
            packed = batch.sequence_lengths if batch.layout == "packed" else None
            hidden, computed = hidden_rows(self.model, batch.input_ids, batch.positions, rows - 1, packed, given)
        flops = backbone_forward_flops(self._sizes, computed) + head_forward_flops(self._sizes, len(rows))
        if examples:
            ledger.add_flops(teacher=flops)
        head = head_of(self.model)
        return DenseTargets(hidden, *head)
