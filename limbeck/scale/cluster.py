"""A training step on many devices: memory of one, seconds of its products, seconds of its messages.

Memory of a device, S devices holding one copy of the student and t sharing its products (P parameters, V D of them the
head's, l a layer's, in float32 unless said):

    weights, gradients, optimizer   (4 + 4 + 4 s) P / (S t), s numbers a weight of optimizer state
    gathered                        two layers in the products' dtype, one layer's gradient; the whole head, or its part
                                    with `shard_head`; replicated: 4 P for the message of gradients
    teacher                         4 P_t / S_t, and two layers gathered
    activations, loss, workspace    as on one device (memory.py), of one micro-batch

Messages of a device in bytes (a ring moves (S - 1) / S of them), those of shards at the speed of the slowest link that
the group spans, in parallel with the products of other layers, so that the longer of the two counts; those of a
replicated student and of tensor parallelism wait and are added:

    sharded student     8 P / t a micro-batch in bf16: gathered forward (2), gathered backward (2), gradients summed (4)
    sharded teacher     2 P_t a micro-batch
    replicated          8 P / (S t) a step: gradients summed and handed back
    tensor parallel     8 a token, width and layer, or 12 with recomputation: sums of two products each way
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from limbeck.config import to_dict
from limbeck.cost.hardware import Hardware
from limbeck.cost.memory import (
    LiveTeacher,
    Loss,
    Pass,
    TrainedModel,
    backward_bytes,
    forward_bytes,
    loss_bytes,
    saved_bytes,
    states_of,
)
from limbeck.distill.config import DistillConfig
from limbeck.distill.parallel import ParallelConfig
from limbeck.ledger import backbone_backward_flops, backbone_forward_flops, head_flops, head_forward_flops
from limbeck.models.anatomy import Computed
from limbeck.traces.batch import Example

USABLE_FRACTION = 0.92
"""Of a device's memory: the rest is for its context, its libraries and fragmentation."""


class Load(NamedTuple):
    """What there is to train on, after the cut."""

    traces: int
    tokens: float
    """Mean a trace."""
    pairs: float
    """Mean square of the tokens of a trace: pairs of query and key."""
    rows: float
    """Mean of the supervised positions of a trace."""
    longest: int

    @classmethod
    def of(cls, examples: Sequence[Example], traces: int | None = None) -> Load:
        """Of some examples, standing for `traces` of their kind."""
        lengths = np.array([len(example) for example in examples])
        rows = [int(((e.ce_weight > 0) | (e.kd_weight > 0)).sum()) for e in examples]
        return cls(
            len(examples) if traces is None else traces,
            float(lengths.mean()),
            float((lengths.astype(float) ** 2).mean()),
            float(np.mean(rows)),
            int(lengths.max()),
        )


class Models(NamedTuple):
    """Who trains, and who is asked."""

    student: TrainedModel
    teachers: tuple[LiveTeacher, ...]
    loss: Loss


