"""The stage `distill`: traces and a student in, a trained checkpoint out.

1. Load the student, its tokenizer and the teacher; check that they fit.
2. Read, select, split, render and cut the traces; plan every step of the run.
3. For each step: micro-batches forward and backward, sum gradients over ranks, clip, update, log.
4. Validate on uncut sequences; write the last or the best weights, the metrics and the manifest.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.checkpoint import Checkpoint, write_manifest
from limbeck.distill.config import DistillConfig
from limbeck.distill.forgetting import source_lines, source_rows
from limbeck.distill.job import training_job
from limbeck.distill.numbers import Pending
from limbeck.distill.output import costs_of_traces, inputs_of, metrics_of, write_model
from limbeck.distill.parallel import clip_gradients, skip_unless_finite, sum_gradients, throughput, total_cost, wait
from limbeck.distill.preflight import report
from limbeck.distill.records import Records
from limbeck.distill.setup import Run, planned_steps, set_up
from limbeck.distill.step_work import Feed, StepWork
from limbeck.distill.validation import measure
from limbeck.errors import LimbeckError
from limbeck.ledger import flop_counter
from limbeck.optim.log import noise_columns, noise_notes
from limbeck.optim.schedules import learning_rate_factor
from limbeck.progress import bar
from limbeck.runner.signals import asked_to_end
from limbeck.stage import How
from limbeck.traces.counts import tell

__all__ = ["inputs_of", "measure", "planned_steps", "run", "train"]


def run(
    config: DistillConfig,
    out: Path,
    *,
    how: How = How(),
) -> Checkpoint:
    """Train one student.

    Args:
      config: the run.
      out: directory to write; work happens in `<out>.partial` until all of it is there.
      how: resume goes on from the last saved state of an interrupted run; it ends with the same bits.
    """
    with training_job(config.training, out, how) as (ranks, working):
        setup = set_up(config, ranks)
        if ranks.is_first:
            tell(setup.data.notes)
            setup.data.counts["preflight"] = report(
                config, setup.student.model, setup.student.tokenizer, setup.data.train
            )
        kept = train(setup, working, how.resume)
        if ranks.is_first:
            tell(noise_notes(setup.optimizer))
        setup = setup.whole()
        if ranks.is_first:
            write_model(setup, working)
        rows = source_rows(setup, kept) if setup.data.sources else []
        if ranks.is_first:
            for written in costs_of_traces(config):
                setup.ledger.restore(written)
        cost = total_cost(setup.ledger, ranks)
        cost["throughput"] = throughput(cost, ranks, setup.precision)
        if ranks.is_first:
            tell(source_lines(rows))
            write_manifest(
                working,
                stage="distill",
                config=config,
                inputs=inputs_of(config),
                ledger=cost,
                metrics=metrics_of(config, kept) | ({"sources": rows} if rows else {}),
                counts=setup.data.counts,
            )
    return Checkpoint(out)


def train(setup: Run, working: Path, resume: bool) -> Mapping[str, Any]:
    """All steps that are left, for every stage that trains; all ranks call it when they are set up.

    Args:
      setup: the run.
      working: directory of states, metrics and best weights.
      resume: go on from the last state there.
    Returns: the metrics of the step whose weights the model has at the end.
    """
    wait(setup.ranks)
    records = Records(setup, working)
    first = records.begin(resume)
    setup.student.model.train()
    step_tokens = [sum(len(setup.data.train[i]) for i in step.indices) for step in setup.steps]
    total, title = sum(step_tokens[first:]), "distilling" if setup.teacher else "fine-tuning"
    waiting: deque[_Step] = deque()
    is_ending = False
    with bar(title, total) as progress, records, Feed(setup) as feed, asked_to_end() as asked:
        setup = setup._replace(feed=feed, is_ending=asked)
        for number in range(first, len(setup.steps)):
            waiting.append(_step(setup, number))
            # A device is let go on while the numbers of its last step come, unless the weights of now are asked for.
            is_late = setup.ranks.device.type != "cpu" and not records.needs_weights(number + 1)
            while len(waiting) > (is_late and not is_ending):
                done = waiting.popleft()
                row, is_ending = done.row(), is_ending or done.numbers.read().is_ending
                is_last = records.add(row)
                speed = row["tokens"] / max(1e-9, setup.ledger.seconds_so_far)
                progress.advance(step_tokens[row["step"] - 1], f"loss {row['loss']:.4f}, {speed:,.0f} tokens/s")
            if not waiting and is_last:
                break
            if is_ending:
                records.leave(number + 1)
    return records.end(row)


class _Step(NamedTuple):
    """A step that is done, or that a device is at."""

    number: int
    rate: float
    numbers: Pending
    columns: Mapping[str, Any]

    def row(self) -> dict[str, Any]:
        """Its line of metrics.jsonl.

        Raises: LimbeckError where the loss or the gradient is not finite.
        """
        ce, kd, tokens, _, norm = self.numbers.read()
        _refuse_divergence(self.number, ce + kd, norm)
        row = {"step": self.number + 1, "loss": ce + kd, "ce_term": ce, "kd_term": kd}
        return row | {"gradient_norm": norm, "learning_rate": self.rate, "tokens": tokens, **self.columns}


def _step(setup: Run, number: int) -> _Step:
    """One optimizer step."""
    torch.manual_seed((setup.config.training.seed * 1_000_003 + number) * 1_009 + setup.ranks.reader)
    work, batches = (setup.feed or Feed(setup)).take(number)
    losses: list[tuple[Tensor, Tensor]] = []
    while True:
        with _audited(setup):
            given = next(batches, None)
            if given is None:
                break
            with setup.autocast():
                loss = setup.objective(given)
            if loss is not None:
                with setup.ledger.phase("student"):
                    loss.total.backward()
        if loss is not None:
            losses.append((loss.ce_sum, loss.kd_sum))
    numbers, rate = _update(setup, number, work, losses)
    return _Step(number, rate, numbers, {**noise_columns(setup.optimizer), **work.metrics})


@contextmanager
def _audited(setup: Run) -> Iterator[None]:
    """The first micro-batch with a loss, counted by torch as well as by the formulas."""
    ledger, parallel = setup.ledger, setup.config.training.parallel
    # torch's counter sees this process's products alone, which are all of its micro-batch only where none is shared.
    if ledger.audit or parallel.shard_head or parallel.tensor_parallel_size > 1:
        yield
        return
    before = sum(ledger.flops.values())
    with flop_counter() as counter:
        yield
    formula = sum(ledger.flops.values()) - before
    if formula:
        ledger.audit = {"formula_flops": formula, "counted_flops": counter.get_total_flops(), **counter.failed}


def _update(setup: Run, number: int, work: StepWork, losses: Sequence[tuple[Tensor, Tensor]]) -> tuple[Pending, float]:
    """Sum, clip and use the gradients of a step; returns its numbers and the learning rate."""
    config, model, optimizer, zeros = setup.config, setup.student.model, setup.optimizer, setup.zeros
    with setup.ledger.phase("optimizer"):
        sum_gradients(model, setup.ranks.world_size)
        if zeros is not None:
            zeros.clear_gradients()
        norm = clip_gradients(model, config.training.clip_norm or float("inf"))
        rate = config.optimizer.learning_rate * learning_rate_factor(config.schedule, number, len(setup.steps))
        rate *= config.training.rate_factor(number)
        numbers = Pending(setup.ranks, losses, setup.ledger.counts["tokens"], setup.is_ending(), norm)
        if setup.ranks.device.type == "cpu":
            ce, kd, *_ = found = numbers.read()
            _refuse_divergence(number, ce + kd, found.norm)
        else:
            skip_unless_finite(optimizer, norm)
        for group_settings in optimizer.param_groups:
            group_settings["lr"] = rate
        if work.loss.is_any:
            optimizer.step()
            if zeros is not None:
                zeros.clear_weights()
        optimizer.zero_grad(set_to_none=True)
    if setup.ranks.is_first:
        setup.ledger.count(steps=1)
    return numbers, rate


def _refuse_divergence(number: int, loss: float, norm: float) -> None:
    """Stop before the update that would make every weight NaN."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise LimbeckError(
            f"step {number + 1}: the loss is {loss} and the gradient norm {norm}; lower optimizer.learning_rate or "
            "look at the traces of this step."
        )
