"""What one distillation run is: every field of `limbeck distill`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Literal, Protocol

from limbeck.client import ClientConfig, server_root
from limbeck.config import checked
from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.mix import Portion
from limbeck.distill.moving_cut import CutScheduleConfig, check_schedule
from limbeck.distill.on_policy import OnPolicyConfig
from limbeck.distill.parallel import ParallelConfig
from limbeck.distill.stop_control import StopControlConfig
from limbeck.distill.trackers import TrackerName
from limbeck.errors import ConfigError
from limbeck.models.tiny import ScratchConfig
from limbeck.optim.build import OptimizerConfig
from limbeck.optim.growing_batch import BatchGrowth
from limbeck.optim.schedules import ScheduleConfig
from limbeck.teacher.cache import Spec
from limbeck.teacher.served import Dialect
from limbeck.traces.batch import Example, Layout
from limbeck.traces.render import RenderConfig
from limbeck.traces.select import SelectConfig
from limbeck.traces.sources import TraceConfig
from limbeck.traces.supervise import SupervisionConfig
from limbeck.traces.truncate import TruncationConfig


@checked
class StudentConfig:
    """The model that is trained: an existing one, or a small one from scratch."""

    model: str | None = None
    """Directory, alias (tiny-student, tiny-teacher, smollm2-135m) or Hugging Face hub id of the starting weights."""
    scratch: ScratchConfig | None = None
    """Shape of a randomly initialised model instead."""
    keep_zeros: bool = False
    """Keep the zeros of pruned layers (5 % or more of their weights) at zero through the training."""
    train_head: bool = True
    """Train the head, and with it the embeddings where both share their weights. A head that stays is what teacher
    caches of mode projected are written for."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.scratch is None):
            raise ConfigError("student needs exactly one of model and scratch")


@checked
class TeacherConfig:
    """Who gives the targets of the KD term. With none the run is supervised fine-tuning on the text."""

    model: str | None = None
    """Directory, alias or hub id of a live teacher with the student's tokenizer."""
    cache: Path | None = None
    """Directory of a teacher cache that holds every sequence of this run; `model` beside it must be its teacher."""
    server: str | None = None
    """Address of a model server instead (http://HOST:PORT): vLLM, SGLang or llama.cpp, asked for prompt log-probs."""
    server_model: str | None = None
    """The teacher's name at the server; null takes the only one there."""
    dialect: Dialect = "auto"
    """Kind of the server: vllm, sglang or llama_cpp; auto asks it."""
    top_n: int = 20
    """Entries asked of a server a position; vLLM gives at most its --max-logprobs, which is 20 unless raised."""
    client: ClientConfig = field(default_factory=ClientConfig)
    """How the server is asked."""
    weight: float = 1.0
    """Weight w of this teacher: the KD term is the sum of w_i D(p_i, student) over all teachers."""
    others: list[TeacherConfig] = field(default_factory=list)
    """Further teachers, each with fields and weight of its own."""

    def __post_init__(self) -> None:
        if self.server is not None:
            server_root(self.server)
            if self.model is not None or self.cache is not None:
                raise ConfigError("teacher takes a server, or a model and a cache, not both; list several under others")
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"weight must be finite and above 0; found {self.weight}")
        if self.top_n < 1:
            raise ConfigError(f"top_n must be at least 1; found {self.top_n}")
        self._check_others()

    def _check_others(self) -> None:
        if self.others and not self.is_named:
            raise ConfigError("others lists further teachers, but the first has neither model, cache nor server")
        if any(other.others or not other.is_named for other in self.others):
            raise ConfigError("every entry of others needs a model, a cache or a server, and no others of its own")

    @property
    def is_translated(self) -> bool:
        """Whether what it says is stored for a student with another tokenizer."""
        return self.cache is not None and bool(Spec.read(self.cache).tokenizer)

    @property
    def is_named(self) -> bool:
        """Whether there is a teacher at all."""
        return self.model is not None or self.cache is not None or self.server is not None


