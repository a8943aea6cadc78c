"""The stage `rank train`: requests and a student in, a trained scorer out.

It is a run of the distillation loop with other examples and another loss: optimizers, schedules, resumption, ranks,
guard, ledger and manifest are those of `limbeck distill`. What is its own:

1. Requests are read, split in time and written as pairs of a shared prefix and a candidate.
2. Steps and micro-batches hold whole requests, so that listwise terms see all candidates of one.
3. The loss is at the label token alone (`RankingObjective`).
4. At the end the held-out requests are scored, and the manifest tells AUC and its kin with intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.checkpoint import Checkpoint, write_manifest
from limbeck.config import checked, completed_by
from limbeck.distill import train
from limbeck.distill.config import (
    LoraConfig,
    LossConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
    check_loop,
    kd_ratio_of,
)
from limbeck.distill.data import Data
from limbeck.distill.job import training_job
from limbeck.distill.microbatch import Student
from limbeck.distill.output import metrics_of, write_model
from limbeck.distill.pair import check_pair, load_student, load_teacher
from limbeck.distill.parallel import Ranks, throughput, total_cost
from limbeck.distill.setup import Run
from limbeck.distill.zeros import KeptZeros
from limbeck.engine.backends import decoder_of, load_decoder
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger
from limbeck.models.anatomy import causal_lm_of
from limbeck.models.load import load_tokenizer, model_hash
from limbeck.optim.build import OptimizerConfig, build_optimizer
from limbeck.optim.schedules import ScheduleConfig
from limbeck.progress import say
from limbeck.ranking.data import RankingDataConfig, features_of, read_requests
from limbeck.ranking.evaluate import score_all
from limbeck.ranking.examples import pair_examples, plan_requests
from limbeck.ranking.featurize import EncodedRequest, FeaturizeConfig, Labels, encode_requests, write_request
from limbeck.ranking.interaction import Request
from limbeck.ranking.objective import RankingLossConfig, RankingObjective
from limbeck.ranking.score_teacher import ScoreTeacher, with_scores
from limbeck.ranking.scored import measures
from limbeck.ranking.split import Split
from limbeck.ranking.tokenizer import train_tokenizer
from limbeck.stage import How


@checked
class RankTeacherConfig(TeacherConfig):
    """Who gives soft targets; with none the run is supervised fine-tuning on the labels."""

    scores: str | None = None
    """Instead of a model: `column`, the log-odds of data.fields.teacher, or a directory in which rank evaluate --part
    train wrote the scores of any other scorer; no tokenizer is shared then."""

    def __post_init__(self) -> None:
        TeacherConfig.__post_init__(self)
        if self.scores is not None and TeacherConfig.is_named.fget(self):  # type: ignore[attr-defined]
            raise ConfigError("teacher takes scores, or a model, cache or server, not both")

    @property
    def is_named(self) -> bool:
        """Whether there is a teacher at all."""
        return self.scores is not None or TeacherConfig.is_named.fget(self)  # type: ignore[attr-defined]


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe whose prefix writes the query and the context that its data has, where it names no prefix itself."""
    data, features = tree.get("data"), tree.get("features") or {}
    if not isinstance(data, Mapping) or not isinstance(features, Mapping) or "prefix" in features:
        return tree
    return {**tree, "features": {**features_of(data), **features}}


@completed_by(completed)
class RankTrainConfig:
    """One scorer: which requests, from whom, with which loss."""

    student: StudentConfig
    """The model that is trained; one from scratch has the teacher's tokenizer, or one made of the training texts."""
    data: RankingDataConfig
    """What is ranked."""
    features: FeaturizeConfig = field(default_factory=FeaturizeConfig)
    """How requests become text."""
    teacher: RankTeacherConfig = field(default_factory=RankTeacherConfig)
    """Who gives soft targets: a model, cache or server with the student's tokenizer, or the scores of any scorer."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The objective: divergence, share of KD, temperature."""
    ranking: RankingLossConfig = field(default_factory=RankingLossConfig)
    """Labels alone or the whole vocabulary; pairs or lists."""
    vocabulary_tokens: int = 1024
    """Size of a tokenizer that is made of the training texts."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop; batch_size counts requests. With microbatch_tokens 1 each request has a pass of its own, in which its
    prefix is computed once (packed layout): best where prefixes are long."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning-rate schedule."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights; the output holds the merged model."""

    def __post_init__(self) -> None:
        if self.teacher.scores is not None and self.ranking.support == "vocabulary":
            raise ConfigError("teacher.scores says something of the two labels only: set ranking.support labels")
        parallel = self.training.parallel
        if "shard" in (parallel.strategy, parallel.of_teacher):
            raise ConfigError("rank train keeps every model whole: set training.parallel.strategy replicate")
        if self.vocabulary_tokens < 300:
            raise ConfigError(
                f"vocabulary_tokens must be at least 300, the bytes and some merges; found {self.vocabulary_tokens}"
            )
        if self.training.keep_best is not None and not self.data.split.validation_fraction:
            raise ConfigError("training.keep_best needs held-out requests; set data.split.validation_fraction")
        if self.ranking.listwise_ratio and not self.teacher.is_named:
            raise ConfigError("ranking.listwise_ratio is a share of KD; name a teacher")
        check_loop(self)

    @property
    def kd_ratio(self) -> float:
        """The share of KD in force."""
        return kd_ratio_of(self)

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher is named, and the loss or the validation has a KD term."""
        return self.teacher.is_named and (self.kd_ratio > 0 or self.training.keep_best == "kd")


class HeldOut(NamedTuple):
    """The validation requests, for the metrics at the end."""

    requests: list[EncodedRequest]
    labels: Labels


def run(config: RankTrainConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Train one scorer. Arguments as for `distill.train.run`."""
    with training_job(config.training, out, how) as (ranks, working):
        setup, held_out = set_up(config, ranks)
        kept = train.train(setup, working, how.resume)
        metrics = metrics_of(config, kept)
        if ranks.is_first:
            write_model(setup, working)
            metrics |= _measure(setup, *held_out)
        cost = total_cost(setup.ledger, ranks)
        cost["throughput"] = throughput(cost, ranks, setup.precision)
        if ranks.is_first:
            write_manifest(
                working,
                stage="rank train",
                config=config,
                inputs=inputs_of(config),
                ledger=cost,
                metrics=metrics,
                counts=setup.data.counts,
            )
    return Checkpoint(out)


