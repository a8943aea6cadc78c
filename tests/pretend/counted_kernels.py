"""What is compiled on a real device, counted as the kernels made of it: `Fused` chains, and the loss in Triton.

The loss is computed by plain torch; what its kernels read and write is that of the tensors they are given, as
`limbeck/distill/kernels.py` says a pass at a time.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from pretend.device import COUNTS, Pretend, kernel

from limbeck.distill import device_loss
from limbeck.distill.divergence import DIVERGENCES, DivergenceConfig
from limbeck.models import pointwise

KINDS = {name: number for number, name in enumerate(
    ("forward_kl", "reverse_kl", "combined_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
)}  # fmt: skip
IN_ONE_PASS = 2


def install() -> None:
    """In place of the compilers."""
    plain = pointwise.Fused.__call__

    def call(self: Any, *given: Any) -> Any:
        if not isinstance(given[0], Pretend):
            return plain(self, *given)
        return kernel(self.kernels, self.function, *given, name=f"fused {self.__name__}")

    pointwise.Fused.__call__ = call  # type: ignore[method-assign]
    stand_in = types.SimpleNamespace(
        KINDS=KINDS, dense_loss_=dense_loss_, log_sums_of=log_sums_of, two_terms_=two_terms_, IN_ONE_PASS=IN_ONE_PASS
    )
    device_loss.kernels = lambda: stand_in  # type: ignore[assignment]


def dense_loss_(
    student: Any, teacher: Any, labels: Any, ce_coef: Any, kd_coef: Any, kind: int, numbers: Any, temperature: float
) -> Any:
    name = next(name for name, number in KINDS.items() if number == kind)
    fields = {"jsd": "beta", "skew_kl": "skew_alpha", "skew_reverse_kl": "skew_alpha", "combined_kl": "forward_ratio"}
    parameters = {fields[name]: numbers[0]} if name in fields else {}
    divergence = DIVERGENCES[name](DivergenceConfig(name=name, **parameters))  # type: ignore[arg-type]

    def compute(z: Any, y: Any, label: Any, ce: Any, kd: Any) -> Any:
        wide, width = z.float(), y.shape[1]
        log_s, log_t = (torch.log_softmax(x / temperature, -1) for x in (wide[:, :width], y.float()))
        value, slope = divergence(log_s, log_t)
        gradient = torch.zeros_like(wide)
        gradient[:, :width] = (slope - log_s.exp() * slope.sum(-1, keepdim=True)) * kd[:, None] / temperature
        losses = torch.zeros_like(value)
        if label is not None:
            log_probs = torch.log_softmax(wide, -1)
            losses = -log_probs.gather(1, label[:, None])[:, 0]
            gradient += ce[:, None] * log_probs.exp()
            gradient.scatter_add_(1, label[:, None], -ce[:, None])
        z.copy_(gradient)
        return losses, value

    passes = 2 if kind <= IN_ONE_PASS else 3
    found = kernel(passes, compute, student, teacher, labels, ce_coef, kd_coef, name="loss", passes=passes)
    COUNTS.touched.append(
        ("loss", COUNTS.total_launches, tuple(student.shape), student.numel() * student.element_size(), True)
    )
    return found


def log_sums_of(logits: Any) -> Any:
    return kernel(1, lambda z: torch.logsumexp(z.float(), -1), logits, name="loss")


def two_terms_(logits: Any, first: Any, second: Any, a: Any, b: Any) -> None:
    def compute(z: Any, first: Any, second: Any, a: Any, b: Any) -> None:
        wide = z.float()
        found = a[:, None] * (wide - first[:, None]).exp() + b[:, None] * (wide - second[:, None]).exp()
        z.copy_(found.masked_fill(wide == -torch.inf, 0.0))

    kernel(1, compute, logits, first, second, a, b, name="loss")
    COUNTS.touched.append(
        ("loss", COUNTS.total_launches, tuple(logits.shape), logits.numel() * logits.element_size(), True)
    )
