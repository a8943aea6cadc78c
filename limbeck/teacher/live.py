"""A live teacher: a model in this process that reads the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.ledger import Ledger, backbone_forward_flops, head_forward_flops
from limbeck.models.anatomy import head_of, hidden_states, sizes_of
from limbeck.teacher.targets import DenseTargets
from limbeck.traces.batch import Batch, Example


class LiveTeacher:
    """Gives its last hidden states and its head; the loss makes the logits a chunk at a time."""

    def __init__(self, model: Any, vocab_size: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self._sizes = sizes_of(model, vocab_size)

    def targets(self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger) -> DenseTargets:
        """Dense targets for the tokens at flat indices `rows` of the batch."""
        with ledger.phase("teacher"), torch.no_grad():
            packed = batch.sequence_lengths if batch.layout == "packed" else None
            hidden = hidden_states(self.model, batch.input_ids, batch.positions, packed).flatten(0, 1)[rows - 1]
        lengths = list(batch.sequence_lengths) if packed else [batch.input_ids.shape[1]] * len(batch.input_ids)
        flops = backbone_forward_flops(self._sizes, lengths) + head_forward_flops(self._sizes, len(rows))
        ledger.add_flops(teacher=flops)
        head = head_of(self.model)
        return DenseTargets(hidden, head.weight, head.bias)
