"""`distill` before it runs: steps are planned as the run plans them, and every micro-batch is charged by the ledger's
formulas. Tokenizer and traces are read; no weight is, and there is no forward pass.

FLOPs are those that the run's ledger will hold, to the last one, but for rollouts, whose length is assumed, and for
token selection, whose positions are taken as spread evenly. Seconds are a roofline: products at the speed of the
hardware, activations and optimizer state at its bandwidth, and a fixed time a call.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.cost.hardware import Hardware, measure
from limbeck.cost.memory import LiveTeacher, Loss, Pass, TrainedModel, Way, saved_bytes, states_of, training_memory
from limbeck.cost.prediction import Prediction, flops_of
from limbeck.cost.shapes import Dims, config_of, on_meta, scratch_shape
from limbeck.distill.config import DistillConfig, TeacherConfig, teachers_of
from limbeck.distill.data import Data, cuts_of, prepare
from limbeck.distill.fused import chunk_bytes_on
from limbeck.distill.pair import student_tokenizer_name, trainable
from limbeck.distill.plan import PlannedStep, split_step
from limbeck.distill.rollouts import Prompts
from limbeck.distill.sampling_cost import rollouts_of, sampling_of
from limbeck.distill.setup import planned_steps
from limbeck.ledger import (
    backbone_backward_flops,
    backbone_forward_flops,
    head_flops,
    head_forward_flops,
)
from limbeck.models.anatomy import Computed, backbone_of, sizes_of
from limbeck.models.lean import has_plain_layers, plan_packed
from limbeck.models.load import load_tokenizer, vocabulary_size
from limbeck.teacher.cache import SPEC, CacheConfig, Spec
from limbeck.traces.batch import Batch, Example, collate, make_example
from limbeck.traces.sample import PROMPT, Sample
from limbeck.traces.truncate import share_of

TRAFFIC = 4
"""Times that what a layer keeps is read or written, forward and backward together."""
UPDATE_TRAFFIC = 9
"""Float32 numbers that an update reads or writes a weight, the norm of the gradient included."""
LAYER_CALLS, CALL_SECONDS = 80, 8e-6
"""Calls of a layer's forward and backward pass from Python, and what one costs beside its work."""


class Setup(NamedTuple):
    """A run without its weights."""

    config: DistillConfig
    student: TrainedModel
    teachers: tuple[LiveTeacher, ...]
    """The live ones."""
    loss: Loss
    data: Data
    asked: tuple[tuple[int, ...], ...] = ((),)
    """Which of the live teachers are asked together, by the number of a source's teacher."""


class Charge(NamedTuple):
    """What one micro-batch costs."""

    tokens: int
    student: int
    """FLOPs, as the others."""
    teacher: int
    head: int
    sent: Pass
    teacher_sent: tuple[Pass, ...]


def predict_distill(
    config: DistillConfig,
    *,
    student: Any = None,
    teacher: Any = None,
    tokenizer: Any = None,
    samples: Sequence[Sample] | None = None,
    hardware: Hardware | None = None,
    world_size: int = 1,
) -> Prediction:
    """Cost of a distillation.

    Args:
      config: the run.
      student: transformers config of the model that trains, where `config.student` does not exist yet.
      teacher: the same of the first live teacher.
      tokenizer: renders the traces; that of the student when None.
      samples: rendered traces to train on, where `config.traces` do not exist yet (see `assumed_samples`).
      hardware: what it runs on; this machine, measured, when None.
      world_size: processes under torchrun; FLOPs and tokens are those of all, memory and seconds of one.
    Raises: ConfigError, ModelError or what reading and rendering the traces raise.
    """
    hardware = hardware or measure()
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(student_tokenizer_name(config))
    data = prepare(config, tokenizer) if samples is None else data_of(config, samples)
    setup = set_up(config, data, vocabulary_size(tokenizer), student, teacher, hardware.is_accelerator)
    notes = [] if samples is None else [f"{len(samples)} traces of assumed lengths"]
    notes += ["nothing of sources, which are read with the traces"] if samples is not None and config.sources else []
    return predict_run(setup, hardware, world_size, notes)


