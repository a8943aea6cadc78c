"""What a run of the distillation loop uses, made once on every process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

from limbeck.distill.borders import borders_of
from limbeck.distill.by_source import TeachersBySource, load_teachers
from limbeck.distill.config import DistillConfig, LoopConfig
from limbeck.distill.data import Data, prepare
from limbeck.distill.microbatch import Borders, MicroBatch, Objective, StepLoss, Student, supervised_rows
from limbeck.distill.mix import Mix
from limbeck.distill.objective import Distillation
from limbeck.distill.pair import check_pair, load_student, load_student_in_parts, products_of
from limbeck.distill.parallel import Ranks
from limbeck.distill.plan import PlannedStep, plan_steps
from limbeck.distill.preflight import carry, check_templates
from limbeck.distill.rollouts import Rollouts, make_rollouts
from limbeck.distill.sending import Laid, lay_out
from limbeck.distill.stop_control import StopControl
from limbeck.distill.zeros import KeptZeros
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger
from limbeck.models.anatomy import context_tokens
from limbeck.models.sharded import is_sharded
from limbeck.optim.build import build_optimizer
from limbeck.teacher.several import Teacher
from limbeck.traces.batch import Batch, Example, collate, idle
from limbeck.traces.render import stop_ids
from limbeck.traces.supervise import TokenSelection


class Run(NamedTuple):
    """What the loop uses: models, data and plan, and where they are."""

    config: LoopConfig
    student: Student
    teacher: Teacher | TeachersBySource | None
    data: Data
    steps: list[PlannedStep]
    optimizer: torch.optim.Optimizer
    ledger: Ledger
    ranks: Ranks
    objective: Objective = Distillation()
    """The loss of a micro-batch."""
    select: TokenSelection | None = None
    """Which of the KD positions are trained on; None: all."""
    borders: Borders | None = None
    """Where CE gives way to the teacher; None: nowhere."""
    rollouts: Rollouts | None = None
    """What the student writes itself, where the config asks for it."""
    stop_control: StopControl | None = None
    """What raises the share of whole traces, where the config asks for it."""
    zeros: KeptZeros | None = None
    """The zeros of a pruned student, where the config keeps them."""
    identity: Mapping[str, Any] = MappingProxyType({})
    """What decides the result beside config and tokens; a resumed run must have the same."""

    feed: Any = None
    """Lays micro-batches out ahead (`step_work.Feed`), for the length of the loop."""
    is_ending: Callable[[], bool] = lambda: False
    """Whether this process was asked to end (SIGTERM)."""

    @property
    def in_step(self) -> bool:
        """Whether all processes run every micro-batch together, because a model is in parts."""
        return is_sharded(self.student.model) or (self.teacher is not None and self.teacher.in_step)

    def whole(self) -> Run:
        """The run with the whole student on the first process; all must call it."""
        return self._replace(student=self.student.whole())

    def microbatch(self, examples: Sequence[Example], loss: StepLoss) -> MicroBatch:
        """Examples laid out for the student, with what an objective needs; none keep step with other processes."""
        with self.ledger.phase("data"):
            return self.sent(self.laid_out(examples, loss), examples, loss)

    def laid_out(self, examples: Sequence[Example], loss: StepLoss) -> Laid | Batch:
        """The batch on the host, with what an accelerator would have to be asked for; on any thread."""
        layout, pad_id = self.config.training.layout, self.student.tokenizer.pad_token_id
        batch = collate(examples, layout, pad_id) if examples else idle(layout, pad_id)
        if self.ranks.device.type == "cpu":
            return batch
        return lay_out(batch, supervised_rows(batch, loss), examples, self._teacher_of(examples, loss))

    def sent(self, laid: Laid | Batch, examples: Sequence[Example], loss: StepLoss) -> MicroBatch:
        """What was laid out, on the device."""
        batch, known = laid.send(self.ranks.device) if isinstance(laid, Laid) else (laid, None)
        return MicroBatch(self.student, self._teacher_of(examples, loss), batch, examples, loss, self.ledger, known)

    def _teacher_of(self, examples: Sequence[Example], loss: StepLoss) -> Teacher | None:
        """Who is asked about a micro-batch."""
        if not loss.kd_ratio:
            return None
        return self.teacher.of(examples) if isinstance(self.teacher, TeachersBySource) else self.teacher

    def autocast(self) -> torch.autocast:
        """The precision of the products."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def precision(self) -> Literal["float32", "bf16"]:
        """Of the products."""
        return "bf16" if products_of(self.config) == torch.bfloat16 else "float32"


