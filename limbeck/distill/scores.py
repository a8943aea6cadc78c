"""How much a position matters: scores of the supervised positions of a micro-batch, and what is made of them.

    random                       a seeded draw: the twin that every other score must beat
    teacher_entropy              H(p), p the teacher
    student_entropy              H(q), q the student                                       SE-KD, arXiv 2602.01395
    divergence                   D(p, q), as the loss takes it
    student_entropy+divergence   the sum of both, standardised within the sequence         SE-KD's best row
    tip                          h + d - h d of both, each brought to [0, 1] within        TIP, arXiv 2604.14084
                                 the sequence: unsure, or sure and far from the teacher

All are taken within a sequence, so none depends on the micro-batch, the rank or the layout. Differs from the papers:
they rank over a batch, which no split of the batch would leave unchanged; TIP scores what the student wrote, limbeck
also given traces.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from limbeck.distill.config import LossConfig
from limbeck.models.anatomy import Head
from limbeck.models.logits import ChunkedLogits
from limbeck.models.sharded_softmax import WHOLE
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.targets import Distance, OneTeacherTargets, TeacherTargets, weighted_sum
from limbeck.traces.batch import Example
from limbeck.traces.truncate import share_of

CHUNK_ROWS = 256
"""Most positions whose logits exist at a time."""


def keep_top(scores: Tensor, owner: Tensor, coef: Tensor, fraction: float) -> Tensor:
    """Coefficients with all but the best share of each sequence set to 0, its sum over the sequence unchanged.

    Of n_i positions with a coefficient, max(1, floor(x n_i)) are kept; of equal scores the first.

    Args:
      scores: float [N].
      owner: int64 [N], the sequence of each position.
      coef: float [N]; positions with 0 take no part.
      fraction: x in (0, 1].
    Returns: float [N].
    """
    place = torch.nonzero(coef != 0)[:, 0]
    of, score = owner[place].cpu().numpy(), scores[place].double().cpu().numpy()
    order = np.lexsort((np.arange(len(place)), -score, of))
    _, first, counts = np.unique(of[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, counts)
    limits = np.repeat([share_of(int(n), fraction) for n in counts], counts)
    kept = torch.zeros_like(coef)
    chosen = place[torch.from_numpy(order[rank < limits]).to(place.device)]
    kept[chosen] = coef[chosen]
    return _with_sums_of(coef, kept, owner)


def weigh_softly(scores: Tensor, owner: Tensor, coef: Tensor) -> Tensor:
    """Coefficients times their score brought to [0, 1], the sum over each sequence unchanged; arguments as `keep_top`.

    Where all scores of a sequence are the same, its coefficients stay.
    """
    return _with_sums_of(coef, coef * scaled(scores, owner, coef != 0), owner)


def scaled(scores: Tensor, owner: Tensor, takes_part: Tensor) -> Tensor:
    """(s - min) / (max - min) within each sequence, over the positions that take part; 1 where all are the same."""
    low, high = (
        _of_sequence(scores.masked_fill(~takes_part, blank), owner, how)
        for blank, how in ((torch.inf, "amin"), (-torch.inf, "amax"))
    )
    range_ = (high - low)[owner]
    return torch.where(range_ > 0, (scores - low[owner]) / range_, 1.0).masked_fill(~takes_part, 0.0)


def standardised(scores: Tensor, owner: Tensor, takes_part: Tensor) -> Tensor:
    """(s - mean) / standard deviation within each sequence, over those that take part; 0 where all are the same."""
    part = takes_part.to(scores.dtype)
    count = _of_sequence(part, owner, "sum").clamp_min(1)
    centred = (scores - (_of_sequence(scores * part, owner, "sum") / count)[owner]) * part
    deviation = (_of_sequence(centred.square(), owner, "sum") / count).sqrt()[owner]
    return torch.where(deviation > 1e-6, centred / deviation, 0.0)


def random_scores(examples: Sequence[Example], owner: Tensor, seed: int) -> Tensor:
    """Draws in [0, 1) that depend on the seed and on the sequence's own tokens alone: float32 [N]."""
    counts = torch.bincount(owner, minlength=len(examples)).tolist()
    draws = [
        np.random.default_rng((seed, zlib.crc32(example.sample.input_ids.tobytes()))).random(count, dtype=np.float32)
        for example, count in zip(examples, counts, strict=True)
    ]
    return torch.from_numpy(np.concatenate(draws)).to(owner.device)


def student_entropy(hidden: Tensor, head: Head, vocab: int) -> Tensor:
    """H(q) in nats [N] at temperature 1, from a pass through the student's head without gradients."""
    return DenseTargets(hidden.detach(), *head).entropy(vocab)


@torch.no_grad()
def divergences(hidden: Tensor, head: Head, targets: TeacherTargets, config: LossConfig, vocab: int) -> Tensor:
    """D(teacher, student) [N], as the loss takes it, from a first pass through the student's head without gradients.

    Of several teachers it is sum_i w_i D(p_i, student), with a pass for each.
    """
    distance = Distance(config.divergence.bind(), config.temperature, WHOLE)
    with torch.autocast(hidden.device.type, enabled=False):
        return weighted_sum(
            (weight, _divergences(hidden, head, part, distance, vocab)) for part, weight in targets.by_teacher()
        )


def _divergences(hidden: Tensor, head: Head, targets: OneTeacherTargets, distance: Distance, vocab: int) -> Tensor:
    ones = torch.ones(len(hidden), device=hidden.device)
    student, teacher = ChunkedLogits(hidden, head, vocab), targets.reader(ones, vocab, distance)
    student.allocate(min(CHUNK_ROWS, len(hidden)))
    teacher.allocate(min(CHUNK_ROWS, len(hidden)))
    values = []
    for index in torch.arange(len(hidden), device=hidden.device).split(CHUNK_ROWS):
        states = student.states(index)
        teacher.read(index, states)
        logits = student.finish(student.logits(states), torch.float32)
        values.append(teacher.row_loss(slice(None), logits, None, ones[index, None]))
    return torch.cat(values)


def _of_sequence(values: Tensor, owner: Tensor, how: str) -> Tensor:
    """A sum, a minimum or a maximum for each sequence."""
    found = values.new_zeros(int(owner.max()) + 1 if len(owner) else 0)
    return found.scatter_reduce(0, owner, values, how, include_self=False)


def _with_sums_of(whole: Tensor, part: Tensor, owner: Tensor) -> Tensor:
    """`part`, made larger by one factor a sequence so that it sums to what `whole` does there."""
    sums, rest = (_of_sequence(values, owner, "sum") for values in (whole, part))
    return part * (sums / rest.clamp_min(torch.finfo(rest.dtype).tiny))[owner]