def step_flops(config: DistillConfig, tokenizer: Any) -> list[int]:
    """What the ledger will charge student and head for each planned step; the teacher and sampling are not in it."""
    return _step_flops(_read(config, tokenizer))


def own_flops(config: DistillConfig, tokenizer: Any) -> int:
    """What the ledger will charge student, head and sampling: all but the teacher."""
    setup = _read(config, tokenizer)
    steps = planned_steps(config, setup.data)
    return sum(_step_flops(setup)) + sampling_of(config, setup.data, setup.student.sizes, steps)[0]


def _read(config: DistillConfig, tokenizer: Any) -> Setup:
    return set_up(config, prepare(config, tokenizer), vocabulary_size(tokenizer), None, None, is_accelerator=False)


def _step_flops(setup: Setup) -> list[int]:
    steps = _charges(setup, planned_steps(setup.config, setup.data), world_size=1)
    return [sum(charge.student + charge.head for charge in step) for step in steps]


def assumed_samples(count: int, prompt_tokens: int, cot_tokens: int, answer_tokens: int) -> list[Sample]:
    """Rendered traces of equal lengths, for a source that does not exist yet.

    No two begin alike, so that nothing is taken for a shared prefix.
    """
    segments = np.repeat(np.arange(3, dtype=np.int8), [prompt_tokens, cot_tokens, answer_tokens])
    ending = prompt_tokens + cot_tokens
    return [
        Sample(
            input_ids=np.full(len(segments), number, dtype=np.int32),
            segment_ids=segments,
            ending_start=ending,
            trace_key=f"{number:016x}",
            source="assumed",
        )
        for number in range(count)
    ]


def set_up(
    config: DistillConfig, data: Data, vocab_size: int | None, student: Any, teacher: Any, is_accelerator: bool
) -> Setup:
    """The run that a config describes, its models on the meta device."""
    learner = student_of(config, student or _student_shape(config), vocab_size, is_accelerator)
    named = teachers_of(config) if config.asks_teacher else []
    live = list(filter(_is_live, named))
    known = [] if teacher is None else [teacher][: len(live)]
    shapes = known + [config_of(str(given.model)) for given in live[len(known) :]]
    teachers = tuple(teacher_of(config, shape, vocab_size, is_accelerator) for shape in shapes)
    stored = [_stored(given) for given in named if not _is_live(given)]
    return Setup(config, learner, teachers, _loss_of(config, learner, teachers, stored), data, _asked(config))


def _asked(config: DistillConfig) -> tuple[tuple[int, ...], ...]:
    """The places among the live teachers of those of the run, and of those of each source that has its own."""
    found, place = [], 0
    for first in (config.teacher, *(source.teacher for source in config.sources if source.teacher)):
        count = sum(map(_is_live, (first, *first.others))) if config.asks_teacher else 0
        found.append(tuple(range(place, place + count)))
        place += count
    return tuple(found)


def _loss_of(
    config: DistillConfig, learner: TrainedModel, teachers: Sequence[LiveTeacher], stored: Sequence[tuple[int, int]]
) -> Loss:
    return Loss(
        vocab=learner.sizes.vocab_size,
        width=learner.dims.width,
        is_head_trainable=learner.sizes.is_head_trainable,
        chunk_bytes=config.loss.chunk_bytes or chunk_bytes_on("cpu" if learner.way.is_cpu else "cuda"),
        teacher_widths=tuple(t.dims.width for t in teachers) + tuple(width for width, _ in stored if width),
        topk=sum(entries for _, entries in stored),
    )


def _student_shape(config: DistillConfig) -> Any:
    scratch = config.student.scratch
    return scratch_shape(scratch) if scratch is not None else config_of(config.student.model or "")


def _is_live(teacher: TeacherConfig) -> bool:
    return teacher.server is None and teacher.cache is None


