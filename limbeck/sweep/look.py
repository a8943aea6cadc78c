"""One pass of teacher and student over whole traces: how far apart and how sure both are at every place of a response.

At position t of a response, p and q the teacher's and the student's distribution over the next token:

    divergence   D = sum p log(p / q)        what training at this place can still teach
    entropies    H(q), H(p)                  how sure the student and the teacher are
    overlap      |top_k(p) and top_k(q)| / k  whether they consider the same tokens (arXiv 2604.13016)
    end          p(end marker or end of turn) whether the teacher may end here; at a border it is neither 0 nor 1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.distill.data import RESPONSE, UNCUT
from limbeck.ledger import Ledger
from limbeck.progress import bar
from limbeck.teacher.live import LiveTeacher
from limbeck.teacher.targets import entropy_of
from limbeck.traces.batch import Example, collate, make_example
from limbeck.traces.sample import PROMPT, Sample

TOP_K = 10
"""Entries that `overlap` compares."""
BATCH_TOKENS, CHUNK_ROWS = 4096, 256
"""Most tokens in a forward pass, and most positions whose logits exist at a time."""
BORDER = 0.05
"""The teacher may end at a place where its probability of the end is between this and 1 - this."""


class Look(NamedTuple):
    """What was seen at the N response positions of all traces, one behind the other; each predicts one token."""

    owner: np.ndarray
    """int64 [N]: number of the trace."""
    token: np.ndarray
    """int64 [N]: index of the predicted token in its sample."""
    place: np.ndarray
    """float64 [N]: relative position in the response, 0 < x < 1."""
    divergence: np.ndarray
    """float32 [N], nats."""
    student_entropy: np.ndarray
    """float32 [N], nats."""
    teacher_entropy: np.ndarray
    """float32 [N], nats."""
    overlap: np.ndarray
    """float32 [N], 0 to 1."""
    end: np.ndarray
    """float32 [N]: the teacher's probability that what ends the thought or the turn comes next."""

    @property
    def borders(self) -> np.ndarray:
        """bool [N]: places where the teacher may end, and may go on."""
        return (self.end > BORDER) & (self.end < 1 - BORDER)

    def binned(self, bins: int) -> dict[str, list[float | None]]:
        """The mean of every quantity over `bins` equal parts of the response; None where no token falls."""
        part = np.minimum((self.place * bins).astype(np.int64), bins - 1)
        count = np.bincount(part, minlength=bins)
        names = ("divergence", "student_entropy", "teacher_entropy", "overlap")
        sums = {name: np.bincount(part, weights=getattr(self, name), minlength=bins) for name in names}
        return {
            name: [float(s / n) if n else None for s, n in zip(total, count, strict=True)]
            for name, total in sums.items()
        }


def look(
    student: LiveTeacher, teacher: LiveTeacher, samples: Sequence[Sample], ends: Sequence[int], vocab: int
) -> tuple[Look, Ledger]:
    """Read whole traces with both models.

    Args:
      student, teacher: models that read the same token ids.
      samples: traces with at least one response token.
      ends: token ids that end a thought or a turn.
      vocab: entries of the vocabulary that both have.
    Returns: what was seen, and what it cost.
    """
    ledger, found = Ledger(), []
    with bar("looking, tokens", sum(map(len, samples))) as progress:
        for group in _groups([make_example(sample, UNCUT, RESPONSE) for sample in samples]):
            batch = collate(group, "packed", 0)
            rows = batch.target_rows()
            theirs = teacher.targets(batch, group, rows, ledger)
            ours = student.targets(batch, group, rows, ledger)
            for chunk in torch.arange(len(rows)).split(CHUNK_ROWS):
                first, second = (targets.take(chunk).logits()[:, :vocab] for targets in (ours, theirs))
                found.append(compare(first, second, torch.tensor(list(ends))).numpy())
            progress.advance(batch.num_tokens)
    columns = np.concatenate(found)
    owner, token, place = _places(samples)
    assert len(owner) == len(columns), "every response token but a first one is predicted"
    return Look(owner, token, place, *columns.T), ledger


@torch.inference_mode()
def compare(student: Tensor, teacher: Tensor, ends: Tensor) -> Tensor:
    """Divergence, student's entropy, teacher's entropy, overlap and the teacher's probability of an end, [n 5].

    Args:
      student, teacher: logits [n V].
      ends: int64 ids.
    """
    ours, theirs = torch.log_softmax(student.float(), -1), torch.log_softmax(teacher.float(), -1)
    k = min(TOP_K, ours.shape[1])
    first, second = ours.topk(k).indices, theirs.topk(k).indices
    overlap = (first[:, :, None] == second[:, None, :]).any(-1).float().mean(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0.0)
    end = theirs[:, ends].exp().sum(-1)
    return torch.stack([divergence, entropy_of(ours), entropy_of(theirs), overlap, end], 1)


def _groups(examples: Sequence[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        if group and sum(map(len, group)) + len(example) > BATCH_TOKENS:
            yield group
            group = []
        group.append(example)
    yield group


def _places(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Owner, token and relative place of all response tokens; the first token of a sequence is never predicted."""
    starts = [max(1, int(np.sum(sample.segment_ids == PROMPT))) for sample in samples]
    spans = [np.arange(start, len(sample)) for start, sample in zip(starts, samples, strict=True)]
    owner = np.repeat(np.arange(len(samples)), [len(span) for span in spans])
    place = [(span - span[0] + 0.5) / len(span) for span in spans]
    return owner, np.concatenate(spans), np.concatenate(place)
