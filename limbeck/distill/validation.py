"""The held-out losses of a student, on whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from limbeck.distill.config import DistillConfig, StudentConfig
from limbeck.distill.microbatch import StepLoss, Totals, step_totals
from limbeck.distill.parallel import join, sum_numbers
from limbeck.distill.setup import Run, set_up
from limbeck.traces.batch import Example


def measure(config: DistillConfig, model: str) -> dict[str, Any]:
    """The held-out losses (`validate`, with the divergence) of a model as it is.

    Args:
      config: says which sequences, teacher and divergence; its student is not used.
      model: directory, alias or hub id.
    """
    ranks = join(config.training.parallel.tensor_parallel_size)
    return validate(set_up(replace(config, student=StudentConfig(model=model)), ranks), with_kd=True)


def validate(setup: Run, *, with_kd: bool = False) -> dict[str, Any]:
    """Mean losses in nats a token over thought and answer of the uncut held-out sequences.

    Returns: `validation_ce` and, with_kd, `validation_kd`, the divergence from the teacher as the loss takes it; None
    where nothing is held out. Of several sources `validation_ce_of` has the CE of each by its name.
    """
    names = ("validation_ce", "validation_kd") if with_kd else ("validation_ce",)
    kd_ratio = 0.5 if with_kd else 0.0
    # Sums, not means: where the vocabulary is shared out, rows of other processes are among these.
    loss = StepLoss(replace(setup.config.loss, normalization="token_mean"), kd_ratio, Totals(1.0, 1.0))
    sums = np.zeros((max(1, len(setup.data.sources)), 4))
    model, flops = setup.student.model, dict(setup.ledger.flops)
    was_training = model.training
    model.eval()
    with setup.ledger.phase("validation"), torch.no_grad():
        for group in _groups(setup):
            totals = step_totals(group, "token_mean")
            given = setup.microbatch(group, loss)
            with setup.autocast():
                found = setup.objective(given)
            ce = 0.0 if found is None else found.ce_sum.item() / (1 - kd_ratio)
            kd = 0.0 if found is None or not with_kd else found.kd_sum.item() / kd_ratio
            sums[group[0].sample.origin if group else 0] += (ce, kd, totals.ce, totals.kd)
    model.train(was_training)
    setup.ledger.flops = flops  # a live teacher charges its own; validation is no part of the training's cost
    sums = np.array(sum_numbers(sums.ravel().tolist(), setup.ranks)).reshape(sums.shape)
    ce, kd, ce_weight, kd_weight = sums.sum(axis=0).tolist()
    means = (ce / ce_weight if ce_weight else None, kd / kd_weight if kd_weight else None)
    result: dict[str, Any] = dict(zip(names, means, strict=False))
    if setup.data.sources:
        pairs = zip(setup.data.sources, sums.tolist(), strict=True)
        result["validation_ce_of"] = {name: row[0] / row[2] if row[2] else None for name, row in pairs}
    return result


def _groups(setup: Run) -> list[list[Example]]:
    """This process's share of the held-out examples, in groups that one forward pass holds.

    Where all processes run together, the shares have the same number of groups; those that fill one up are empty.
    """
    ranks = setup.ranks
    shares = [_share(setup, slice(reader, None, ranks.readers)) for reader in range(ranks.readers)]
    own = shares[ranks.reader]
    longest = max(map(len, shares)) if setup.in_step else len(own)
    return own + [[]] * (longest - len(own))


def _share(setup: Run, share: slice) -> list[list[Example]]:
    if setup.data.validation_groups is not None:
        return setup.data.validation_groups[share]
    own = setup.data.validation[share]
    limit = setup.config.training.microbatch_tokens
    origins = sorted({example.sample.origin for example in own})
    return [
        group
        for origin in origins
        for group in _by_length([example for example in own if example.sample.origin == origin], limit)
    ]


def _by_length(examples: Sequence[Example], limit: int) -> list[list[Example]]:
    """Groups of like length, which `limit` tokens hold with their padding."""
    groups: list[list[Example]] = []
    longest = 0
    for example in sorted(examples, key=len):
        longest = max(longest, len(example))
        if not groups or longest * (len(groups[-1]) + 1) > limit:
            groups.append([])
            longest = len(example)
        groups[-1].append(example)
    return groups