def student_of(config: DistillConfig, shape: Any, vocab_size: int | None, is_accelerator: bool) -> TrainedModel:
    """The student of a run as it trains."""
    with warnings.catch_warnings():
        # transformers renames the switch for recomputation; the run itself says so once.
        warnings.simplefilter("ignore", FutureWarning)
        model = trainable(on_meta(shape), config).train()
    training, is_bf16 = config.training, config.training.is_bf16(is_accelerator)
    way = Way(
        is_lean=not (is_accelerator or is_bf16)
        and training.layout == "packed"
        and has_plain_layers(backbone_of(model)),
        is_bf16=is_bf16,
        is_recomputed=training.gradient_checkpointing,
        has_head_norms=_has_head_norms(shape),
        is_cpu=not is_accelerator,
    )
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TrainedModel(sizes_of(model, vocab_size), Dims.of(shape), way, parameters)


def teacher_of(config: DistillConfig, shape: Any, vocab_size: int | None, is_accelerator: bool) -> LiveTeacher:
    """A live teacher of a run."""
    model = on_meta(shape).eval().requires_grad_(False)
    is_bf16 = config.training.is_bf16(is_accelerator)
    is_plain = not (is_accelerator or is_bf16) and config.training.layout == "packed"
    way = Way(
        is_plain and has_plain_layers(backbone_of(model)),
        is_bf16,
        False,
        _has_head_norms(shape),
        not is_accelerator,
    )
    return LiveTeacher(sizes_of(model, vocab_size), Dims.of(shape), way)


def predict_run(setup: Setup, hardware: Hardware, world_size: int = 1, notes: Sequence[str] = ()) -> Prediction:
    """Cost of a run that is set up."""
    steps = planned_steps(setup.config, setup.data, world_size)
    charges = list(_charges(setup, steps, world_size))
    flat = [charge for step in charges for charge in step]
    if not flat:
        return Prediction("distill", steps=len(steps), notes=tuple(notes))
    sampling, written = sampling_of(setup.config, setup.data, setup.student.sizes, steps)
    flops = flops_of(
        teacher=sum(charge.teacher for charge in flat),
        student=sum(charge.student for charge in flat),
        head=sum(charge.head for charge in flat),
        sampling=sampling,
    )
    accumulates = any(len(step) > world_size for step in charges)
    return Prediction(
        stage="distill",
        tokens=sum(charge.tokens for charge in flat),
        new_tokens=written,
        steps=len(steps),
        flops=flops,
        memory=_memory(setup, flat, len(steps), accumulates),
        seconds=_seconds(setup, flat, sum(flops.values()), len(steps), hardware) / world_size,
        notes=(*notes, *_assumptions(setup, sampling)),
    )


def _assumptions(setup: Setup, sampling: int) -> Iterator[str]:
    if setup.config.stop_control is not None:
        yield "the student goes on stopping by itself, so that no more traces stay whole"
    if setup.config.on_policy is not None and sampling:
        yield "rollouts as long as the given responses, or max_new_tokens where that is less"
    if setup.config.supervision.select is not None:
        yield "selected positions spread evenly over every sequence"


def _memory(setup: Setup, charges: Sequence[Charge], steps: int, accumulates: bool) -> dict[str, int]:
    """Of the largest micro-batches of student and teachers."""
    student, config = setup.student, setup.config
    return training_memory(
        student,
        setup.teachers,
        setup.loss,
        max((charge.sent for charge in charges), key=lambda sent: saved_bytes(student.dims, student.way, sent)),
        [
            max((charge.teacher_sent[n] for charge in charges if charge.teacher_sent), key=_tokens, default=_NOTHING)
            for n in range(len(setup.teachers))
        ],
        optimizer=config.optimizer.name,
        accumulates=accumulates,
        steps=steps,
        validation=_validation(setup),
        threads=config.training.num_threads or torch.get_num_threads(),
        is_adapted=config.lora is not None,
        saves=0 < config.training.save_every_steps < steps and config.training.parallel.strategy == "replicate",
    )


