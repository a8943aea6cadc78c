"""What each round of a recovery removes and how long it trains: sizes from the unpruned model, tokens split evenly."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from limbeck.checkpoint import write_json
from limbeck.compress.blocks import Blocks
from limbeck.compress.budget import BudgetConfig
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.prune.stage import SOLVERS, PruneConfig, sizes_after
from limbeck.compress.shape_cost import Shape, ShapeCost, whole_shape
from limbeck.compress.weights import dtype_of
from limbeck.config import config_hash
from limbeck.distill.config import DistillConfig, TrainingConfig
from limbeck.distill.data import Data, prepare
from limbeck.distill.train import planned_steps
from limbeck.distill.zeros import PRUNED_FROM
from limbeck.errors import CheckpointError, ConfigError
from limbeck.models.load import load_tokenizer, model_hash

SEED_STRIDE = 1_000_003
"""Between the seeds of two rounds, so that each sees its data in another order."""


class Round(NamedTuple):
    """One round."""

    prune: PruneConfig
    """Its cut, by the shares of what the round before left; `model` is still the first round's."""
    training: Any
    """Config of its share of the training."""


def plan_rounds(
    prune: PruneConfig, distill: DistillConfig, rounds: int, *, config: Any = None, data: Data | None = None
) -> list[Round]:
    """All rounds of a recovery.

    Args:
      config: of the unpruned model; that of `prune.model` when None.
      data: what the rounds train on; read when None.
    Raises: ConfigError when a round would remove nothing.
    """
    cuts, trainings = plan_cuts(prune, rounds, config), _trainings(distill, prune.model, rounds, data)
    return [Round(cut, replace(distill, training=training)) for cut, training in zip(cuts, trainings, strict=True)]


def plan_cuts(prune: PruneConfig, rounds: int, config: Any = None) -> list[PruneConfig]:
    """What each round removes of what the round before left; `model` is still the unpruned one.

    Raises: ConfigError when a round would remove nothing.
    """
    if prune.method in SOLVERS:
        return [replace(prune, pattern=pattern) for pattern in round_patterns(prune.pattern, rounds)]
    config = Blocks(prune.model).config if config is None else config
    if prune.budget is not None:
        return list(_budget_cuts(prune, prune.budget, config, rounds))
    return list(_structured_cuts(prune, config, rounds))


def round_patterns(pattern: str, rounds: int) -> list[str]:
    """The pattern after each round: the share of zeros, or the weights that go of each group, grows evenly.

    2:4 in two rounds is 3:4, then 2:4.
    Raises: ConfigError when a group has fewer weights to lose than there are rounds, or the first share is too small.
    """
    target = Pattern.parse(pattern)
    if target.group and target.kept:
        removed = target.group - target.kept
        if rounds > removed:
            raise ConfigError(
                f"rounds: {rounds}, but {pattern} removes {removed} of every {target.group} weights, at least one a "
                f"round; use 1 to {removed} rounds"
            )
        patterns = [f"{target.group - round(removed * r / rounds)}:{target.group}" for r in range(1, rounds + 1)]
    else:
        patterns = [repr(target.sparsity * r / rounds) for r in range(1, rounds)] + [pattern]
    if Pattern.parse(patterns[0]).sparsity < PRUNED_FROM:
        raise ConfigError(
            f"rounds: the first of {rounds} would leave fewer than {PRUNED_FROM:.0%} zeros ({patterns[0]}), which "
            "training cannot tell from chance; use fewer rounds or a sparser pattern"
        )
    return patterns


def round_shapes(prune: PruneConfig, config: Any, rounds: int) -> list[Shape]:
    """Shapes of the model before the first round and after each; the last is that of pruning once."""
    whole = whole_shape(config)
    shapes = [whole]
    for number in range(1, rounds + 1):
        share = number / rounds
        neurons, kv_groups = whole.neurons, whole.kv_groups
        if prune.method == "osscar":
            cuts = {name: getattr(prune, name) * share for name in ("neuron_sparsity", "kv_group_sparsity")}
            neurons, kv_groups = sizes_after(replace(prune, **cuts), config)
        layers = len(whole.layers) - round(prune.drop_layers * share)
        shapes.append(Shape(neurons, kv_groups, whole.layers[:layers]))
    return shapes


def _structured_cuts(prune: PruneConfig, config: Any, rounds: int) -> Iterator[PruneConfig]:
    shapes = round_shapes(prune, config, rounds)
    for number, (before, after) in enumerate(itertools.pairwise(shapes), start=1):
        if before == after:
            raise ConfigError(
                f"rounds: round {number} of {rounds} would remove nothing ({len(after.layers)} layers, "
                f"{after.neurons} neurons, {after.kv_groups} KV groups before and after); use fewer rounds, or a "
                "smaller multiple_of"
            )
        yield replace(
            prune,
            drop_layers=len(before.layers) - len(after.layers),
            neuron_sparsity=1 - after.neurons / before.neurons,
            kv_group_sparsity=1 - after.kv_groups / before.kv_groups,
        )


def _budget_cuts(prune: PruneConfig, budget: BudgetConfig, config: Any, rounds: int) -> Iterator[PruneConfig]:
    """Targets that fall evenly from what the unpruned model costs."""
    cost = ShapeCost(
        config, dtype_of(prune.model), torch.device("cpu"), budget.metric, budget.prompt_tokens, budget.repeats
    )
    start = cost(whole_shape(config)) if rounds > 1 else budget.target
    for number in range(1, rounds + 1):
        target = start + (budget.target - start) * number / rounds
        yield replace(prune, budget=replace(budget, target=target))


def _trainings(distill: DistillConfig, model: str, rounds: int, given: Data | None) -> list[TrainingConfig]:
    """The whole budget for one round, or its tokens split evenly; what a round's last step adds, the next one lacks."""
    if rounds == 1:
        return [distill.training]
    data = prepare(distill, load_tokenizer(model)) if given is None else given

    def tokens(training: TrainingConfig) -> int:
        steps = planned_steps(replace(distill, training=training), data)
        return sum(len(data.train[index]) for step in steps for index in step.indices)

    total, planned, trainings = tokens(distill.training), 0, []
    for number in range(1, rounds + 1):
        seed = (distill.training.seed + SEED_STRIDE * (number - 1)) % 2**32
        share = max(round(total * number / rounds) - planned, 1)
        trainings.append(replace(distill.training, max_tokens=share, max_steps=None, seed=seed))
        planned += tokens(trainings[-1])
    return trainings


def claim(state: Path, config: Mapping[str, Any], model: str) -> None:
    """Mark a working directory with what decides the result, so that a failure leaves the finished rounds for --resume.

    Raises: CheckpointError when the mark there is of another config or model.
    """
    identity = config_hash({"config": dict(config), "model": model_hash(model)})
    if state.exists() and json.loads(state.read_text(encoding="utf-8"))["identity"] != identity:
        raise CheckpointError(
            f"{state.parent}: the interrupted run there has another config or model; use the same ones, or drop "
            "--resume."
        )
    write_json(state, {"identity": identity})


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned when it was first called for this file."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))