class Estimate(NamedTuple):
    """A run on many devices."""

    config: DistillConfig
    """The run, with the settings that were looked at."""
    devices: int
    memory: dict[str, int]
    """Bytes of one device at the highest moment, by term."""
    flops: int
    """Of the whole run, all devices."""
    steps: int
    compute_seconds: float
    """Products of a step on the busiest device."""
    shard_seconds: float
    """Messages of a step that go on beside the products."""
    waiting_seconds: float
    """Messages of a step that nothing goes on beside."""
    update_seconds: float
    """Memory traffic of an update."""
    busy_fraction: float
    """Tokens of a step over those that all devices could take while the busiest works."""
    limit_bytes: float
    """What a device can hold."""

    @property
    def peak_bytes(self) -> int:
        """Of one device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether one device can hold its part."""
        return self.peak_bytes <= self.limit_bytes

    @property
    def step_seconds(self) -> float:
        """From one update to the next."""
        return max(self.compute_seconds, self.shard_seconds) + self.waiting_seconds + self.update_seconds

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.step_seconds * self.steps / 3600

    @property
    def device_hours(self) -> float:
        """Hours times devices."""
        return self.hours * self.devices

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the settings that matter among them."""
        training = self.config.training
        return {
            "devices": self.devices,
            "fits": self.fits,
            "memory_bytes": {**self.memory, "total": self.peak_bytes},
            "limit_bytes": round(self.limit_bytes),
            "flops": self.flops,
            "steps": self.steps,
            "step_seconds": self.step_seconds,
            "compute_seconds": self.compute_seconds,
            "message_seconds": self.shard_seconds + self.waiting_seconds,
            "hours": self.hours,
            "device_hours": self.device_hours,
            "busy_fraction": self.busy_fraction,
            "gradient_checkpointing": training.gradient_checkpointing,
            "microbatch_tokens": training.microbatch_tokens,
            "precision": training.precision,
            "parallel": to_dict(training.parallel),
        }


def estimate(config: DistillConfig, models: Models, load: Load, hardware: Hardware, devices: int) -> Estimate:
    """Memory and time of a run on `devices` devices with the config's own settings.

    Args:
      config: `training.parallel`, micro-batches, recomputation, precision and batch are read from it.
      models: on an accelerator (see `training.set_up`).
      load: the traces.
    """
    training, parallel = config.training, config.training.parallel
    tensor = parallel.tensor_parallel_size
    readers = max(1, devices // tensor)
    sequences, steps = _batch(config, load)
    share = -(-sequences // readers)
    own_tokens = share * load.tokens
    micro_tokens = min(max(float(training.microbatch_tokens), load.longest), max(own_tokens, load.longest))
    micro_batches = max(1, round(-(-own_tokens // micro_tokens)))
    flops = trace_flops(models, load)
    compute = share * flops / tensor / hardware.rate("bf16" if models.student.way.is_bf16 else "float32")
    own, taught = _shard_size(parallel, devices), _teacher_shard_size(parallel, devices)
    shard, waiting = _messages(
        models, parallel, hardware, devices, own, taught, micro_batches, own_tokens, training.gradient_checkpointing
    )
    held = models.student.trainable_parameters / (own * tensor)
    update = 4 * (9 + states_of(config.optimizer.name)) * held / hardware.bandwidth
    return Estimate(
        config,
        devices,
        device_memory(config, models, load, devices, micro_tokens, micro_batches > 1),
        round(flops * load.traces * training.epochs if training.max_steps is None else flops * sequences * steps),
        steps,
        compute,
        shard,
        waiting,
        update,
        sequences / (share * readers),
        USABLE_FRACTION * hardware.memory_bytes,
    )


def trace_flops(models: Models, load: Load) -> float:
    """FLOPs of one trace of mean length, forward and backward, teachers and head included."""
    student, rows = models.student, round(load.rows)
    computed = Computed(round(load.tokens), round(load.tokens), round(load.pairs))
    flops = backbone_forward_flops(student.sizes, computed) + backbone_backward_flops(student.sizes, computed)
    flops += head_flops(student.sizes, rows)
    for teacher in models.teachers:
        flops += backbone_forward_flops(teacher.sizes, computed) + head_forward_flops(teacher.sizes, rows)
    return float(flops)


def device_memory(
    config: DistillConfig, models: Models, load: Load, devices: int, micro_tokens: float, accumulates: bool
) -> dict[str, int]:
    """Bytes of one device by term, all of which are alive when the backward pass begins, or ends."""
    parallel, (student, teachers, loss) = config.training.parallel, models
    tensor, own = parallel.tensor_parallel_size, _shard_size(parallel, devices)
    parts, dims = own * tensor, student.dims
    item = 2 if student.way.is_bf16 else 4
    tokens = round(micro_tokens)
    rows = round(tokens * load.rows / load.tokens)
    sent = Pass(Computed(tokens, tokens, round(tokens * load.pairs / load.tokens)), rows)
    kept = 4 * student.trainable_parameters / parts
    head = dims.vocab * dims.width
    shards = parts if parallel.strategy == "shard" and parallel.shard_head else 1
    gathered = _gathered(config, models, devices, item, head / shards)
    of_loss = loss_bytes(loss._replace(vocab=-(-loss.vocab // shards)), student.way, rows, 1)
    activations = saved_bytes(dims, student.way, sent) / (tensor if not student.way.is_recomputed else 1)
    held = _held(models, _teacher_shard_size(parallel, devices), item)
    teaching = max((forward_bytes(t.dims, t.way, sent.computed) for t in teachers), default=0)
    start = activations + of_loss + kept * accumulates
    end = kept + 4 * head / shards
    # Which of the two moments is the higher one.
    at_start = start >= end
    terms = {
        "weights": 4 * student.sizes.num_parameters / parts,
        "optimizer": states_of(config.optimizer.name) * kept,
        "teacher": held,
        "gathered": gathered,
        "gradients": kept * (accumulates or not at_start),
        "activations": activations * at_start,
        "loss": of_loss if at_start else 4 * head / shards,
        "workspace": max(backward_bytes(dims, student.way, sent.computed) / tensor, teaching - activations),
    }
    return {name: int(value) for name, value in terms.items()}


def _gathered(config: DistillConfig, models: Models, devices: int, item: int, own_head: float) -> float:
    """Bytes of weights and gradients beside a device's own parts: two layers and the head, or copies in bf16."""
    parallel, sizes = config.training.parallel, models.student.sizes
    if parallel.strategy == "shard":
        layer = sizes.linear_weights / models.student.dims.layers
        return (2 * item + 4) * layer / parallel.tensor_parallel_size + 4 * own_head
    summed = 4.0 * models.student.trainable_parameters * (devices > 1)
    if item == 4:
        return summed
    return summed + 2.0 * max(sizes.linear_weights, *(t.sizes.linear_weights for t in models.teachers), 0)


