"""Scores from one forward pass: P(yes) against P(no) at the position behind each candidate, and no other.

Only the answer positions reach the head, and of the head only the two label rows; the label mass, a sign of health,
takes all rows at the same positions. This is the plain form that faster engines are compared with: exact, without a
cache, one request at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.models.anatomy import causal_lm_of, head_of, hidden_rows, hidden_states
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.ranking.featurize import EncodedRequest, Labels


class Scores(NamedTuple):
    """Of the N candidates of a request."""

    log_odds: Tensor
    """float32 [N]: logit of yes less logit of no; ranks, also where the probability is 0 or 1 in float32."""
    probability: Tensor
    """float32 [N]: P(yes) / (P(yes) + P(no))."""
    label_mass: Tensor
    """float32 [N]: P(yes) + P(no) over the whole vocabulary; near 0 where the model would say something else."""


@torch.no_grad()
def score_request(model: Any, request: EncodedRequest, labels: Labels, vocab_size: int | None = None) -> Scores:
    """Scores of all candidates of one request.

    A model loaded with the packed layout computes the shared prefix once where its backbone allows (models/lean.py);
    any other is run on one pair after the other.

    Args:
      model: a causal LM in evaluation mode.
      vocab_size: the tokenizer's real vocabulary; head rows from there on are padding and have no mass.
    """
    pairs = [request.pair(index) for index in range(len(request.candidates))]
    is_packed = causal_lm_of(model).config._attn_implementation == PACKED_ATTENTION
    states = _packed_states(model, pairs) if is_packed else torch.cat([_last_state(model, pair) for pair in pairs])
    return _scores(model, states, labels, vocab_size)


def _packed_states(model: Any, pairs: Sequence[np.ndarray]) -> Tensor:
    """Last hidden state [N D] of each pair, all pairs in one packed row."""
    lengths = [len(pair) for pair in pairs]
    device = head_of(model).weight.device
    ids = torch.from_numpy(np.concatenate(pairs).astype(np.int64)).to(device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    rows = torch.tensor(lengths).cumsum(0).to(device) - 1
    return hidden_rows(model, ids[None], positions[None], rows, lengths)[0]


def _last_state(model: Any, pair: np.ndarray) -> Tensor:
    """Last hidden state [1 D] of one pair by itself."""
    ids = torch.from_numpy(pair.astype(np.int64)).to(head_of(model).weight.device)[None]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return hidden_states(model, ids, positions)[:, -1]


def _scores(model: Any, states: Tensor, labels: Labels, vocab_size: int | None) -> Scores:
    head = head_of(model)
    logits = head.rows(torch.tensor(labels, device=head.weight.device)).logits(states).float()
    everything = head.rows(slice(vocab_size)).logits(states).float()
    log_odds = logits[:, 0] - logits[:, 1]
    mass = (torch.logsumexp(logits, -1) - torch.logsumexp(everything, -1)).exp()
    return Scores(log_odds, torch.sigmoid(log_odds), mass)
