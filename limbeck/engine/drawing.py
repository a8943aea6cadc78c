"""From logits to tokens and log-probs, each row with its own way of drawing and none depending on the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.engine.jobs import Drawn
from limbeck.engine.sampling import Sampling

NUCLEUS_CANDIDATES = 512
"""Tokens that filters rank before they fall back to the whole vocabulary; enough for nearly every step."""


def draw_tokens(logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> list[int]:
    """One token a row.

    Args:
      logits: [R V]; -inf where a token may not come.
      samplings: one a row.
      uniforms: in [0, 1), one a row; unused where the sampling is greedy.
    Source: top-p is nucleus sampling (Holtzman et al. 2020), min-p that of Nguyen et al. 2024; filters come in the
    order of transformers: temperature, top-k, top-p over what is left, min-p.
    """
    tokens = logits.argmax(-1)
    sampled = [row for row, sampling in enumerate(samplings) if not sampling.is_greedy]
    if sampled:
        targets = torch.tensor([uniforms[row] for row in sampled], dtype=torch.float64)
        tokens[sampled] = _sample(logits[sampled], [samplings[row] for row in sampled], targets)
    return tokens.tolist()


def distribution_of(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [V] that `draw_tokens` draws a row from by its logits [V], unless it is greedy."""
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    if not _is_filtered(sampling):
        return probabilities
    kept, order = _filtered(probabilities, sampling)
    return torch.zeros_like(probabilities).scatter_(0, order, kept / kept.sum())


def _sample(logits: Tensor, samplings: Sequence[Sampling], targets: Tensor) -> Tensor:
    probabilities = torch.softmax(logits / torch.tensor([[s.temperature] for s in samplings]), -1)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    plain = [row for row, sampling in enumerate(samplings) if not _is_filtered(sampling)]
    if plain:
        cumulative = probabilities[plain].cumsum(-1, dtype=torch.float64)
        tokens[plain] = invert_cumulative(cumulative, targets[plain] * cumulative[:, -1])
    for row, sampling in enumerate(samplings):
        if _is_filtered(sampling):
            kept, order = _filtered(probabilities[row], sampling)
            cumulative = kept.cumsum(-1, dtype=torch.float64)
            tokens[row] = order[invert_cumulative(cumulative[None], targets[row, None] * cumulative[-1])[0]]
    return tokens


def _is_filtered(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _filtered(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What the filters leave of probabilities [V], largest first, and whose they are [K].

    Only as many are ranked as the filters can keep, if that is known.
    """
    candidates = min(max(sampling.top_k, NUCLEUS_CANDIDATES), len(probabilities))
    ranked, order = probabilities.topk(candidates)
    is_enough = (
        0 < sampling.top_k <= candidates
        or float(ranked[-1]) < sampling.min_p * float(ranked[0])
        or (sampling.top_p < 1.0 and float(ranked.sum(dtype=torch.float64)) >= sampling.top_p)
    )
    if candidates < len(probabilities) and not is_enough:
        ranked, order = probabilities.sort(descending=True, stable=True)
    return _kept(ranked, sampling), order


def _kept(ranked: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [K], largest first, with 0 where a filter takes them out; they no longer sum to 1."""
    kept = ranked.clone()
    if sampling.top_k:
        kept[sampling.top_k :] = 0
    if sampling.top_p < 1.0:
        # With top-k the share is of what top-k left; without, of everything, which sums to 1.
        whole = kept.sum(dtype=torch.float64) if sampling.top_k else 1.0
        before = kept.cumsum(-1, dtype=torch.float64) - kept
        kept[before >= sampling.top_p * whole] = 0
    return kept.masked_fill_(ranked < sampling.min_p * ranked[0], 0)


def drawn_of(tokens: Sequence[int], logits: Tensor, top: int, temperature: float = 1.0) -> list[Drawn]:
    """Log-probs of tokens and their alternatives, log softmax(logits / temperature), before any filter.

    Args:
      tokens: one a row.
      logits: [R V].
      top: alternatives to report.
    """
    log_probs = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
    own = log_probs.gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None])[:, 0].tolist()
    best = log_probs.topk(min(top, log_probs.shape[1]))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Drawn(token, log_prob, list(zip(ids, values, strict=True)))
        for token, log_prob, (ids, values) in zip(tokens, own, pairs, strict=True)
    ]


def invert_cumulative(cumulative: Tensor, targets: Tensor) -> Tensor:
    """The first index [R] whose cumulative mass [R K] is above the row's target [R]."""
    # right=True passes over entries without mass: their cumulative value equals their predecessor's.
    index = torch.searchsorted(cumulative, targets[:, None].contiguous(), right=True).squeeze(-1)
    return index.clamp(max=cumulative.shape[-1] - 1)
