"""What a run of the distillation loop uses, made once on every process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from limbeck.checkpoint import Checkpoint
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import Data, prepare
from limbeck.distill.fused import FusedLoss
from limbeck.distill.objective import Teacher, microbatch_loss
from limbeck.distill.pair import check_pair, load_student, load_student_in_parts, load_teacher
from limbeck.distill.parallel import ParallelConfig, Ranks
from limbeck.distill.plan import Step, plan_steps
from limbeck.distill.preflight import check_templates
from limbeck.distill.rollouts import Rollouts, make_rollouts
from limbeck.distill.work import Work
from limbeck.distill.zeros import KeptZeros
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger
from limbeck.models.anatomy import Sizes, causal_lm_of, sizes_of
from limbeck.models.load import vocabulary_size
from limbeck.models.sharded import assemble, is_sharded
from limbeck.optim.build import build_optimizer
from limbeck.traces.batch import Example, collate, idle
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
    empty: Any = None
    """A student in parts without its storage, which `whole` fills."""

    @property
    def in_step(self) -> bool:
        """Whether all processes run every micro-batch together, because a model is in parts."""
        return is_sharded(self.model) or (self.teacher is not None and self.teacher.in_step)

    def whole(self) -> Run:
        """The run with the whole student on the first process; all must call it."""
        return self if self.empty is None else self._replace(model=assemble(self.model, self.empty))

    def loss(self, examples: Sequence[Example], work: Work, select: TokenSelection | None) -> FusedLoss | None:
        """The share of a micro-batch in the loss of `work`; one without examples keeps step with the others."""
        training = self.config.training
        with self.ledger.phase("data"):
            pad_id = self.tokenizer.pad_token_id
            batch = collate(examples, training.layout, pad_id) if examples else idle(training.layout, pad_id)
            batch = batch.to(self.ranks.device)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            return self.objective(
                self.model,
                self.sizes,
                self.teacher if work.kd_ratio else None,
                batch,
                examples,
                work.totals,
                work.loss,
                work.kd_ratio,
                self.ledger,
                vocab_size=self.vocab_size,
                select=select,
            )


def set_up(config: DistillConfig, source: Checkpoint | None, ranks: Ranks) -> Run:
    """Load student, teacher and traces, and plan every step; arguments as for `train.run`."""
    ledger, parallel = Ledger(ranks.device), config.training.parallel
    if ranks.world_size > 1 and parallel.strategy == "shard":
        student, empty, tokenizer = load_student_in_parts(config, source, ranks)
    else:
        (student, tokenizer), empty = load_student(config, source), None
        student.to(ranks.device)
    teacher = load_teacher(config, ranks)
    check_pair(config, student, tokenizer)
    check_templates(config, tokenizer)
    data = prepare(config, tokenizer)
    steps = planned_steps(config, data, ranks.readers)
    vocab_size = vocabulary_size(tokenizer)
    _refuse_long(data, causal_lm_of(student).config.max_position_embeddings)
    return Run(
        config,
        student,
        tokenizer,
        sizes_of(student, vocab_size),
        teacher,
        data,
        steps,
        build_optimizer(student, config.optimizer, len(steps)),
        ledger,
        ranks,
        vocab_size,
        _rollouts(config, steps, data, tokenizer),
        KeptZeros(student) if config.student.keep_zeros else None,
        objective=partial(microbatch_loss, shard_head=parallel.shard_head),
        identity={"start": None if source is None else str(source.path)},
        empty=empty,
    )


def planned_steps(config: DistillConfig, data: Data, readers: int = 1) -> list[Step]:
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
    )


def same_result(config: DistillConfig) -> DistillConfig:
    """The config without what does not change the result: a run may go on on other processes than it began on."""
    return replace(config, training=replace(config.training, parallel=ParallelConfig()))


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