def _held(models: Models, taught: int, item: int) -> float:
    """Bytes of the teachers: a device's own parts, and two layers of each that are gathered."""
    held = sum(4 * t.sizes.num_parameters / taught for t in models.teachers)
    if taught == 1:
        return held
    return held + sum(2 * item * t.sizes.linear_weights / t.dims.layers for t in models.teachers)


def _batch(config: DistillConfig, load: Load) -> tuple[int, int]:
    """Sequences of a step, and steps."""
    training = config.training
    sequences = training.batch_size or max(1, round((training.batch_tokens or 1) / load.tokens))
    if training.max_steps is not None:
        return sequences, training.max_steps
    if training.max_tokens is not None:
        return sequences, max(1, round(training.max_tokens / (sequences * load.tokens)))
    return sequences, max(1, -(-round(training.epochs * load.traces) // sequences))


def _shard_size(parallel: ParallelConfig, devices: int) -> int:
    if parallel.strategy == "replicate":
        return 1
    return parallel.shard_size or max(1, devices // parallel.tensor_parallel_size)


def _teacher_shard_size(parallel: ParallelConfig, devices: int) -> int:
    return 1 if parallel.of_teacher == "replicate" else parallel.teacher_shard_size or devices


def _link(hardware: Hardware, span: int) -> float:
    """Bytes a second of a device in a group that spans so many neighbouring devices."""
    return hardware.link_bandwidth if span <= hardware.devices_per_node else hardware.network_bandwidth


def _messages(
    models: Models,
    parallel: ParallelConfig,
    hardware: Hardware,
    devices: int,
    own: int,
    taught: int,
    micro_batches: int,
    tokens: float,
    is_recomputed: bool,
) -> tuple[float, float]:
    """Seconds of a step's messages: those beside products, and those that are waited for."""
    if devices == 1:
        return 0.0, 0.0
    student, tensor = models.student, parallel.tensor_parallel_size
    beside = waited = 0.0
    if own > 1:
        bytes_moved = 8 * student.sizes.num_parameters / tensor * (own - 1) / own
        beside += micro_batches * bytes_moved / _link(hardware, own * tensor)
    if taught > 1:
        moved = sum(2 * teacher.sizes.num_parameters for teacher in models.teachers) * (taught - 1) / taught
        beside += micro_batches * moved / _link(hardware, taught)
    copies = devices // (own * tensor)
    if copies > 1:
        moved = 8 * student.trainable_parameters / (own * tensor) * (copies - 1) / copies
        waited += moved / _link(hardware, devices)
    if tensor > 1:
        dims, sums = student.dims, 12 if is_recomputed else 8
        moved = sums * tokens * dims.width * dims.layers * 2 * (tensor - 1) / tensor
        waited += moved / _link(hardware, tensor)
    return beside, waited
