"""How far a compressed model is from the one it was made of, on tokens that calibration did not see; and the gate.

Generating models are judged by perplexity and by the whole distribution, scoring models by what is read from them: the
probability of a label among the labels, and how often the likeliest one changes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.compress.calibrate import Rows
from limbeck.config import checked
from limbeck.errors import ConfigError


@checked
class GateConfig:
    """What a compressed model may lose against the model it was made of, on held-out tokens; null does not matter."""

    sequences: int = 16
    """Held-out sequences: further ones of the calibration text; 0 skips the comparison."""
    labels: tuple[str, ...] = ()
    """Texts of one token whose probabilities are the scores of a ranking model, the first the positive one."""
    max_kl_nats: float | None = None
    """Mean KL(original || compressed) a token."""
    max_perplexity_ratio: float | None = None
    """Perplexity of the compressed model over that of the original."""
    max_label_change: float | None = None
    """Mean absolute change of the first label's probability among the labels."""
    max_label_swaps: float | None = None
    """Share of positions where another label becomes the likeliest."""

    def __post_init__(self) -> None:
        if self.sequences < 0:
            raise ConfigError(f"gate.sequences must be 0 or more; found {self.sequences}")
        if len(self.labels) == 1:
            raise ConfigError("gate.labels: one label has probability 1 always; name two or more")
        if not self.labels and (self.max_label_change is not None or self.max_label_swaps is not None):
            raise ConfigError("gate: max_label_change and max_label_swaps need gate.labels")


def label_ids(labels: Sequence[str], tokenizer: Any) -> list[int]:
    """Token ids of the labels.

    Raises: ConfigError when a label is not one token.
    """
    ids = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    for label, found in zip(labels, ids, strict=True):
        if len(found) != 1:
            raise ConfigError(f"gate.labels: {label!r} is {len(found)} tokens; a label is one (try a space before).")
    return [found[0] for found in ids]


@torch.no_grad()
def compare(original: Any, compressed: Any, rows: Rows, labels: Sequence[int] = ()) -> dict[str, float | None]:
    """Differences over all predicted tokens of some sequences.

    Args:
      original, compressed: causal LMs of one vocabulary.
      rows: held-out tokens.
      labels: token ids of the labels.
    Returns: `nll_nats`, a token of the compressed model; `kl_nats`, `perplexity`, `perplexity_ratio`,
      `top1_agreement`; with labels also `label_change` and `label_swaps`. None is beyond what a number holds.
    """
    sums: dict[str, float] = {}
    count = 0
    for ids, valid in zip(rows.input_ids, rows.valid, strict=True):
        ids = ids[valid][None]
        targets = ids[0, 1:]
        count += len(targets)
        log_p, log_q = (log_probs_of(model, ids) for model in (original, compressed))
        for name, value in _sums(log_p, log_q, targets, labels).items():
            sums[name] = sums.get(name, 0.0) + value
    means = {name: value / max(count, 1) for name, value in sums.items()}
    original_nll = means.pop("original_nll")
    found = {"perplexity": _exp(means["nll_nats"]), "perplexity_ratio": _exp(means["nll_nats"] - original_nll), **means}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def log_probs_of(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities [T - 1, V] of the token after each prefix of one sequence [1 T]: float32, on its device."""
    return model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1].float().log_softmax(-1)


def _exp(value: float) -> float:
    return math.exp(value) if value < math.log(sys.float_info.max) else math.inf


def check(found: Mapping[str, float | None], gate: GateConfig) -> list[str]:
    """What a model fails of its gate, in words; empty when it passes."""
    return [
        f"{name} {'is not finite' if value is None else format(value, '.4g')} > {limit:g}"
        for name, limit in limits_of(gate).items()
        # Written so that NaN fails.
        if limit is not None and ((value := found[name]) is None or not value <= limit)
    ]


def limits_of(gate: GateConfig) -> dict[str, float | None]:
    """The limits by the names of what they limit."""
    return {
        "kl_nats": gate.max_kl_nats,
        "perplexity_ratio": gate.max_perplexity_ratio,
        "label_change": gate.max_label_change,
        "label_swaps": gate.max_label_swaps,
    }


def _sums(log_p: Tensor, log_q: Tensor, targets: Tensor, labels: Sequence[int]) -> dict[str, float]:
    targets = targets.to(log_p.device)
    found = {
        "original_nll": float(-log_p.gather(1, targets[:, None]).sum()),
        "nll_nats": float(-log_q.gather(1, targets[:, None]).sum()),
        "kl_nats": float((log_p.exp() * (log_p - log_q)).sum()),
        "top1_agreement": float((log_p.argmax(1) == log_q.argmax(1)).sum()),
    }
    if labels:
        p, q = (log[:, list(labels)].softmax(1) for log in (log_p, log_q))
        found["label_change"] = float((p[:, 0] - q[:, 0]).abs().sum())
        found["label_swaps"] = float((p.argmax(1) != q.argmax(1)).sum())
    return found
