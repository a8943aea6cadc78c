"""The stage `distill`: traces and a student in, a trained checkpoint out.

1. Load the student, its tokenizer and the teacher; check that they fit.
2. Read, select, split, render and cut the traces; plan every step of the run.
3. For each step: micro-batches forward and backward, sum gradients over ranks, clip, update, log.
4. Validate on uncut sequences; write the model, the metrics and the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from limbeck.checkpoint import Checkpoint, hash_path, output_directory, write_manifest
from limbeck.config import config_hash
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import Data, prepare
from limbeck.distill.objective import Teacher, microbatch_loss, step_totals
from limbeck.distill.pair import check_pair, load_student, load_teacher
from limbeck.distill.parallel import Ranks, join, sum_gradients, sum_numbers, wait
from limbeck.distill.plan import Step, plan_steps
from limbeck.distill.state import load_state, save_state
from limbeck.errors import LimbeckError
from limbeck.ledger import Ledger, flop_counter
from limbeck.models.anatomy import Sizes, causal_lm_of, sizes_of
from limbeck.models.load import locate
from limbeck.optim.build import build_optimizer
from limbeck.optim.schedules import learning_rate_factor
from limbeck.progress import bar
from limbeck.traces.batch import Example, collate


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


def run(
    config: DistillConfig, source: Checkpoint | None, out: Path, *, overwrite: bool = False, resume: bool = False
) -> Checkpoint:
    """Train one student.

    Args:
      config: the run.
      source: a checkpoint to start from in place of `config.student.model`.
      out: directory to write; work happens in `<out>.partial` until all of it is there.
      overwrite: replace an existing output.
      resume: go on from the last saved state of an interrupted run; it ends with the same bits.
    """
    ranks = join()
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    if not ranks.is_first:
        setup = _set_up(config, source, ranks)
        wait(ranks)
        _train(setup, out.with_name(out.name + ".partial"), resume)
        wait(ranks)
        return Checkpoint(out)
    with output_directory(out, overwrite=overwrite, resume=resume) as working:
        setup = _set_up(config, source, ranks)
        wait(ranks)
        _train(setup, working, resume)
        _write(setup, source, working)
        for state in working.glob("state*"):
            _remove(state)
    wait(ranks)
    return Checkpoint(out)


def validate(setup: Run) -> float | None:
    """Mean CE in nats a token over thought and answer of the uncut held-out sequences; None without any."""
    if not setup.data.validation:
        return None
    mine = setup.data.validation[setup.ranks.rank :: setup.ranks.world_size]
    total, weight = 0.0, 0.0
    was_training = setup.model.training
    setup.model.eval()
    with setup.ledger.phase("validation"), torch.no_grad():
        quiet = Ledger(setup.ranks.device)
        for group in _validation_groups(mine, setup.config.training.microbatch_tokens):
            totals = step_totals(group, "token_mean")
            loss = _loss(setup, group, totals, kd_ratio=0.0, ledger=quiet)
            total += totals.ce * (0.0 if loss is None else loss.total.item())
            weight += totals.ce
    setup.model.train(was_training)
    total, weight = sum_numbers([total, weight], setup.ranks)
    return total / weight if weight else None


def _set_up(config: DistillConfig, source: Checkpoint | None, ranks: Ranks) -> Run:
    ledger = Ledger(ranks.device)
    student, tokenizer = load_student(config, source)
    student.to(ranks.device)
    teacher = load_teacher(config, ranks.device)
    check_pair(config, student, tokenizer)
    data = prepare(config, tokenizer)
    training = config.training
    steps = plan_steps(
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
        world_size=ranks.world_size,
    )
    optimizer = build_optimizer(student, config.optimizer)
    vocab_size = min(len(tokenizer), sizes_of(student).vocab_size)
    return Run(
        config, student, tokenizer, sizes_of(student), teacher, data, steps, optimizer, ledger, ranks, vocab_size
    )


def _train(setup: Run, working: Path, resume: bool) -> None:
    config, training = setup.config, setup.config.training
    identity = config_hash(config)
    resumed = load_state(working, setup.model, setup.optimizer, setup.ledger, identity) if resume else None
    first = resumed.step if resumed else 0
    metrics = working / "metrics.jsonl"
    if setup.ranks.is_first:
        _keep_lines(metrics, first)
    setup.model.train()
    total_tokens = sum(len(setup.data.train[i]) for step in setup.steps[first:] for i in step.indices)
    with bar("distilling" if setup.teacher else "fine-tuning", total_tokens) as progress:
        for number in range(first, len(setup.steps)):
            row = _step(setup, number)
            is_last = number + 1 == len(setup.steps)
            if is_last or _is_due(number + 1, training.validate_every_steps):
                row["validation_ce"] = validate(setup)
            if setup.ranks.is_first:
                with metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                if not is_last and _is_due(number + 1, training.save_every_steps):
                    with setup.ledger.phase("saving"):
                        save_state(working, number + 1, setup.model, setup.optimizer, setup.ledger, identity)
            tokens = sum(len(setup.data.train[i]) for i in setup.steps[number].indices)
            speed = setup.ledger.counts["tokens"] / max(1e-9, setup.ledger.train_seconds)
            progress.advance(tokens, f"loss {row['loss']:.4f}, {speed:,.0f} tokens/s")


def _step(setup: Run, number: int) -> dict[str, Any]:
    """One optimizer step; returns its line of metrics.jsonl."""
    config, step, ledger = setup.config, setup.steps[number], setup.ledger
    torch.manual_seed(config.training.seed * 1_000_003 + number)
    totals = step_totals([setup.data.train[i] for i in step.indices], config.loss.normalization)
    ce = kd = 0.0
    for position, group in enumerate(step.microbatches[setup.ranks.rank]):
        examples = [setup.data.train[i] for i in group]
        if number == 0 and position == 0:
            loss = _audited(setup, examples, totals)
        else:
            loss = _forward_backward(setup, examples, totals)
        ce, kd = ce + loss[0], kd + loss[1]
    with ledger.phase("optimizer"):
        sum_gradients(setup.model, setup.ranks.world_size)
        norm = nn.utils.clip_grad_norm_(setup.model.parameters(), config.training.clip_norm or float("inf"))
        rate = config.optimizer.learning_rate * learning_rate_factor(config.schedule, number, len(setup.steps))
        for group_settings in setup.optimizer.param_groups:
            group_settings["lr"] = rate
        setup.optimizer.step()
        setup.optimizer.zero_grad(set_to_none=True)
    ledger.count(steps=1)
    ce, kd = sum_numbers([ce, kd], setup.ranks)
    if not (abs(ce + kd) < float("inf")):
        raise LimbeckError(
            f"step {number + 1}: the loss is {ce + kd}; lower optimizer.learning_rate or look at the traces of this step."
        )
    row = {"step": number + 1, "loss": ce + kd, "ce_term": ce, "kd_term": kd}
    return row | {"gradient_norm": float(norm), "learning_rate": rate, "tokens": ledger.counts["tokens"]}


def _forward_backward(setup: Run, examples: Sequence[Example], totals: Any) -> tuple[float, float]:
    loss = _loss(setup, examples, totals, setup.config.kd_ratio, setup.ledger)
    if loss is None:
        return 0.0, 0.0
    with setup.ledger.phase("student"):
        loss.total.backward()
    return float(loss.ce_sum), float(loss.kd_sum)


def _audited(setup: Run, examples: Sequence[Example], totals: Any) -> tuple[float, float]:
    """The first micro-batch, counted by torch as well as by the formulas."""
    before = sum(setup.ledger.flops.values())
    with flop_counter() as counter:
        result = _forward_backward(setup, examples, totals)
    setup.ledger.audit = {
        "formula_flops": sum(setup.ledger.flops.values()) - before,
        "counted_flops": counter.get_total_flops(),
    }
    return result


def _loss(setup: Run, examples: Sequence[Example], totals: Any, kd_ratio: float, ledger: Ledger) -> Any:
    training = setup.config.training
    with ledger.phase("data"):
        batch = collate(examples, training.layout, setup.tokenizer.pad_token_id).to(setup.ranks.device)
    with torch.autocast(setup.ranks.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
        return microbatch_loss(
            setup.model,
            setup.sizes,
            setup.teacher if kd_ratio else None,
            batch,
            examples,
            totals,
            setup.config.loss,
            kd_ratio,
            ledger,
            vocab_size=setup.vocab_size,
        )


def _write(setup: Run, source: Checkpoint | None, working: Path) -> None:
    config = setup.config
    with setup.ledger.phase("saving"):
        model = setup.model.merge_and_unload() if config.lora is not None else causal_lm_of(setup.model)
        model.save_pretrained(working)
        setup.tokenizer.save_pretrained(working)
    lines = (working / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    write_manifest(
        working,
        stage="distill",
        config=config,
        inputs=_inputs(config, source),
        ledger=setup.ledger.as_dict(),
        metrics={"loss": last["loss"], "validation_ce": last.get("validation_ce")},
        counts=setup.data.counts,
    )


def _inputs(config: DistillConfig, source: Checkpoint | None) -> dict[str, str]:
    inputs: dict[str, str] = {}
    names = {"student": str(source.path) if source else config.student.model, "teacher": config.teacher.model}
    for role, name in names.items():
        if name is not None:
            place = locate(name)
            inputs[role] = hash_path(Path(place.path)) if place.is_local else name
    paths = {"teacher_targets": config.teacher.targets, "traces": Path(config.traces.source)}
    inputs |= {role: hash_path(path) for role, path in paths.items() if path is not None and path.exists()}
    return inputs


def _validation_groups(examples: Sequence[Example], budget_tokens: int) -> list[list[Example]]:
    groups: list[list[Example]] = []
    longest = 0
    for example in sorted(examples, key=len):
        longest = max(longest, len(example))
        if not groups or longest * (len(groups[-1]) + 1) > budget_tokens:
            groups.append([])
            longest = len(example)
        groups[-1].append(example)
    return groups


def _keep_lines(path: Path, count: int) -> None:
    """Drop what an interrupted run logged after the state it goes on from."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if path.exists() else []
    path.write_text("".join(lines), encoding="utf-8")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _remove(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