def _validation(setup: Setup) -> Pass | None:
    """The largest group of held-out sequences, filled as the run fills it."""
    lengths = sorted(len(example) for example in setup.data.validation)
    if not lengths:
        return None
    limit = setup.config.training.microbatch_tokens
    tokens = max(lengths[-1], min(sum(lengths), limit))
    rows = sum(int((example.ce_weight > 0).sum()) for example in setup.data.validation)
    return Pass(Computed(tokens, tokens, 0), round(rows * tokens / sum(lengths)))


def data_of(config: DistillConfig, samples: Sequence[Sample]) -> Data:
    """What a run would read, from rendered traces."""
    prompts = None
    if config.on_policy is not None:
        ids = [sample.input_ids[sample.segment_ids == PROMPT].tolist() for sample in samples]
        lengths = [len(sample) - len(prompt) for sample, prompt in zip(samples, ids, strict=True)]
        prompts = Prompts(ids, float(np.mean(lengths)))
    cut, moving = cuts_of(config, samples)
    examples = [make_example(sample, cut, config.supervision) for sample in samples]
    return Data(examples, [], {}, prompts, moving=moving)


def _stored(teacher: TeacherConfig) -> tuple[int, int]:
    """Width of hidden states and entries of a row that a cache or a server gives; that of the default where it is not
    there yet."""
    if teacher.cache is None:
        return 0, teacher.top_n
    if not (teacher.cache / SPEC).exists():
        return 0, CacheConfig().top_k
    spec = Spec.read(teacher.cache)
    sizes = {
        "hidden": (spec.hidden_size, 0),
        "top_k": (0, spec.config.top_k),
        "sampled": (0, spec.config.num_samples),
        "projected": (0, 0),
    }
    return sizes[spec.config.mode]


def _has_head_norms(shape: Any) -> bool:
    return shape.model_type.startswith(("qwen3", "olmo2", "gemma3"))


def _charges(setup: Setup, steps: Sequence[PlannedStep], world_size: int) -> Iterator[list[Charge]]:
    """The micro-batches of every step, over all ranks."""
    policy, moving, training = setup.config.on_policy, setup.data.moving, setup.config.training
    for number, step in enumerate(steps):
        examples, kd_ratio, is_own = setup.data.train, setup.config.kd_ratio, False
        if policy is not None and policy.is_on_policy(number, len(steps)):
            assert setup.data.prompts is not None
            examples, kd_ratio, is_own = rollouts_of(policy, setup.data.prompts, number, steps), 1.0, True
        elif moving is not None:
            share = setup.config.truncation.whole_fraction
            examples, is_own = moving.examples(number, len(steps), step.indices, share), True
        if is_own:
            lengths = [len(example) for example in examples]
            teachers = setup.config.teachers_by(examples)
            step = split_step(
                range(len(examples)), lengths, training.microbatch_tokens, training.layout, world_size, teachers
            )
        groups = [[examples[i] for i in group] for rank in step.microbatches for group in rank]
        yield [charge_of(setup, group, kd_ratio) for group in groups]


