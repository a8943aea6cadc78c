"""Dense targets: the teacher's whole distribution, as its last hidden states and its head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.models.logits import ChunkedLogits, logits_of
from limbeck.models.parts import Head
from limbeck.teacher.targets import Distance, OneTeacherTargets, TargetReader, by_logits_, cooled, entropy_of

CHUNK_ROWS = 256
"""Most positions whose logits exist at a time when their entropy is taken."""


@dataclass(frozen=True, slots=True)
class DenseTargets(OneTeacherTargets):
    """The teacher's last hidden states and its head; its logits `hidden @ head_weight.T` are made in chunks."""

    hidden: Tensor
    """[N D_teacher], any float dtype."""
    head_weight: Tensor
    """[V_teacher D_teacher]."""
    head_bias: Tensor | None = None
    """[V_teacher]."""
    head_softcap: float | None = None
    """c of logits c tanh(logits / c)."""

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def head(self) -> Head:
        """The teacher's head."""
        return Head(self.head_weight, self.head_bias, self.head_softcap)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> DenseTargets:
        return DenseTargets(change(self.hidden), *self.head)

    def map_heads(self, change: Callable[[Head], Head]) -> DenseTargets:
        return DenseTargets(self.hidden, *change(self.head))

    def over(self, entries: Tensor) -> DenseTargets:
        return DenseTargets(self.hidden, *self.head.rows(entries))

    def logits(self) -> Tensor:
        return logits_of(self.hidden, self.head)

    def entropy(self, vocab: int) -> Tensor:
        return self._of_log_probs(entropy_of, vocab)

    def probability_of(self, entries: Tensor, vocab: int) -> Tensor:
        return self._of_log_probs(lambda log_probs: log_probs[:, entries].exp().sum(-1), vocab)

    @torch.no_grad()
    def _of_log_probs(self, what: Callable[[Tensor], Tensor], vocab: int) -> Tensor:
        """`what` of the log-probabilities [n V] of each chunk: [N]."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            chunks = ChunkedLogits(self.hidden, self.head, vocab)
            chunks.allocate(min(CHUNK_ROWS, len(self)))
            return torch.cat(
                [
                    what(torch.log_softmax(chunks.finish(chunks.logits(chunks.states(index)), torch.float32), -1))
                    for index in torch.arange(len(self), device=self.hidden.device).split(CHUNK_ROWS)
                ]
            )

    def head_flops(self, vocab: int) -> int:
        rows, width = self.head_weight.shape
        return 2 * len(self) * min(vocab, rows) * width

    def reader(self, kd_coef: Tensor, vocab: int, distance: Distance) -> TargetReader:
        return _Reader(self, kd_coef == 0, vocab, distance)


class _Reader(TargetReader):
    """D over the entries that both vocabularies have."""

    def __init__(self, targets: DenseTargets, is_blank: Tensor, vocab: int, distance: Distance) -> None:
        softmax = distance.softmax
        self._chunks = ChunkedLogits(targets.hidden, targets.head, softmax.entries(vocab), softmax.largest)
        self._is_blank, self._distance = is_blank, distance
        self.row_bytes, self.width = self._chunks.row_bytes, len(self._chunks.weight)
        self.is_plain = self._chunks.bias is None and self._chunks.softcap is None

    def allocate(self, rows: int) -> None:
        self._chunks.allocate(rows)

    def read(self, index: Tensor, states: Tensor) -> None:
        theirs = self._chunks.states(index).masked_fill(self._is_blank[index, None], 0.0)
        self.dense = self._chunks.logits(theirs)

    def row_loss(self, block: slice, logits: Tensor, log_probs: Tensor | None, coef: Tensor) -> Tensor:
        divergence, temperature, softmax, _ = self._distance
        assert self.dense is not None
        theirs = self._chunks.finish(self.dense[block], logits.dtype)
        common = logits[:, : theirs.shape[1]]
        if log_probs is not None and temperature == 1.0 and common.shape == logits.shape:
            log_student = log_probs
        else:
            log_student = softmax.log_softmax(cooled(common, temperature))
        value, gradient = divergence(log_student, softmax.log_softmax(cooled(theirs, temperature)))
        by_logits_(gradient, log_student, softmax)
        torch.mul(gradient, coef / temperature, out=common)
        logits[:, common.shape[1] :] = 0.0
        return softmax.sum(value)