@checked
class LoraConfig:
    """Low-rank adapters instead of full training (Hu et al., arXiv 2106.09685), through peft."""

    rank: int = 16
    """Rank r of the adapters."""
    alpha: float = 32.0
    """Scale: the update is alpha / rank times the product of the adapters."""
    dropout: float = 0.0
    """Dropout in front of the adapters."""
    target_modules: str = "all-linear"
    """all-linear, or a regular expression of module names."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1; found {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1); found {self.dropout}")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"alpha must be finite; found {self.alpha}")


@checked
class LossConfig:
    """(1 - kd_ratio) CE + kd_ratio T^2 D(teacher, student)."""

    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    """The divergence D and its parameters."""
    kd_ratio: float | None = None
    """Share of the KD term, 0 <= x <= 1. When not set: 0.5 with a teacher (as in the paper), 0 without."""
    temperature: float = 1.0
    """Softmax temperature T of the KD term, > 0."""
    normalization: Literal["token_mean", "sequence_mean"] = "token_mean"
    """token_mean: each supervised token of a step weighs the same; sequence_mean: each sequence (the paper's runs)."""
    chunk_bytes: int | None = None
    """Memory budget of the logits in bytes, which exist only a chunk at a time; null: 256 MiB, 1 GiB on an
    accelerator."""

    def __post_init__(self) -> None:
        if self.kd_ratio is not None and not 0 <= self.kd_ratio <= 1:
            raise ConfigError(f"kd_ratio must be in [0, 1]; found {self.kd_ratio}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be finite and greater than 0; found {self.temperature}")
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise ConfigError(f"chunk_bytes must be at least 1; found {self.chunk_bytes}")


@checked
class SourceConfig:
    """More traces beside `traces`: how much of them is read, what they weigh and who teaches them."""

    traces: TraceConfig
    """Where they come from."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which of them are used."""
    epochs: float = 1.0
    """Passes over them in an epoch of the run; 0.5 reads one half in the first epoch, the other in the second."""
    share: float | None = None
    """Share of an epoch's tokens that they get instead, 0 < x < 1, as in the replay of older traces."""
    weight: float = 1.0
    """Weight of their tokens' loss beside those of `traces`, > 0."""
    teacher: TeacherConfig | None = None
    """Who gives the targets on them; null: the teacher of the run."""

    def __post_init__(self) -> None:
        if not (0 < self.epochs < math.inf and 0 < self.weight < math.inf):
            raise ConfigError(f"epochs and weight must be above 0 and finite; found {self.epochs} and {self.weight}")
        if self.share is not None and not 0 < self.share < 1:
            raise ConfigError(f"share must be above 0 and below 1; found {self.share}")
        if self.share is not None and self.epochs != 1:
            raise ConfigError("share says how often a source is read; leave epochs out")

    @property
    def portion(self) -> Portion:
        """How much of it an epoch reads."""
        return Portion(self.epochs, self.share)


@checked
class BatchGrowthConfig:
    """Batches that grow linearly, b_t = min(largest, b_0 + floor(per_step t)), from batch_size or batch_tokens on."""

    per_step: float
    """c: sequences (or tokens, with batch_tokens) added a step."""
    largest: int
    """Where the growth ends, in the same unit."""
    as_learning_rate: bool = False
    """The ablation: batches stay as they are and the learning rate is multiplied by b_0 / b_t instead."""

    def __post_init__(self) -> None:
        if not 0 <= self.per_step < math.inf:
            raise ConfigError(f"batch_growth.per_step must be finite and at least 0; found {self.per_step}")


@checked
class TrainingConfig:
    """The loop."""

    epochs: float = 1.0
    """Passes over the traces; may be partial. Not used when max_steps or max_tokens is set."""
    max_steps: int | None = None
    """Stop after so many optimizer steps."""
    max_tokens: int | None = None
    """Stop after so many tokens, repeating the traces as needed: runs with equal tokens."""
    batch_size: int | None = 8
    """Sequences in an optimizer step, over all ranks."""
    batch_tokens: int | None = None
    """Tokens in an optimizer step instead of a number of sequences (set batch_size to null)."""
    batch_growth: BatchGrowthConfig | None = None
    """Let the batch grow; null keeps its size."""
    microbatch_tokens: int = 4096
    """Most tokens in one forward pass. Bounds the memory; the gradient of the step does not change."""
    layout: Layout = "packed"
    """packed: no padding, sequences isolated by attention; padded: right padding, for any attention backend."""
    bucket_batches: int = 16
    """Batches a window that is sorted by length before it is cut; 1 keeps the order fully random."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the products, over float32 weights; auto: bf16 on an accelerator, float32 on a CPU, or what --dtype says."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, one more forward."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    seed: int = 0
    """Seed of the order of the traces and of dropout."""
    validate_every_steps: int = 0
    """Validate every so many steps, and always at the end; 0 only at the end."""
    keep_best: Literal["ce", "kd"] | None = None
    """Write the weights of the lowest held-out loss, of the text (ce) or to the teacher (kd), instead of the last."""
    patience: int | None = None
    """With keep_best: stop after so many validations in a row without a lower loss; null never."""
    save_every_steps: int = 100
    """Write a state to resume from every so many steps, beside the training; 0 never."""
    keep_states: int = 1
    """How many of the last states stay; one that is damaged is passed over for the one before it."""
    track: tuple[TrackerName, ...] = ()
    """Trackers that get every line of metrics.jsonl too: tensorboard, wandb, mlflow, trackio."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Several processes under torchrun."""
    num_threads: int | None = None
    """CPU threads; torch's choice when not set."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_tokens", "microbatch_tokens", "bucket_batches", "num_threads", "patience"):
            _check_positive(name, getattr(self, name))
        _check_positive("keep_states", self.keep_states)
        for name in ("validate_every_steps", "save_every_steps", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and at least 0; found {getattr(self, name)}")
        if not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs must be finite and greater than 0; found {self.epochs}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be in 0 to 2^32 - 1; found {self.seed}")
        self._check_batch()
        self._check_guard()

    def _check_batch(self) -> None:
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise ConfigError("exactly one of batch_size and batch_tokens must be set (set the other to null)")
        _check_positive("batch_size", self.batch_size)
        _check_positive("batch_tokens", self.batch_tokens)
        if self.batch_growth is not None and self.batch_growth.largest < (self.batch_size or self.batch_tokens or 0):
            raise ConfigError("batch_growth.largest is less than the batch that the run starts with")

    def _check_guard(self) -> None:
        if self.keep_best is not None and not self.validate_every_steps:
            raise ConfigError("keep_best chooses among validations; set validate_every_steps")
        if self.patience is not None and self.keep_best is None:
            raise ConfigError("patience needs keep_best: which held-out loss is to get lower, ce or kd")

    def is_bf16(self, by_device: bool) -> bool:
        """Whether products are in bf16: as set, or else as the device has it."""
        return by_device if self.precision == "auto" else self.precision == "bf16"

    def growing_batch(self) -> BatchGrowth | None:
        """Size of the batch at every step; None when it stays."""
        return None if self.batch_growth is None or self.batch_growth.as_learning_rate else self._growth()

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by, beside its schedule."""
        return self._growth().rate_factor(step) if self.batch_growth and self.batch_growth.as_learning_rate else 1.0

    def _growth(self) -> BatchGrowth:
        start = self.batch_size or self.batch_tokens
        assert start is not None and self.batch_growth is not None
        return BatchGrowth(start, self.batch_growth.per_step, self.batch_growth.largest)


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{name} must be at least 1; found {value}")


class LoopConfig(Protocol):
    """What the training loop reads of a config, whichever stage's it is."""

    @property
    def student(self) -> StudentConfig: ...
    @property
    def teacher(self) -> TeacherConfig: ...
    @property
    def loss(self) -> LossConfig: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def lora(self) -> LoraConfig | None: ...

    @property
    def kd_ratio(self) -> float:
        """The share of KD in force."""
        ...

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher is named, and the loss or the validation has a KD term."""
        ...


def kd_ratio_of(config: LoopConfig) -> float:
    """The share of KD in force: what is set, or 0.5 with a teacher and 0 without."""
    if config.loss.kd_ratio is not None:
        return config.loss.kd_ratio
    return 0.5 if config.teacher.is_named else 0.0


def teachers_of(config: LoopConfig) -> list[TeacherConfig]:
    """Every teacher that a run asks: its own, and those of single sources."""
    own = [source.teacher for source in config.sources if source.teacher] if isinstance(config, DistillConfig) else []
    return [one for teacher in (config.teacher, *own) for one in (teacher, *teacher.others)]


def check_loop(config: LoopConfig) -> None:
    """Refuse what no stage can train.

    Raises: ConfigError.
    """
    if not config.teacher.is_named and config.loss.kd_ratio:
        raise ConfigError(f"kd_ratio {config.loss.kd_ratio} needs teacher.model, teacher.cache or teacher.server")
    if config.training.keep_best == "kd" and not config.teacher.is_named:
        raise ConfigError("training.keep_best kd needs teacher.model, teacher.cache or teacher.server")
    if config.lora is not None and config.student.keep_zeros:
        raise ConfigError(
            "student.keep_zeros needs all weights to train: merging lora's adapters fills the zeros; leave one out"
        )


@checked
class DistillConfig:
    """One student: which traces, how much of them, from whom, with which loss."""

    student: StudentConfig
    """The model that is trained."""
    traces: TraceConfig
    """Where the traces come from."""
    sources: list[SourceConfig] = field(default_factory=list)
    """More traces, each with an amount, a weight and, where it is set, a teacher of its own."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Who gives soft targets."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which traces are used; each of `sources` has its own."""
    num_validation: int | None = None
    """Traces of each source held out, by hash of the prompt and before any cut, for the validation loss. 0 for none;
    null holds out a tenth of them, at most 64."""
    split_seed: int = 0
    """Seed of the choice of held-out traces; apart from training.seed, so that runs with other seeds share them."""
    max_trace_tokens: int | None = None
    """Leave out traces that are longer than this in tokens, before any cut."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How text becomes tokens."""
    truncation: TruncationConfig = field(default_factory=TruncationConfig)
    """Which part of every trace is kept."""
    cut_schedule: CutScheduleConfig | None = None
    """Move the share that is kept from step to step; null leaves it."""
    stop_control: StopControlConfig | None = None
    """Leave more traces whole when the student forgets how to stop; null does not look."""
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    """Which segments carry loss."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The objective."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning-rate schedule."""
    on_policy: OnPolicyConfig | None = None
    """Train a share of the steps on what the student writes itself; null never does."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights; the output holds the merged model."""

    def __post_init__(self) -> None:
        check_loop(self)
        if self.on_policy is not None and not all(
            teacher.is_named and teacher.cache is None for teacher in teachers_of(self)
        ):
            raise ConfigError(
                "on_policy needs teachers that can score new text: set teacher.model or teacher.server and no "
                "teacher.cache, which knows given traces only"
            )
        self._check_parallel()
        self._check_sources()
        self._check_sizes()
        self._check_moving()
        if self.supervision.borders is not None and not 0 < self.kd_ratio < 1:
            raise ConfigError(
                f"supervision.borders takes CE where a teacher may stop, so it needs both terms; kd_ratio is "
                f"{self.kd_ratio:g}: set a teacher and loss.kd_ratio above 0 and below 1"
            )
        if self.supervision.borders is not None and self.training.parallel.shard_head:
            raise ConfigError("supervision.borders reads whole rows of logits; set parallel.shard_head false")

    def _check_moving(self) -> None:
        """A cut that moves needs a known number of steps, and a controller something to look at."""
        if self.cut_schedule is not None:
            check_schedule(self.truncation)
        if self.moves_cut and (self.training.batch_tokens is not None or self.training.max_tokens is not None):
            raise ConfigError(
                "cut_schedule and stop_control cut each step anew, so its tokens are not known beforehand: set "
                "training.batch_size and epochs or max_steps, not batch_tokens or max_tokens"
            )
        if self.stop_control is None:
            return
        if self.truncation.policy == "random_horizon":
            raise ConfigError("stop_control leaves traces whole, which the weights of random_horizon do not know")
        if self.num_validation == 0:
            raise ConfigError("stop_control asks held-out prompts; set num_validation")
        if self.training.parallel.strategy == "shard":
            raise ConfigError("stop_control needs parallel.strategy replicate: a student in parts writes too slowly")

    def _check_sources(self) -> None:
        """Shares leave something for the others; what is weighed or taught by its source is given, not written."""
        shares = [source.share for source in self.sources if source.share is not None]
        if sum(shares) >= 1:
            raise ConfigError(
                f"sources: shares of {sum(shares):g} in all leave nothing for traces; make them less than 1"
            )
        if self.sources and self.training.parallel.shard_head:
            raise ConfigError("sources: the loss of each is told, which parallel.shard_head mixes; set it false")
        weighs = any(source.weight != 1 for source in self.sources) or self.supervision.sample_weight is not None
        if weighs and self.on_policy is not None:
            raise ConfigError("on_policy writes traces that no source weighs; leave weight and sample_weight out")
        if not any(self.teacher_numbers):
            return
        if not self.teacher.is_named:
            raise ConfigError("sources with a teacher need one for traces too; set teacher.model, cache or server")
        if self.on_policy is not None or "shard" in (
            self.training.parallel.strategy,
            self.training.parallel.of_teacher,
        ):
            raise ConfigError("a source's own teacher needs given traces and parallel.strategy replicate")

    def _check_sizes(self) -> None:
        if self.training.keep_best is not None and self.num_validation == 0:
            raise ConfigError("training.keep_best needs held-out traces; set num_validation")
        if self.num_validation is not None and self.num_validation < 0:
            raise ConfigError(f"num_validation must be at least 0; found {self.num_validation}")
        if self.max_trace_tokens is not None and self.max_trace_tokens < 1:
            raise ConfigError(f"max_trace_tokens must be at least 1; found {self.max_trace_tokens}")

    def _check_parallel(self) -> None:
        parallel = self.training.parallel
        if parallel.strategy == "shard" and self.on_policy is not None:
            raise ConfigError(
                "on_policy needs parallel.strategy replicate: a student in parts gathers every layer for each token"
            )
        if parallel.shard_head and self.supervision.select is not None:
            raise ConfigError("supervision.select reads whole rows of logits; set parallel.shard_head false")
        if parallel.tensor_parallel_size > 1 and self.lora is not None:
            raise ConfigError("parallel.tensor_parallel_size above 1 splits plain linear layers; leave lora out")

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """`traces` and `sources` alike, in this order, by which sources are numbered."""
        return (SourceConfig(traces=self.traces, select=self.select), *self.sources)

    @property
    def teacher_numbers(self) -> tuple[int, ...]:
        """Which teacher each source has: 0 is that of the run, 1 the first of a source's own, and so on."""
        own = [source.teacher is not None for source in self.sources]
        return (0, *(sum(own[: number + 1]) * is_own for number, is_own in enumerate(own)))

    def teachers_by(self, examples: Sequence[Example]) -> list[int] | None:
        """The number of the teacher of each example; None where all have that of the run."""
        numbers = self.teacher_numbers
        return [numbers[example.sample.origin] for example in examples] if any(numbers) else None

    @property
    def moves_cut(self) -> bool:
        """Whether traces are cut anew for every step."""
        return self.cut_schedule is not None or self.stop_control is not None

    @property
    def kd_ratio(self) -> float:
        """The share of KD in force."""
        return kd_ratio_of(self)

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher is named, and the loss, the rollouts or the validation have a KD term."""
        is_used = self.kd_ratio > 0 or self.on_policy is not None or self.training.keep_best == "kd"
        return self.teacher.is_named and is_used
