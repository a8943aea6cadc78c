"""`limbeck plan`: does a recipe fit on given machines, with which settings, and how long does it take?

The recipe's own settings are estimated first. Then all sensible ones are (replicated or sharded over a node or over all
devices, tensor parallel, recomputation, micro-batches), and the fastest that fits is named, as flags of `limbeck
distill`. If none fits with the teacher in memory, a cache of it is tried, written beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.config import checked
from limbeck.cost.hardware import Hardware
from limbeck.distill.config import DistillConfig, ParallelConfig, TeacherConfig
from limbeck.distill.data import prepare
from limbeck.distill.pair import student_tokenizer_name
from limbeck.distill.predict import assumed_samples, data_of, set_up
from limbeck.errors import ConfigError
from limbeck.models.load import load_tokenizer
from limbeck.scale.cluster import Estimate, Load, Models, estimate

MICROBATCH_TOKENS = (2048, 4096, 8192, 16384, 32768)
CACHE = Path("runs/teacher-cache")
"""Stands for a cache that is to be written, in a plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AssumedTraces:
    """Traces that are not at hand, by their mean lengths."""

    count: int = 17_000
    """How many there are to train on."""
    prompt_tokens: int = 200
    """Tokens of a prompt."""
    cot_tokens: int = 3000
    """Tokens of a thought."""
    answer_tokens: int = 400
    """Tokens of an answer."""

    def __post_init__(self) -> None:
        if min(self.count, self.prompt_tokens, self.answer_tokens) < 1 or self.cot_tokens < 0:
            raise ConfigError("traces: count and tokens must be at least 1, cot_tokens at least 0")

    def load(self, config: DistillConfig) -> Load:
        """What a run's cut and supervision leave of them."""
        samples = assumed_samples(1, self.prompt_tokens, self.cot_tokens, self.answer_tokens)
        return Load.of(data_of(config, samples).train, self.count)


@checked
class PlanConfig:
    """A recipe and machines."""

    distill: DistillConfig
    """The run: a recipe of `limbeck distill`, or the `distill` of a sweep. Models may be published names (qwen3-8b)."""
    hardware: str = "h100"
    """Device of the table (h100, h200, a100, a100-40gb, l40s, mi300x, laptop-cpu), or measured: this machine."""
    devices: int = 8
    """How many of them."""
    efficiency: float | None = None
    """Share of the peak FLOP/s that training reaches; null: the table's assumption."""
    assume: AssumedTraces | None = None
    """Traces by their lengths; null reads those of the recipe."""

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ConfigError(f"devices must be at least 1; found {self.devices}")
        if self.efficiency is not None and not 0 < self.efficiency <= 1:
            raise ConfigError(f"efficiency must be in (0, 1]; found {self.efficiency}")


def from_recipe(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a recipe of `limbeck distill`, `sweep` or `recover` says for a plan; a plan's own recipe as it is."""
    if "student" in tree:
        return {"distill": tree}
    own = set(PlanConfig.__dataclass_fields__)
    return tree if set(tree) <= own else {key: value for key, value in tree.items() if key == "distill"}


def run(config: PlanConfig, hardware: Hardware) -> list[Estimate]:
    """Estimates: the recipe's own settings, then the fastest that fit, best first; only the first where none does."""
    if config.devices > 1 and not hardware.is_accelerator:
        raise ConfigError(f"devices: {config.devices}, but {hardware.name} has no links to others in the table; use 1.")
    load = config.assume.load(config.distill) if config.assume is not None else _read(config.distill)
    return plan(config.distill, load, hardware, config.devices)


def plan(config: DistillConfig, load: Load, hardware: Hardware, devices: int) -> list[Estimate]:
    """As `run`, for traces that are known by their lengths."""
    known: dict[tuple[Any, ...], Models] = {}

    def estimated(choice: DistillConfig) -> Estimate:
        training = choice.training
        key = (training.gradient_checkpointing, training.precision, training.layout, choice.teacher.model)
        if key not in known:
            known[key] = models_of(choice, hardware)
        return estimate(choice, known[key], load, hardware, devices)

    own = estimated(config)
    fitting = [found for choice in candidates(config, load, hardware, devices) if (found := estimated(choice)).fits]
    if not fitting and config.teacher.model is not None:
        cached = replace(config, teacher=TeacherConfig(cache=CACHE), on_policy=None)
        fitting = [found for choice in candidates(cached, load, hardware, devices) if (found := estimated(choice)).fits]
    # Of equal times the one that changes least, and then the one with most memory left.
    return [own, *sorted(fitting, key=lambda found: (round(found.hours, 3), changes(config, found), found.peak_bytes))]


def candidates(config: DistillConfig, load: Load, hardware: Hardware, devices: int) -> Iterator[DistillConfig]:
    """The run with every sensible combination of settings."""
    for parallel, recompute, tokens in itertools.product(_layouts(hardware, devices), (False, True), MICROBATCH_TOKENS):
        if tokens >= load.longest or tokens == MICROBATCH_TOKENS[-1]:
            own = config.training.precision
            precision = "bf16" if hardware.is_accelerator and own != "auto" else own
            training = replace(
                config.training,
                parallel=parallel,
                gradient_checkpointing=recompute,
                microbatch_tokens=tokens,
                precision=precision,
            )
            yield replace(config, training=training)


def changes(config: DistillConfig, found: Estimate) -> int:
    """Number of settings that differ from the recipe's."""
    return len(flags_of(config, found.config))


def flags_of(config: DistillConfig, chosen: DistillConfig) -> list[str]:
    """What to add to `limbeck distill RECIPE` for the settings of a plan."""
    old, new = config.training, chosen.training
    pairs: list[tuple[str, Any, Any]] = [
        ("training.precision", old.precision, new.precision),
        ("training.gradient_checkpointing", old.gradient_checkpointing, new.gradient_checkpointing),
        ("training.microbatch_tokens", old.microbatch_tokens, new.microbatch_tokens),
        *(
            (f"training.parallel.{name}", getattr(old.parallel, name), getattr(new.parallel, name))
            for name in ParallelConfig.__dataclass_fields__
        ),
    ]
    if config.teacher.model is not None and chosen.teacher.model is None:
        pairs.append(("teacher.cache", None, chosen.teacher.cache))
    return [f"--{name.replace('_', '-')} {_yaml(after)}" for name, before, after in pairs if before != after]


def _layouts(hardware: Hardware, devices: int) -> Iterator[ParallelConfig]:
    yield ParallelConfig()
    if devices == 1:
        return
    node = min(devices, hardware.devices_per_node)
    for tensor in (1, 2, 4, 8):
        if tensor > node or devices % tensor:
            break
        for head in (False, True):
            yield ParallelConfig(strategy="shard", tensor_parallel_size=tensor, shard_head=head)
            inside = node // tensor
            if devices > node and inside > 1:
                yield ParallelConfig(
                    strategy="shard",
                    shard_size=inside,
                    teacher_shard_size=node,
                    tensor_parallel_size=tensor,
                    shard_head=head,
                )


def models_of(config: DistillConfig, hardware: Hardware) -> Models:
    """Student and live teachers of a run on the meta device."""
    setup = set_up(config, data_of(config, []), None, None, None, hardware.is_accelerator)
    return Models(setup.student, setup.teachers, setup.loss)


def _read(config: DistillConfig) -> Load:
    return Load.of(prepare(config, load_tokenizer(student_tokenizer_name(config))).train)


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