def inputs_of(config: RankTrainConfig) -> dict[str, str]:
    """What a run reads, by role, as hashes of the files: student, teachers, data."""
    names = {"student": config.student.model}
    for number, teacher in enumerate((config.teacher, *config.teacher.others), 1):
        names["teacher" if number == 1 else f"teacher_{number}"] = teacher.model
    return {role: model_hash(name) for role, name in names.items() if name is not None} | config.data.input_hash


def set_up(config: RankTrainConfig, ranks: Ranks) -> tuple[Run, HeldOut]:
    """Load student, teacher and requests, and plan every step."""
    ledger = Ledger(ranks.device)
    split, counts = read_requests(config.data)
    _tell_one_sided(split.train)
    model, tokenizer = load_student(config, _scratch_tokenizer(config, split.train))
    model.to(ranks.device)
    check_pair(config, model, tokenizer)
    with ledger.phase("data"):
        training, held_out, labels = _encode(config, split, tokenizer)
    has_scores = config.teacher.scores is not None and config.asks_teacher
    pairs, groups = ([pair_examples(request, labels, has_scores) for request in part] for part in (training, held_out))
    teacher = ScoreTeacher() if has_scores else load_teacher(config, ranks)
    data = Data(
        [example for group in pairs for example in group],
        [example for group in groups for example in group],
        counts | _token_counts(training),
        validation_groups=[list(group) for group in groups],
    )
    _refuse_long(data, causal_lm_of(model).config.max_position_embeddings)
    steps = plan_requests(training, config.training, ranks.world_size)
    setup = Run(
        config=config,
        student=Student.of(model, tokenizer),
        teacher=teacher,
        data=data,
        steps=steps,
        optimizer=build_optimizer(model, config.optimizer, len(steps)),
        ledger=ledger,
        ranks=ranks,
        objective=RankingObjective(labels, config.ranking),
        zeros=KeptZeros(model) if config.student.keep_zeros else None,
    )
    return setup, HeldOut(held_out, labels)


def _scratch_tokenizer(config: RankTrainConfig, requests: Sequence[Request]) -> Any:
    """For a student from scratch: its teacher's, which it has to share, or one of the training texts."""
    if config.student.scratch is None:
        return None
    if config.teacher.model is not None:
        return load_tokenizer(config.teacher.model)
    written = (write_request(request, config.features) for request in requests)
    texts = (text.prefix + added for text in written for added in text.candidates)
    return train_tokenizer(texts, config.features.labels, config.vocabulary_tokens)


def _encode(
    config: RankTrainConfig, split: Split, tokenizer: Any
) -> tuple[list[EncodedRequest], list[EncodedRequest], Labels]:
    training, labels = encode_requests(split.train, tokenizer, config.features)
    held_out = encode_requests(split.validation, tokenizer, config.features)[0] if split.validation else []
    if config.teacher.scores is not None and config.asks_teacher:
        training = with_scores(config.teacher.scores, split.train, training)
        if config.training.keep_best == "kd":
            held_out = with_scores(config.teacher.scores, split.validation, held_out)
    return training, held_out, labels


def _token_counts(requests: Sequence[EncodedRequest]) -> dict[str, int]:
    return {
        "train_pairs": sum(len(request.candidates) for request in requests),
        "train_positives": sum(int(request.labels.sum()) for request in requests),
        "prefix_tokens": sum(len(request.prefix) for request in requests),
        "candidate_tokens": sum(len(ids) for request in requests for ids in request.candidates),
    }


def _tell_one_sided(requests: Sequence[Request]) -> None:
    labels = [candidate.label for request in requests for candidate in request.candidates]
    if len(set(labels)) == 1:
        kind, other = ("positive", "negative") if labels[0] else ("negative", "positive")
        say(f"note: all {len(labels)} training rows are {kind}; without a {other} one there is nothing to learn.")


def _refuse_long(data: Data, limit_tokens: int) -> None:
    longest = max(len(example) for example in [*data.train, *data.validation])
    if longest > limit_tokens:
        raise ConfigError(
            f"a pair of {longest} tokens is longer than the student's {limit_tokens} positions; show fewer events "
            "(data.grouping.history) or features."
        )


def _measure(setup: Run, requests: Sequence[EncodedRequest], labels: Labels) -> dict[str, Any]:
    """Metrics of the validation requests under the weights that are written, as validation_NAME."""
    if not requests:
        return {}
    model = setup.student.model.eval()
    with setup.ledger.phase("validation"):
        scored = score_all(decoder_of(model), requests, labels)
    return {f"validation_{name}": value for name, value in measures(scored).items()}


def measure(config: RankTrainConfig, model: str) -> dict[str, Any]:
    """Metrics of the validation requests of a run (`evaluate.measures`) under a model as it is."""
    split, _ = read_requests(config.data)
    tokenizer = load_tokenizer(model)
    requests, labels = encode_requests(split.validation, tokenizer, config.features)
    return measures(score_all(load_decoder(model), requests, labels))
