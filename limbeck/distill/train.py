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
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from limbeck.checkpoint import Checkpoint, hash_path, output_directory, write_manifest
from limbeck.config import config_hash, to_dict
from limbeck.distill.config import DistillConfig, StudentConfig
from limbeck.distill.data import Data, fingerprint, prepare
from limbeck.distill.fused import FusedLoss
from limbeck.distill.guard import BEST_PREFIX, Guard
from limbeck.distill.objective import Teacher, microbatch_loss, step_totals
from limbeck.distill.pair import check_pair, load_student, load_teacher
from limbeck.distill.parallel import Ranks, join, sum_gradients, sum_numbers, total_cost, wait
from limbeck.distill.plan import Step, plan_steps
from limbeck.distill.preflight import check_templates, report
from limbeck.distill.rollouts import Rollouts, make_rollouts
from limbeck.distill.state import load_state, save_state
from limbeck.distill.work import Work, given_work, rollout_work
from limbeck.distill.zeros import KeptZeros
from limbeck.errors import CheckpointError, ConfigError, LimbeckError
from limbeck.ledger import Ledger, flop_counter
from limbeck.models.anatomy import Sizes, causal_lm_of, sizes_of
from limbeck.models.load import model_hash, quiet, vocabulary_size
from limbeck.optim.build import build_optimizer
from limbeck.optim.schedules import learning_rate_factor
from limbeck.progress import bar
from limbeck.teacher.cache import Spec
from limbeck.traces.batch import Example, collate
from limbeck.traces.supervise import TokenSelection

Objective = Callable[..., FusedLoss | None]
"""Takes what `microbatch_loss` takes, and returns what it returns."""


class Run(NamedTuple):
    """Everything that the loop uses."""

    config: DistillConfig
    model: Any
    tokenizer: Any
    sizes: Sizes
    teacher: Teacher | None
    data: Data
    steps: list[Step]
    optimizer: torch.optim.Optimizer
    ledger: Ledger
    ranks: Ranks
    vocab_size: int
    rollouts: Rollouts | None = None
    """What the student writes itself, where the config asks for it."""
    zeros: KeptZeros | None = None
    """The zeros of a pruned student, where the config keeps them."""
    objective: Objective = microbatch_loss
    """The loss of a micro-batch."""
    validation_groups: list[list[Example]] | None = None
    """The held-out examples as they are to be validated together; None lets `validate` group them by length."""
    identity: Mapping[str, Any] = MappingProxyType({})
    """What decides the result beside config and tokens; a resumed run must have the same."""


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

    def set_up(ranks: Ranks) -> Run:
        setup = _set_up(config, source, ranks)
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

    return run_loop(set_up, write, out, config.training.num_threads, overwrite=overwrite, resume=resume)