def set_up(config: DistillConfig, ranks: Ranks) -> Run:
    """Load student, teacher and traces, and plan every step; arguments as for `train.run`."""
    ledger, parallel = Ledger(ranks.device), config.training.parallel
    if ranks.world_size > 1 and parallel.strategy == "shard":
        model, empty, tokenizer = load_student_in_parts(config, ranks)
    else:
        (model, tokenizer), empty = load_student(config), None
        model.to(ranks.device)
    teacher = load_teachers(config, ranks)
    check_pair(config, model, tokenizer)
    check_templates(config, tokenizer)
    for student in (model, empty):
        if student is not None:
            carry(config.render, student, tokenizer)
    data = prepare(config, tokenizer)
    steps = planned_steps(config, data, ranks.readers)
    _refuse_long(data, context_tokens(model))
    return Run(
        config,
        Student.of(model, tokenizer, empty),
        teacher,
        data,
        steps,
        build_optimizer(model, config.optimizer, len(steps)),
        ledger,
        ranks,
        Distillation(parallel.shard_head),
        config.supervision.select,
        borders_of(config.supervision.borders, tokenizer, config.render),
        _rollouts(config, steps, data, tokenizer),
        _stop_control(config, data, tokenizer),
        KeptZeros(model) if config.student.keep_zeros else None,
        identity={"start": None},  # as states written by earlier versions have it
    )


def planned_steps(config: DistillConfig, data: Data, readers: int = 1) -> list[PlannedStep]:
    """All steps of a run over the given data, its tokens dealt to `readers` processes."""
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
        world_size=readers,
        growth=training.growing_batch(),
        mix=mix_of(config, data),
        teachers=config.teachers_by(data.train),
    )


def mix_of(config: DistillConfig, data: Data) -> Mix | None:
    """What an epoch reads of several sources; None where there is one."""
    if not data.sources:
        return None
    lengths = [len(example) for example in data.train]
    origins = [example.sample.origin for example in data.train]
    return Mix.of(lengths, origins, [source.portion for source in config.all_sources])


def epoch_tokens(config: DistillConfig, data: Data) -> float:
    """Tokens that an epoch reads, in the mean over epochs."""
    lengths, mix = [len(example) for example in data.train], mix_of(config, data)
    return float(sum(lengths)) if mix is None else mix.tokens(lengths)


def _rollouts(config: DistillConfig, steps: Sequence[PlannedStep], data: Data, tokenizer: Any) -> Rollouts | None:
    if config.on_policy is None or data.prompts is None:
        return None
    return make_rollouts(config.on_policy, steps, data.prompts, tokenizer, config.render, config.training.seed)


def _stop_control(config: DistillConfig, data: Data, tokenizer: Any) -> StopControl | None:
    control = config.stop_control
    if control is None:
        return None
    if not data.validation:
        raise ConfigError("stop_control asks held-out prompts, and none is held out; set num_validation.")
    if any(example.sample.turns for example in data.validation):
        raise ConfigError("stop_control lets the student answer prompts, which traces of several turns have not one of")
    share = config.truncation.whole_fraction if control.raises == "whole" else 0.0
    return StopControl(control, share, data.validation, stop_ids(tokenizer, config.render))


def _refuse_long(data: Data, limit_tokens: int) -> None:
    longest = max(len(example) for example in [*data.train, *data.validation])
    if longest > limit_tokens:
        raise ConfigError(
            f"a trace of {longest} tokens is longer than the student's {limit_tokens} positions; set max_trace_tokens."
        )
