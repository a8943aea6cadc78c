"""Projected targets: all that forward KL needs of a teacher whose student keeps its head as it is.

With the student's logits z = W h + b and the teacher's distribution t over V entries, both at temperature T,

    KL(t || softmax(z / T)) = k - c . h / T + log sum exp(z / T),      c = W^T t,   k = sum t log t - t . b / T,

and the gradient by h is (W^T softmax(z / T) - c) / T. So c, as wide as the student's hidden states, and the number k
stand for the whole vocabulary, exactly, as long as W and b are those that c was made with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.models.anatomy import Head
from limbeck.models.sharded_softmax import WHOLE
from limbeck.teacher.targets import LOG_FLOOR, Distance, OneTeacherTargets, TargetReader, cooled

Precision = Literal["float32", "bf16", "int8"]
_INT8_LEVELS = 127


@dataclass(frozen=True, slots=True)
class ProjectedTargets(OneTeacherTargets):
    """The teacher's distribution through the student's head, and what does not depend on the student."""

    mean_rows: Tensor
    """float [N D]: c, the mean of the rows of the student's head under the teacher's distribution."""
    constants: Tensor
    """float [N]: k."""
    temperature: float = 1.0
    """T of both distributions; other temperatures need other targets."""

    def __len__(self) -> int:
        return len(self.mean_rows)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> ProjectedTargets:
        return ProjectedTargets(change(self.mean_rows), change(self.constants), self.temperature)

    def map_heads(self, change: Callable[[Head], Head]) -> ProjectedTargets:
        return self

    def over(self, entries: Tensor) -> NoReturn:
        raise ConfigError("label terms need a live teacher (teacher.model), which knows the logits of both labels.")

    def logits(self) -> NoReturn:
        raise ConfigError("projected targets have no logits; use a live teacher.")

    def entropy(self, vocab: int) -> NoReturn:
        raise ConfigError("select.by teacher_entropy: projected targets do not hold it; use a live teacher.")

    def probability_of(self, entries: Tensor, vocab: int) -> NoReturn:
        raise ConfigError(
            "supervision.borders: projected targets do not tell how likely an end is; use a live teacher."
        )

    def head_flops(self, vocab: int) -> int:
        return 0

    def reader(self, kd_coef: Tensor, vocab: int, distance: Distance) -> TargetReader:
        if distance.temperature != self.temperature or distance.softmax is not WHOLE:
            raise ConfigError(
                f"projected targets are for temperature {self.temperature:g} and a head in one piece; found "
                f"temperature {distance.temperature:g}. Write a cache for it (cache.temperature)."
            )
        return _Reader(self, kd_coef)


class _Reader(TargetReader):
    has_frozen_head = True

    def __init__(self, targets: ProjectedTargets, kd_coef: Tensor) -> None:
        blank, compute = (kd_coef == 0)[:, None], kd_coef.dtype
        self._mean_rows = targets.mean_rows.to(compute).masked_fill(blank, 0.0)
        self._constants = targets.constants.to(compute).masked_fill(blank[:, 0], 0.0)
        self._kd_coef, self._temperature = kd_coef, targets.temperature

    def read(self, index: Tensor, states: Tensor) -> None:
        scaled = self._mean_rows[index] / self._temperature
        self._linear = self._constants[index] - torch.linalg.vecdot(scaled, states.to(scaled.dtype))
        self.by_states = scaled.mul_(-self._kd_coef[index, None])

    def row_loss(self, block: slice, logits: Tensor, log_probs: Tensor | None, coef: Tensor) -> Tensor:
        if log_probs is not None and self._temperature == 1.0:
            log_sum = logits[:, :1] - log_probs[:, :1]
            torch.exp(log_probs, out=logits).mul_(coef)
            return self._linear[block] + log_sum[:, 0]
        cold = cooled(logits, self._temperature)
        log_sum = torch.logsumexp(cold, -1, keepdim=True)
        torch.exp(cold.sub_(log_sum), out=logits).mul_(coef / self._temperature)
        return self._linear[block] + log_sum[:, 0]


def project(log_probs: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    """What `ProjectedTargets` hold of a teacher's distributions.

    Args:
      log_probs: [N V] of the teacher at this temperature.
      head: of the student, [V D].
      temperature: T > 0.
    Returns: c [N D] and k [N], in the type of `log_probs`.
    """
    probs = log_probs.exp()
    constants = (probs * log_probs.clamp_min(LOG_FLOOR)).sum(-1)
    if head.bias is not None:
        constants -= probs @ head.bias.to(probs.dtype) / temperature
    return probs @ head.weight.to(probs.dtype), constants


def head_hash(head: Head) -> str:
    """Tells one student's head from another, by its numbers in float32.

    Raises: ConfigError for a head whose logits are capped, through which nothing can be projected.
    """
    if head.softcap is not None:
        raise ConfigError(
            f"mode projected: the student caps its logits (at {head.softcap:g}), so that they are not linear in its "
            "hidden states; use mode top_k or hidden."
        )
    digest = hashlib.sha256(str(tuple(head.weight.shape)).encode())
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def encode(mean_rows: Tensor, constants: Tensor, precision: Precision) -> bytes:
    """A record: k of all rows in float32, then c, behind one scale a row where it is rounded to int8."""
    parts = [constants.float().numpy().tobytes()]
    if precision == "int8":
        scales = mean_rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / _INT8_LEVELS
        parts += [scales.numpy().tobytes(), (mean_rows / scales).round().to(torch.int8).numpy().tobytes()]
    else:
        stored = mean_rows.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        parts.append(stored.contiguous().view(torch.uint8).numpy().tobytes())
    return b"".join(parts)


def decode(record: bytes, num_rows: int, precision: Precision) -> tuple[Tensor, Tensor]:
    """c [n D] and k [n] of a record of `num_rows` rows, in float32."""
    numbers = bytearray(record)
    constants = torch.from_numpy(np.frombuffer(numbers, np.float32, num_rows))
    body = memoryview(numbers)[4 * num_rows :]
    if precision == "int8":
        scales = torch.from_numpy(np.frombuffer(body, np.float32, num_rows))
        levels = torch.from_numpy(np.frombuffer(body[4 * num_rows :], np.int8))
        return levels.view(num_rows, -1).float() * scales[:, None], constants
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return torch.frombuffer(body, dtype=dtype).view(num_rows, -1).float(), constants