def run_loop(
    set_up: Callable[[Ranks], Run],
    write: Callable[[Run, Path, Mapping[str, Any]], None],
    out: Path,
    num_threads: int | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> Checkpoint:
    """Set up a run on every rank, train it, and write it: the frame of all stages that train.

    Args:
      set_up: makes the run of one rank.
      write: fills the working directory, given the metrics of the step whose weights the model has; on the first rank.
      out, overwrite, resume: as for `run`.
      num_threads: CPU threads; torch's choice when not set.
    """
    ranks = join()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if not ranks.is_first:
        setup = set_up(ranks)
        wait(ranks)
        _train(setup, out.with_name(out.name + ".partial"), resume)
        total_cost(setup.ledger, ranks)
        wait(ranks)
        return Checkpoint(out)
    with output_directory(out, overwrite=overwrite, resume=resume) as working:
        setup = set_up(ranks)
        wait(ranks)
        kept = _train(setup, working, resume)
        write(setup, working, kept)
        for state in working.glob("state*"):
            shutil.rmtree(state)
        for best in working.glob(BEST_PREFIX + "*"):
            best.unlink()
    wait(ranks)
    return Checkpoint(out)


def measure(config: DistillConfig, model: str) -> dict[str, float | None]:
    """The held-out losses (`validate`, with the divergence) of a model as it is.

    Args:
      config: says which sequences, teacher and divergence; its student is not used.
      model: directory, alias or hub id.
    """
    setup = _set_up(replace(config, student=StudentConfig(model=model)), None, join())
    return validate(setup, with_kd=True)


def validate(setup: Run, *, with_kd: bool = False) -> dict[str, float | None]:
    """Mean losses in nats a token over thought and answer of the uncut held-out sequences.

    Returns: `validation_ce` and, with_kd, `validation_kd`, the divergence from the teacher as the loss takes it; None
    where nothing is held out.
    """
    names = ("validation_ce", "validation_kd") if with_kd else ("validation_ce",)
    loss = replace(setup.config.loss, normalization="token_mean")
    kd_ratio = 0.5 if with_kd else 0.0
    ce, kd, ce_weight, kd_weight = 0.0, 0.0, 0.0, 0.0
    was_training, flops = setup.model.training, dict(setup.ledger.flops)
    setup.model.eval()
    with setup.ledger.phase("validation"), torch.no_grad():
        for group in _validation_groups(setup):
            totals = step_totals(group, "token_mean")
            found = _loss(setup, group, Work([group], totals, loss, kd_ratio, {}), None)
            ce += totals.ce * (0.0 if found is None else found.ce_sum.item() / (1 - kd_ratio))
            kd += totals.kd * (0.0 if found is None or not with_kd else found.kd_sum.item() / kd_ratio)
            ce_weight, kd_weight = ce_weight + totals.ce, kd_weight + totals.kd
    setup.model.train(was_training)
    setup.ledger.flops = flops  # a live teacher charges its own; validation is no part of the training's cost
    ce, kd, ce_weight, kd_weight = sum_numbers([ce, kd, ce_weight, kd_weight], setup.ranks)
    means = (ce / ce_weight if ce_weight else None, kd / kd_weight if kd_weight else None)
    return dict(zip(names, means, strict=False))


def _set_up(config: DistillConfig, source: Checkpoint | None, ranks: Ranks) -> Run:
    ledger = Ledger(ranks.device)
    student, tokenizer = load_student(config, source)
    student.to(ranks.device)
    teacher = load_teacher(config, ranks.device)
    check_pair(config, student, tokenizer)
    check_templates(config, tokenizer)
    data = prepare(config, tokenizer)
    steps = planned_steps(config, data, ranks.world_size)
    vocab_size = vocabulary_size(tokenizer)
    optimizer = build_optimizer(student, config.optimizer, len(steps))
    _refuse_long(data, causal_lm_of(student).config.max_position_embeddings)
    return Run(
        config,
        student,
        tokenizer,
        sizes_of(student, vocab_size),
        teacher,
        data,
        steps,
        optimizer,
        ledger,
        ranks,
        vocab_size,
        _rollouts(config, steps, data, tokenizer),
        KeptZeros(student) if config.student.keep_zeros else None,
        identity={"start": None if source is None else str(source.path)},
    )


def planned_steps(config: DistillConfig, data: Data, world_size: int = 1) -> list[Step]:
    """All steps of a run over the given data."""
    training = config.training
    return plan_steps(
        [len(example) for example in data.train],
        epochs=training.epochs,
        batch_size=training.batch_size,
        batch_tokens=training.batch_tokens,
        microbatch_tokens=training.microbatch_tokens,
        layout=training.layout,
        bucket_batches=training.bucket_batches,
        seed=training.seed,
        max_steps=training.max_steps,
        max_tokens=training.max_tokens,
        world_size=world_size,
        growth=training.growing_batch(),
    )


def _rollouts(config: DistillConfig, steps: Sequence[Step], data: Data, tokenizer: Any) -> Rollouts | None:
    if config.on_policy is None or data.prompts is None:
        return None
    return make_rollouts(config.on_policy, steps, data.prompts, tokenizer, config.render, config.training.seed)


def _refuse_long(data: Data, limit_tokens: int) -> None:
    longest = max(len(example) for example in [*data.train, *data.validation])
    if longest > limit_tokens:
        raise ConfigError(
            f"a trace of {longest} tokens is longer than the student's {limit_tokens} positions; set max_trace_tokens."
        )


def _train(setup: Run, working: Path, resume: bool) -> Mapping[str, Any]:
    """All steps that are left; returns the metrics of the step whose weights the model has at the end."""
    training, ranks = setup.config.training, setup.ranks
    examples = fingerprint(setup.data.train)
    identity = config_hash({"config": to_dict(setup.config), "traces": examples, **setup.identity})
    guard = _guard(setup, working)
    # The saved cost is that of all ranks, so only one of them goes on from it.
    ledger = setup.ledger if ranks.is_first else Ledger(ranks.device)
    resumed = load_state(working, setup.model, setup.optimizer, ledger, identity) if resume else None
    first = resumed.step if resumed else 0
    if resumed and resumed.rollouts is not None and setup.rollouts is not None:
        setup.rollouts.restore(resumed.rollouts)
    metrics = working / "metrics.jsonl"
    if ranks.is_first:
        _keep_lines(metrics, first)
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
                guard.watch(row, setup.model if ranks.is_first else None)
                is_last = is_last or guard.is_over
            if ranks.is_first:
                with metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if not is_last and _is_due(number + 1, training.save_every_steps):
                _save(setup, working, number + 1, identity)
                if guard is not None and ranks.is_first:
                    guard.saved()
            tokens = sum(len(setup.data.train[i]) for i in setup.steps[number].indices)
            speed = row["tokens"] / max(1e-9, setup.ledger.train_seconds)
            progress.advance(tokens, f"loss {row['loss']:.4f}, {speed:,.0f} tokens/s")
            if is_last:
                break
    if guard is not None and ranks.is_first:
        guard.load_best(setup.model)
    return row if guard is None or guard.best is None else guard.best


def _save(setup: Run, working: Path, step: int, identity: str) -> None:
    cost = total_cost(setup.ledger, setup.ranks)
    if setup.ranks.is_first:
        with setup.ledger.phase("saving"):
            rollouts = None if setup.rollouts is None else setup.rollouts.state()
            save_state(working, step, setup.model, setup.optimizer, cost, identity, rollouts)


def _guard(setup: Run, working: Path) -> Guard | None:
    """The guard that the config asks for, with the weights that the run starts from as its first."""
    training = setup.config.training
    if training.keep_best is None:
        return None
    guard = Guard(working, f"validation_{training.keep_best}", training.patience)
    start = {"step": 0, **validate(setup, with_kd=training.keep_best == "kd")}
    guard.begin(start, setup.model if setup.ranks.is_first else None)
    return guard


def _step(setup: Run, number: int) -> dict[str, Any]:
    """One optimizer step; returns its line of metrics.jsonl."""
    config, ledger = setup.config, setup.ledger
    torch.manual_seed((config.training.seed * 1_000_003 + number) * 1_009 + setup.ranks.rank)
    work = _work(setup, number)
    ce = kd = 0.0
    for examples in work.microbatches:
        forward_backward = _forward_backward if ledger.audit else _audited
        ce_part, kd_part = forward_backward(setup, examples, work)
        ce, kd = ce + ce_part, kd + kd_part
    ce, kd, tokens = sum_numbers([ce, kd, ledger.counts["tokens"]], setup.ranks)
    with ledger.phase("optimizer"):
        sum_gradients(setup.model, setup.ranks.world_size)
        if setup.zeros is not None:
            setup.zeros.clear_gradients()
        norm = float(nn.utils.clip_grad_norm_(setup.model.parameters(), config.training.clip_norm or float("inf")))
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
        return given_work(setup.config, setup.data.train, setup.steps[number], ranks.rank)
    rollouts.refresh(number, setup.model, setup.sizes, setup.ledger, ranks)
    return rollout_work(setup.config, rollouts, number, ranks.rank, ranks.world_size)


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
    loss = _loss(setup, examples, work, setup.config.supervision.select)
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


def _loss(setup: Run, examples: Sequence[Example], work: Work, select: TokenSelection | None) -> FusedLoss | None:
    training = setup.config.training
    with setup.ledger.phase("data"):
        batch = collate(examples, training.layout, setup.tokenizer.pad_token_id).to(setup.ranks.device)
    with torch.autocast(setup.ranks.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
        return setup.objective(
            setup.model,
            setup.sizes,
            setup.teacher if work.kd_ratio else None,
            batch,
            examples,
            work.totals,
            work.loss,
            work.kd_ratio,
            setup.ledger,
            vocab_size=setup.vocab_size,
            select=select,
        )


def write_model(setup: Run, directory: Path) -> None:
    """Write model and tokenizer as a Hugging Face directory, adapters merged."""
    with setup.ledger.phase("saving"), quiet():
        is_adapted = setup.config.lora is not None
        model = setup.model.merge_and_unload() if is_adapted else causal_lm_of(setup.model)
        model.save_pretrained(directory)
        setup.tokenizer.save_pretrained(directory)


def metrics_of(config: DistillConfig, kept: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest tells of the step whose weights were written."""
    metrics = {"loss": kept.get("loss"), "validation_ce": kept.get("validation_ce")}
    if config.training.keep_best is not None:
        metrics |= {"validation_kd": kept.get("validation_kd"), "kept_step": kept["step"]}
    return metrics


def inputs_of(config: DistillConfig, source: Checkpoint | None = None) -> dict[str, str]:
    """What a run reads, by role, as hashes of the files: student, teachers or their caches, traces."""
    names = {"student": str(source.path) if source else config.student.model}
    found = {}
    for number, teacher in enumerate((config.teacher, *config.teacher.others), 1):
        role = "teacher" if number == 1 else f"teacher_{number}"
        names[role] = teacher.model
        if teacher.cache is not None:
            # What a cache says of a sequence depends on teacher and form alone, not on what else it holds.
            found[f"{role}_cache"] = Spec.read(teacher.cache).identity
        if teacher.server is not None:
            found[f"{role}_server"] = f"{teacher.server} {teacher.server_model or 'its only model'}"
    found |= {role: model_hash(name) for role, name in names.items() if name is not None}
    traces = Path(config.traces.source)
    return found | ({"traces": hash_path(traces)} if traces.exists() else {})


def _validation_groups(setup: Run) -> list[list[Example]]:
    """This rank's share of the held-out examples, in groups that one forward pass holds."""
    share = slice(setup.ranks.rank, None, setup.ranks.world_size)
    if setup.validation_groups is not None:
        return setup.validation_groups[share]
    groups: list[list[Example]] = []
    longest = 0
    for example in sorted(setup.data.validation[share], key=len):
        longest = max(longest, len(example))
        if not groups or longest * (len(groups[-1]) + 1) > setup.config.training.microbatch_tokens:
            groups.append([])
            longest = len(example)
        groups[-1].append(example)
    return groups


def _keep_lines(path: Path, count: int) -> None:
    """Drop what an interrupted run logged after the state it goes on from."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if path.exists() else []
    if len(lines) < count:
        raise CheckpointError(f"{path}: {len(lines)} lines, but the saved state is of step {count}; run anew.")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
