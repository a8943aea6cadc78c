"""The held-out losses of a student, on whole sequences."""

from __future__ import annotations

from dataclasses import replace

import torch

from limbeck.distill.config import DistillConfig, StudentConfig
from limbeck.distill.microbatch import StepLoss, Totals, step_totals
from limbeck.distill.parallel import join, sum_numbers
from limbeck.distill.setup import Run, set_up
from limbeck.traces.batch import Example


def measure(config: DistillConfig, model: str) -> dict[str, float | None]:
    """The held-out losses (`validate`, with the divergence) of a model as it is.

    Args:
      config: says which sequences, teacher and divergence; its student is not used.
      model: directory, alias or hub id.
    """
    ranks = join(config.training.parallel.tensor_parallel_size)
    return validate(set_up(replace(config, student=StudentConfig(model=model)), ranks), with_kd=True)


def validate(setup: Run, *, with_kd: bool = False) -> dict[str, float | None]:
    """Mean losses in nats a token over thought and answer of the uncut held-out sequences.

    Returns: `validation_ce` and, with_kd, `validation_kd`, the divergence from the teacher as the loss takes it; None
    where nothing is held out.
    """
    names = ("validation_ce", "validation_kd") if with_kd else ("validation_ce",)
    kd_ratio = 0.5 if with_kd else 0.0
    # Sums, not means: where the vocabulary is shared out, rows of other processes are among these.
    loss = StepLoss(replace(setup.config.loss, normalization="token_mean"), kd_ratio, Totals(1.0, 1.0))
    ce, kd, ce_weight, kd_weight = 0.0, 0.0, 0.0, 0.0
    model, flops = setup.student.model, dict(setup.ledger.flops)
    was_training = model.training
    model.eval()
    with setup.ledger.phase("validation"), torch.no_grad():
        for group in _groups(setup):
            totals = step_totals(group, "token_mean")
            given = setup.microbatch(group, loss)
            with setup.autocast():
                found = setup.objective(given)
            ce += 0.0 if found is None else found.ce_sum.item() / (1 - kd_ratio)
            kd += 0.0 if found is None or not with_kd else found.kd_sum.item() / kd_ratio
            ce_weight, kd_weight = ce_weight + totals.ce, kd_weight + totals.kd
    model.train(was_training)
    setup.ledger.flops = flops  # a live teacher charges its own; validation is no part of the training's cost
    ce, kd, ce_weight, kd_weight = sum_numbers([ce, kd, ce_weight, kd_weight], setup.ranks)
    means = (ce / ce_weight if ce_weight else None, kd / kd_weight if kd_weight else None)
    return dict(zip(names, means, strict=False))


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
    groups: list[list[Example]] = []
    longest = 0
    for example in sorted(setup.data.validation[share], key=len):
        longest = max(longest, len(example))
        if not groups or longest * (len(groups[-1]) + 1) > setup.config.training.microbatch_tokens:
            groups.append([])
            longest = len(example)
        groups[-1].append(example)
    return groups