def charge_of(setup: Setup, examples: Sequence[Example], kd_ratio: float) -> Charge:
    """What the ledger will charge for one micro-batch."""
    batch = collate(examples, setup.config.training.layout, 0)
    ce = (batch.ce_weight.flatten() > 0) & (kd_ratio < 1)
    kd = (batch.kd_weight.flatten() > 0) & (kd_ratio > 0)
    asked = torch.nonzero(ce | kd)[:, 0]
    if not len(asked):
        return Charge(batch.num_tokens, 0, 0, 0, _NOTHING, ())
    is_taught = bool(kd.any())
    kept = _kept(setup, batch, asked, ce[asked], kd[asked]) if is_taught else asked
    sizes, select = setup.student.sizes, setup.config.supervision.select
    reads_student = is_taught and select is not None and select.reads_student
    sent = _pass(setup.student.way, batch, asked if reads_student else kept)
    flops = backbone_forward_flops(sizes, sent.computed) + backbone_backward_flops(sizes, sent.computed)
    head = head_flops(sizes, len(kept))
    if reads_student and select is not None:
        teachers = max(1, len(setup.loss.teacher_widths) + bool(setup.loss.topk))
        head += select.head_passes(teachers) * head_forward_flops(sizes, len(asked))
    passes: tuple[Pass, ...] = ()
    teaching = 0
    if is_taught:
        (number,) = {setup.config.teacher_numbers[example.sample.origin] for example in examples}
        own = setup.asked[number]
        passes = tuple(
            _pass(teacher.way, batch, asked) if place in own else _NOTHING
            for place, teacher in enumerate(setup.teachers)
        )
        scored = len(asked) if select is None or select.reads_teacher else 0
        scored += len(asked) if setup.config.supervision.borders is not None and kd_ratio < 1 else 0
        teaching = _teaching(setup, passes, scored + (len(kept) if select is not None else 0))
    return Charge(batch.num_tokens, flops, teaching, head, sent._replace(rows=len(kept)), passes)


def _teaching(setup: Setup, passes: Sequence[Pass], head_rows: int) -> int:
    """FLOPs of the live teachers."""
    return sum(
        backbone_forward_flops(teacher.sizes, taught.computed) + head_forward_flops(teacher.sizes, head_rows)
        for teacher, taught in zip(setup.teachers, passes, strict=True)
        if taught is not _NOTHING
    )


_NOTHING = Pass(Computed(0, 0, 0), 0)


def _tokens(sent: Pass) -> int:
    return sent.computed.tokens


def _pass(way: Way, batch: Batch, rows: Tensor) -> Pass:
    """What a model computes for the targets at flat indices `rows`, as `hidden_rows` does it."""
    if way.is_lean:
        plan = plan_packed(batch.input_ids[0], batch.sequence_lengths, rows - 1)
        behind = sum(plan.own)
        pairs = behind * (plan.prefix + behind) if plan.is_joint else 0
        return Pass(Computed(len(plan.kept), len(rows), plan.attention_pairs), len(rows), pairs)
    width = batch.input_ids.shape[1]
    packed = batch.layout == "packed"
    return Pass(Computed.whole(batch.sequence_lengths if packed else [width] * len(batch.input_ids)), len(rows))


def _kept(setup: Setup, batch: Batch, asked: Tensor, ce: Tensor, kd: Tensor) -> Tensor:
    """The positions that token selection leaves: of every sequence as many as it keeps, spread evenly, the last too."""
    select = setup.config.supervision.select
    if select is None or select.fraction is None:
        return asked
    packed = batch.layout == "packed"
    widths = batch.sequence_lengths if packed else [batch.input_ids.shape[1]] * len(batch.input_ids)
    owner = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))[asked]
    keep = ce.clone()
    for sequence in range(len(widths)):
        place = torch.nonzero((owner == sequence) & kd)[:, 0]
        if len(place):
            count = share_of(len(place), select.fraction)
            keep[place[torch.linspace(len(place) / count - 1, len(place) - 1, count).round().long()]] = True
    return asked[keep]


def _seconds(setup: Setup, charges: Sequence[Charge], flops: int, steps: int, hardware: Hardware) -> float:
    """Roofline of a run: products, traffic of activations and of the update, and calls."""
    student = setup.student
    products = flops / hardware.rate("bf16" if student.way.is_bf16 else "float32")
    kept = sum(saved_bytes(student.dims, student.way, charge.sent) for charge in charges)
    updates = 4 * (UPDATE_TRAFFIC + states_of(setup.config.optimizer.name)) * student.trainable_parameters * steps
    layers = student.dims.layers + sum(teacher.dims.layers for teacher in setup.teachers) / 2
    calls = 0.0 if hardware.is_accelerator else len(charges) * layers * LAYER_CALLS * CALL_SECONDS
    return products + (TRAFFIC * kept + updates) / (hardware.bandwidth * hardware.efficiency) + calls
