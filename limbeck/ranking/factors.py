"""A factor model of members by what they did: no text, a minute of training, and hard to beat.

    log-odds = offset + b_i + s m + v_i . sum_j y_j w_j / sqrt(H)      m = sum_j (y_j - tanh b_j) / sqrt(H)

for an item i and the H events j of the member's history, y = 1 where the member took the item and -1 elsewhere: the
bias of the item, how the member's labels compare with those of the items met, and a product of vectors. It knows a
member by the history alone, so that new members are no exception.

Source: the asymmetric factors of SVD++ (Koren 2008, equation 15) on labels, with a logistic loss.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.ranking.arrays import Arrays
from limbeck.ranking.auc import auc

FACTORS, EPOCHS = 16, 8
_LEAST_BATCH, _MOST_STEPS = 16, 400
"""Requests of a step, at least; steps of an epoch, at most."""
_MOST_ITEMS = 50_000
"""Items with factors of their own; rarer ones share theirs."""


class Factors(nn.Module):
    """The model over `count` numbered items."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.bias, self.item, self.seen = (nn.Embedding(count, width) for width in (1, FACTORS, FACTORS))
        self.offset, self.slope = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        for table in (self.bias, self.item, self.seen):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, given: Arrays) -> Tensor:
        """Log-odds [M] of all candidates."""
        items, owners, past, past_owners = (
            torch.from_numpy(np.ascontiguousarray(values)).long()
            for values in (given.items, given.owners, given.past, given.past_owners)
        )
        signs = torch.from_numpy(np.where(given.past_labels, 1.0, -1.0)).float()
        length = torch.bincount(past_owners, minlength=given.num_requests).clamp(min=1).sqrt()
        moods = signs - self.bias(past)[:, 0].tanh()
        mood = torch.zeros(given.num_requests).index_add(0, past_owners, moods) / length
        members = torch.zeros(given.num_requests, FACTORS)
        members = members.index_add(0, past_owners, self.seen(past) * signs[:, None]) / length[:, None]
        products = (self.item(items) * members[owners]).sum(1)
        return self.offset + self.bias(items)[:, 0] + self.slope * mood[owners] + products


class Fitted:
    """A factor model with the numbering of its items."""

    def __init__(self, model: Factors, numbers: np.ndarray) -> None:
        self._model, self._numbers = model, numbers

    @torch.no_grad()
    def scores(self, given: Arrays) -> np.ndarray:
        """Log-odds, float [M], of all candidates."""
        return self._model(self._renumbered(given)).numpy()

    def _renumbered(self, given: Arrays) -> Arrays:
        return given._replace(items=self._numbers[given.items], past=self._numbers[given.past])


def fit_factors(train: Arrays, held_out: Arrays, num_items: int, seed: int = 0) -> Fitted:
    """The model after the epoch that is best by AUC on the held-out requests.

    Args:
      train: in the order of time, which is the order of training.
      held_out: of them only the labels are read; where they are of one kind the last epoch counts.
      num_items: the items are numbered from 0 to it.
      seed: of the weights.
    """
    numbers = _numbers(train, num_items)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Factors(int(numbers.max()) + 1)
    fitted = Fitted(model, numbers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    size = max(_LEAST_BATCH, -(-train.num_requests // _MOST_STEPS))
    batches = [
        (part, torch.from_numpy(part.labels).float())
        for start in range(0, train.num_requests, size)
        for part in [fitted._renumbered(train.part(start, min(start + size, train.num_requests)))]
    ]
    best, kept = -1.0, copy.deepcopy(model.state_dict())
    for _ in range(EPOCHS):
        for part, labels in batches:
            loss = nn.functional.binary_cross_entropy_with_logits(model(part), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        reached = auc(fitted.scores(held_out), held_out.labels) if len(held_out.labels) else np.nan
        if np.isnan(reached) or reached > best:
            best, kept = float(np.nan_to_num(reached)), copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return fitted


def _numbers(train: Arrays, num_items: int) -> np.ndarray:
    """int [num_items]: the place of each item's factors; items that are rare in training share the last."""
    counts = np.bincount(train.items, minlength=num_items) + np.bincount(train.past, minlength=num_items)
    frequent = np.argsort(-counts, kind="stable")[:_MOST_ITEMS]
    frequent = frequent[counts[frequent] > 0]
    numbers = np.full(num_items, len(frequent), dtype=np.int64)
    numbers[frequent] = np.arange(len(frequent))
    return numbers
