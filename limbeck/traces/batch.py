"""Examples and batches: cut samples with their weights, laid out for a model.

Two layouts carry the same losses. `packed` puts all sequences of a batch behind one another in one row; attention is
isolated by their lengths (see models/attention.py), so no token is padding. `padded` gives each sequence its own row,
padded on the right; causal attention alone keeps padding out, whatever the padding token is, and padding has weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.traces.sample import PADDING, Sample
from limbeck.traces.supervise import SupervisionConfig, token_weights
from limbeck.traces.truncate import TruncationConfig, apply_cut, truncate

Layout = Literal["packed", "padded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A cut sample with the loss weight of every token as a target."""

    sample: Sample
    ce_weight: np.ndarray
    """float32 [n]."""
    kd_weight: np.ndarray
    """float32 [n]."""
    whole_weights: tuple[float, float] | None = None
    """Sums of CE and KD weights over the whole trace, where the weights of the kept tokens stand for it; else None."""

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def weight_sums(self) -> tuple[float, float]:
        """What its CE and its KD weights count as in the denominators of a step."""
        if self.whole_weights is not None:
            return self.whole_weights
        return float(self.ce_weight.sum(dtype=np.float64)), float(self.kd_weight.sum(dtype=np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tensors of several examples. The weight at a token is for predicting that token from the one before it."""

    input_ids: Tensor
    """int64 [B T]."""
    segment_ids: Tensor
    """int64 [B T]; -1 at padding."""
    positions: Tensor
    """int64 [B T]; restarts at 0 with every sequence and counts on in its padding."""
    ce_weight: Tensor
    """float32 [B T]."""
    kd_weight: Tensor
    """float32 [B T]."""
    sequence_lengths: tuple[int, ...]
    """Tokens of each sequence, in order: one row of them when packed, one a row when padded."""
    layout: Layout
    sequence_weights: tuple[float, ...] = ()
    """What each sequence counts in the loss; empty where all count 1."""

    @property
    def num_tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(self.sequence_lengths)

    def target_rows(self) -> Tensor:
        """int64 [N]: flat indices of the supervised targets in [B T]; the state at index - 1 predicts one."""
        return torch.nonzero((self.ce_weight + self.kd_weight).flatten() > 0).squeeze(1)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("input_ids", "segment_ids", "positions", "ce_weight", "kd_weight")
        }
        return replace(self, **moved)


def make_example(sample: Sample, truncation: TruncationConfig, supervision: SupervisionConfig) -> Example:
    """Cut a sample and weigh its tokens; `truncation` is fitted to all samples (`traces.fit`)."""
    cut = truncate(sample, truncation)
    cut_sample = apply_cut(sample, cut)
    ce_weight, kd_weight = token_weights(cut_sample, cut.loss_weight(), supervision)
    whole = None
    if cut.weight is not None:
        ce, kd = token_weights(sample, np.ones(len(sample), dtype=np.float32), supervision)
        whole = float(ce.sum(dtype=np.float64)), float(kd.sum(dtype=np.float64))
    return Example(sample=cut_sample, ce_weight=ce_weight, kd_weight=kd_weight, whole_weights=whole)


def idle(layout: Layout, pad_id: int) -> Batch:
    """One token without weight: for a process that has no examples left while others do."""
    token, none = torch.full((1, 1), pad_id), torch.zeros(1, 1)
    return Batch(
        input_ids=token,
        segment_ids=torch.full_like(token, PADDING),
        positions=torch.zeros_like(token),
        ce_weight=none,
        kd_weight=none,
        sequence_lengths=(1,),
        layout=layout,
    )


def collate(examples: Sequence[Example], layout: Layout, pad_id: int) -> Batch:
    """Lay out examples as one batch.

    Args:
      examples: at least one.
      layout: packed (B = 1, T = sum of lengths) or padded (B = number of examples, T = longest).
      pad_id: token id that fills padding; any id will do, also the end-of-turn token.
    """
    lengths, weights = [len(example) for example in examples], tuple(example.sample.weight for example in examples)
    if layout == "packed":
        shape, starts = (1, sum(lengths)), np.concatenate([[0], np.cumsum(lengths)[:-1]])
    else:
        shape, starts = (len(lengths), max(lengths)), np.arange(len(lengths)) * max(lengths)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    segment_ids = np.full(shape, PADDING, dtype=np.int64)
    # Counting on in the padding matters: transformers takes a jump in the positions for a packed row and builds a mask.
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int64), shape).copy()
    ce_weight, kd_weight = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    for example, start, length in zip(examples, starts, lengths, strict=True):
        span = slice(int(start), int(start) + length)
        input_ids.reshape(-1)[span] = example.sample.input_ids
        segment_ids.reshape(-1)[span] = example.sample.segment_ids
        positions.reshape(-1)[span] = np.arange(length)
        ce_weight.reshape(-1)[span] = example.ce_weight
        kd_weight.reshape(-1)[span] = example.kd_weight
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        segment_ids=torch.from_numpy(segment_ids),
        positions=torch.from_numpy(positions),
        ce_weight=torch.from_numpy(ce_weight),
        kd_weight=torch.from_numpy(kd_weight),
        sequence_lengths=tuple(lengths),
        layout=layout,
        sequence_weights=weights if any(weight != 1 for weight in weights) else (),
    )
