"""From logits to tokens, as a pure function of the logits and one uniform number a row."""

from __future__ import annotations

import torch
from torch import Tensor

NUCLEUS_CANDIDATES = 512
"""Tokens that top-p ranks before it falls back to the whole vocabulary; enough for nearly every step."""


def choose_tokens(logits: Tensor, uniforms: Tensor | None, temperature: float, top_p: float) -> Tensor:
    """One token a row by inverting the cumulative distribution at a given uniform number.

    Args:
      logits: [R V], any float dtype.
      uniforms: float64 [R] in [0, 1); unused at temperature 0.
      temperature: divides the logits; 0 takes the largest.
      top_p: the smallest set of most likely tokens with at least this mass is kept and renormalised.
    Returns: int64 [R].
    Source: top-p is nucleus sampling (Holtzman et al. 2020, equations 2 and 3).
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    assert uniforms is not None
    probabilities = torch.softmax(logits.float() / temperature, -1)
    if top_p == 1.0:
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        return invert_cumulative(cumulative, uniforms * cumulative[:, -1])
    vocabulary = probabilities.shape[-1]
    ranked, order = probabilities.topk(min(NUCLEUS_CANDIDATES, vocabulary))
    if ranked.shape[-1] < vocabulary and bool((ranked.sum(-1, dtype=torch.float64) < top_p).any()):
        ranked, order = probabilities.sort(-1, descending=True)
    cumulative = ranked.cumsum(-1, dtype=torch.float64)
    last = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=ranked.shape[-1] - 1)
    mass = cumulative.gather(-1, last).squeeze(-1)
    return order.gather(-1, invert_cumulative(cumulative, uniforms * mass)[:, None]).squeeze(-1)


def invert_cumulative(cumulative: Tensor, targets: Tensor) -> Tensor:
    """The first index [R] whose cumulative mass [R K] is above the row's target [R]."""
    # right=True passes over entries without mass: their cumulative value equals their predecessor's.
    index = torch.searchsorted(cumulative, targets[:, None].contiguous(), right=True).squeeze(-1)
    return index.clamp(max=cumulative.shape[-1] - 1)
