"""The stage `distill`: traces and a student in, a trained checkpoint out.

1. Load the student, its tokenizer and the teacher; check that they fit.
2. Read, select, split, render and cut the traces; plan every step of the run.
3. For each step: micro-batches forward and backward, sum gradients over ranks, clip, update, log.
4. Validate on uncut sequences; write the last or the best weights, the metrics and the manifest.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from limbeck.checkpoint import Checkpoint, output_directory, write_manifest
from limbeck.config import config_hash, to_dict
from limbeck.distill.config import DistillConfig, TrainingConfig
from limbeck.distill.data import fingerprint
from limbeck.distill.guard import BEST_PREFIX, Guard
from limbeck.distill.output import inputs_of, keep_lines, metrics_of, write_model
from limbeck.distill.parallel import Ranks, clip_gradients, join, sum_gradients, sum_numbers, total_cost, wait
from limbeck.distill.preflight import report
from limbeck.distill.setup import Run, planned_steps, same_result, set_up
from limbeck.distill.state import load_state, save_state
from limbeck.distill.validation import measure, validate
from limbeck.distill.work import Work, given_work, rollout_work
from limbeck.errors import LimbeckError
from limbeck.ledger import Ledger, flop_counter
from limbeck.models.sharded import is_sharded
from limbeck.optim.schedules import learning_rate_factor
from limbeck.progress import bar
from limbeck.traces.batch import Example

__all__ = ["inputs_of", "measure", "planned_steps", "run", "run_loop"]


def run(
    config: DistillConfig,
    source: Checkpoint | None,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> Checkpoint:
    """Train one student.

    Args:
      config: the run.
      source: a checkpoint to start from in place of `config.student.model`.
      out: directory to write; work happens in `<out>.partial` until all of it is there.
      overwrite: replace an existing output.
      resume: go on from the last saved state of an interrupted run; it ends with the same bits.
    """

    def prepare(ranks: Ranks) -> Run:
        setup = set_up(config, source, ranks)
        if ranks.is_first:
            setup.data.counts["preflight"] = report(config, setup.model, setup.tokenizer, setup.data.train)
        return setup

    def write(setup: Run, working: Path, kept: Mapping[str, Any]) -> None:
        write_model(setup, working)
        write_manifest(
            working,
            stage="distill",
            config=config,
            inputs=inputs_of(config, source),
            ledger=total_cost(setup.ledger, setup.ranks),
            metrics=metrics_of(config, kept),
            counts=setup.data.counts,
        )

    return run_loop(prepare, write, out, config.training, overwrite=overwrite, resume=resume)


def run_loop(
    prepare: Callable[[Ranks], Run],
    write: Callable[[Run, Path, Mapping[str, Any]], None],
    out: Path,
    training: TrainingConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> Checkpoint:
    """Set up a run on every rank, train it, and write it: the frame of all stages that train.

    Args:
      prepare: makes the run of one rank.
      write: fills the working directory, given the metrics of the step whose weights the model has; on the first rank.
      out, overwrite, resume: as for `run`.
      training: says how many threads there are and how processes work together.
    """
    ranks = join(training.parallel.tensor_parallel_size)
    if training.num_threads is not None:
        torch.set_num_threads(training.num_threads)
    if not ranks.is_first:
        setup = prepare(ranks)
        wait(ranks)
        _train(setup, out.with_name(out.name + ".partial"), resume)
        setup.whole()
        total_cost(setup.ledger, ranks)
        wait(ranks)
        return Checkpoint(out)
    with output_directory(out, overwrite=overwrite, resume=resume) as working:
        setup = prepare(ranks)
        wait(ranks)
        kept = _train(setup, working, resume)
        write(setup.whole(), working, kept)
        for state in working.glob("state*"):
            shutil.rmtree(state)
        for best in working.glob(BEST_PREFIX + "*"):
            best.unlink()
    wait(ranks)
    return Checkpoint(out)


def _train(setup: Run, working: Path, resume: bool) -> Mapping[str, Any]:
    """All steps that are left; returns the metrics of the step whose weights the model has at the end."""
    training, ranks = setup.config.training, setup.ranks
    examples = fingerprint(setup.data.train)
    identity = config_hash({"config": to_dict(same_result(setup.config)), "traces": examples, **setup.identity})
    guard = _guard(setup, working)
    # The saved cost is that of all ranks, so only one of them goes on from it.
    ledger = setup.ledger if ranks.is_first else Ledger(ranks.device)
    resumed = load_state(working, setup.model, setup.optimizer, ledger, identity) if resume else None
    first = resumed.step if resumed else 0
    if resumed and resumed.rollouts is not None and setup.rollouts is not None:
        setup.rollouts.restore(resumed.rollouts)
    metrics = working / "metrics.jsonl"
    if ranks.is_first:
        keep_lines(metrics, first)
    if guard is not None and first:
        guard.replay(map(json.loads, metrics.read_text(encoding="utf-8").splitlines()[:first]))
    setup.model.train()
    total_tokens = sum(len(setup.data.train[i]) for step in setup.steps[first:] for i in step.indices)
    with bar("distilling" if setup.teacher else "fine-tuning", total_tokens) as progress:
        for number in range(first, len(setup.steps)):
            row = _step(setup, number)
            is_last = number + 1 == len(setup.steps)
            if is_last or _is_due(number + 1, training.validate_every_steps):
                row |= validate(setup, with_kd=training.keep_best == "kd")
            if guard is not None:
                guard.watch(row, setup.model)
                is_last = is_last or guard.is_over
            if ranks.is_first:
                with metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if not is_last and _is_due(number + 1, training.save_every_steps):
                _save(setup, working, number + 1, identity)
                if guard is not None:
                    guard.saved()
            tokens = sum(len(setup.data.train[i]) for i in setup.steps[number].indices)
            speed = row["tokens"] / max(1e-9, setup.ledger.train_seconds)
            progress.advance(tokens, f"loss {row['loss']:.4f}, {speed:,.0f} tokens/s")
            if is_last:
                break
    if guard is not None:
        wait(ranks)
        guard.load_best(setup.model)
    return row if guard is None or guard.best is None else guard.best


def _save(setup: Run, working: Path, step: int, identity: str) -> None:
    cost = total_cost(setup.ledger, setup.ranks)
    if setup.ranks.is_first or is_sharded(setup.model):
        with setup.ledger.phase("saving"):
            rollouts = None if setup.rollouts is None else setup.rollouts.state()
            save_state(working, step, setup.model, setup.optimizer, cost, identity, rollouts)


def _guard(setup: Run, working: Path) -> Guard | None:
    """The guard that the config asks for, with the weights that the run starts from as its first."""
    training = setup.config.training
    if training.keep_best is None:
        return None
    guard = Guard(working, f"validation_{training.keep_best}", training.patience, setup.ranks.is_first)
    start = {"step": 0, **validate(setup, with_kd=training.keep_best == "kd")}
    guard.begin(start, setup.model)
    return guard


def _step(setup: Run, number: int) -> dict[str, Any]:
    """One optimizer step; returns its line of metrics.jsonl."""
    config, ledger = setup.config, setup.ledger
    torch.manual_seed((config.training.seed * 1_000_003 + number) * 1_009 + setup.ranks.reader)
    work = _work(setup, number)
    # torch's counter sees this process's products alone, which are all of its micro-batch only where none is shared.
    parallel, ce, kd = config.training.parallel, 0.0, 0.0
    is_shared = parallel.shard_head or parallel.tensor_parallel_size > 1
    for examples in work.microbatches:
        forward_backward = _forward_backward if ledger.audit or is_shared else _audited
        ce_part, kd_part = forward_backward(setup, examples, work)
        ce, kd = ce + ce_part, kd + kd_part
    ce, kd, tokens = sum_numbers([ce, kd, ledger.counts["tokens"]], setup.ranks)
    with ledger.phase("optimizer"):
        sum_gradients(setup.model, setup.ranks.world_size)
        if setup.zeros is not None:
            setup.zeros.clear_gradients()
        norm = clip_gradients(setup.model, config.training.clip_norm or float("inf"))
        rate = _learning_rate(config, number, len(setup.steps))
        _refuse_divergence(number, ce + kd, norm)
        for group_settings in setup.optimizer.param_groups:
            group_settings["lr"] = rate
        if work.has_loss:
            setup.optimizer.step()
            if setup.zeros is not None:
                setup.zeros.clear_weights()
        setup.optimizer.zero_grad(set_to_none=True)
    if setup.ranks.is_first:
        ledger.count(steps=1)
    row = {"step": number + 1, "loss": ce + kd, "ce_term": ce, "kd_term": kd}
    return row | {"gradient_norm": norm, "learning_rate": rate, "tokens": int(tokens), **work.metrics}


def _work(setup: Run, number: int) -> Work:
    """The given traces of the step or, when it is due, what the student writes."""
    ranks, rollouts = setup.ranks, setup.rollouts
    if rollouts is None or not rollouts.is_due(number):
        return given_work(setup.config, setup.data.train, setup.steps[number], ranks.reader, setup.in_step)
    rollouts.refresh(number, setup.model, setup.sizes, setup.ledger, ranks)
    return rollout_work(setup.config, rollouts, number, ranks.reader, ranks.readers, setup.in_step)


def _learning_rate(config: DistillConfig, number: int, total_steps: int) -> float:
    scheduled = config.optimizer.learning_rate * learning_rate_factor(config.schedule, number, total_steps)
    return scheduled * config.training.rate_factor(number)


def _refuse_divergence(number: int, loss: float, norm: float) -> None:
    """Stop before the update that would make every weight NaN."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise LimbeckError(
            f"step {number + 1}: the loss is {loss} and the gradient norm {norm}; lower optimizer.learning_rate or "
            "look at the traces of this step."
        )


def _forward_backward(setup: Run, examples: Sequence[Example], work: Work) -> tuple[float, float]:
    loss = setup.loss(examples, work, setup.config.supervision.select)
    if loss is None:
        return 0.0, 0.0
    with setup.ledger.phase("student"):
        loss.total.backward()
    return float(loss.ce_sum), float(loss.kd_sum)


def _audited(setup: Run, examples: Sequence[Example], work: Work) -> tuple[float, float]:
    """The first micro-batch with a loss, counted by torch as well as by the formulas."""
    before = sum(setup.ledger.flops.values())
    with flop_counter() as counter:
        result = _forward_backward(setup, examples, work)
    formula = sum(setup.ledger.flops.values()) - before
    if formula:
        setup.ledger.audit = {"formula_flops": formula, "counted_flops": counter.get_total_flops()}
    return result


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
