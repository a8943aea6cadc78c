"""The `ranking` of a pipeline: a list of stages for the whole path of a scorer, with what every step costs and keeps.

    teacher -> students by SFT and by three kinds of KD -> prune and recover in turns -> quantise -> score and time

    OUT/teacher/   OUT/students/KIND-SEED/   OUT/unpruned/   OUT/pruned/   OUT/quantized/SCHEME/   OUT/tests/MODEL/
    OUT/table/

`unpruned` is the student that is compressed after as many further steps as the rounds of pruning train: a pruned model
that is set against the student before them would be credited with their training.

Source: 2502.14305, sections on predictive models: distillation, gradual pruning, quantisation, serving.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from limbeck.compress.calibrate import CalibrationConfig
from limbeck.compress.commands import QUANTIZE
from limbeck.compress.fidelity import GateConfig
from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.config import checked, completed_by
from limbeck.distill.config import StudentConfig, TrainingConfig
from limbeck.errors import ConfigError
from limbeck.models.schemes import scheme_of
from limbeck.optim.build import OptimizerConfig
from limbeck.pipeline import ranking_table
from limbeck.pipeline.ranking_table import ModelConfig
from limbeck.pipeline.task import OUT, Task
from limbeck.ranking.commands import EVALUATE, RECOVER, TRAIN
from limbeck.ranking.evaluate import RankEvaluateConfig
from limbeck.ranking.recover import CALIBRATION, RankRecoverConfig
from limbeck.ranking.scored import SCORES
from limbeck.ranking.train import RankTeacherConfig, RankTrainConfig

SFT, KD = "sft", "kd_labels"
KINDS = (SFT, KD, "kd_vocabulary", "kd_listwise")
STUDENT, UNPRUNED = f"{KD}-0", "unpruned"
"""The student that is compressed, and what more training makes of it without being pruned."""
TEACHER, STUDENTS, PRUNED, TESTS, TABLE = "teacher", "students", "pruned", "tests", "table"


@checked
class CutConfig:
    """How the student is pruned and trained back."""

    neuron_sparsity: float = 0.5
    """Share of the MLP neurons that goes, in all."""
    multiple_of: int = 8
    """Neurons that stay are a multiple of this."""
    rounds: int = 8
    """Turns of pruning and distilling."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Of all rounds together."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of every round."""


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe with the teacher's features for the student's, and its data but for what the student's says."""
    teacher, student = tree.get("teacher"), tree.get("student")
    if not isinstance(teacher, Mapping) or not isinstance(student, Mapping):
        return tree
    data = {**teacher.get("data", {}), **student.get("data", {})}
    return {**tree, "student": {**student, "data": data, "features": teacher.get("features", {})}}


@completed_by(completed)
class RankPipelineConfig:
    """A teacher, a student that learns from it in four ways, and what the best known way is compressed to."""

    teacher: RankTrainConfig
    """The teacher, trained on labels; all models are tested on its data."""
    student: RankTrainConfig
    """The student; teacher and loss are filled in for each way. Of its data only what differs from the teacher's is
    written, say max_train_requests."""
    kd_ratio: float = 0.9
    """Share of KD in KD + CE, where there is KD."""
    listwise_ratio: float = 0.5
    """Share of the KD of kd_listwise that compares the candidates of a request."""
    seeds: int = 1
    """Students by SFT and by label-token KD, with other initial weights and orders; the other ways have one."""
    cut: CutConfig = field(default_factory=CutConfig)
    """Pruning of the first student by label-token KD."""
    schemes: tuple[str, ...] = ("w8a8", "w4a16")
    """How the pruned student is quantised, each by itself."""
    group_size: int = 32
    """Inputs that share a scale in the schemes of weights only."""
    timed_requests: int = 64
    """Test requests that the latency is measured on."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.timed_requests < 1:
            raise ConfigError("seeds and timed_requests must be at least 1")
        if self.student.teacher.is_named:
            raise ConfigError("student.teacher: the pipeline's own teacher teaches; leave it out")
        if self.teacher.data.split.test_fraction == 0:
            raise ConfigError("teacher.data.split.test_fraction is 0; every step is measured on the test part")


def stages_of(config: RankPipelineConfig) -> list[Task]:
    """The stages that make the models, then those that test them, and the table."""
    stages = [Task("teacher", config.teacher, TRAIN, TEACHER)]
    for kind, seed in _students(config):
        stage = student_config(config, kind, seed, OUT + TEACHER)
        stages.append(Task(f"student-{kind}-{seed}", stage, TRAIN, f"{STUDENTS}/{kind}-{seed}"))
    stages.append(Task(UNPRUNED, _further(config), TRAIN, UNPRUNED))
    stages.append(Task(PRUNED, _recovery(config), RECOVER, PRUNED, gives=("model*.safetensors", CALIBRATION)))
    for scheme in config.schemes:
        stages.append(Task(scheme, _quantization(config, scheme), QUANTIZE, f"quantized/{scheme}"))
    models, data, features = _models(config), config.teacher.data, config.teacher.features
    for model in models:
        is_first = model is models[0]
        asked = RankEvaluateConfig(model=model.model, data=data, features=features, baselines=is_first)
        stages.append(Task(f"test-{model.name}", asked, EVALUATE, f"{TESTS}/{model.name}", gives=(SCORES,)))
    table = ranking_table.TableConfig(
        models=models, recovered=OUT + PRUNED, data=data, features=features, timed_requests=config.timed_requests
    )
    # Timed in this process, on the threads that its caller has set.
    stages.append(Task(TABLE, table, ranking_table.STAGE, TABLE, is_isolated=False))
    return stages


def _models(config: RankPipelineConfig) -> list[ModelConfig]:
    """All models, in the order of the table."""
    models = [_model("teacher", TEACHER)]
    for kind, seed in _students(config):
        name = f"{kind}-{seed}"
        models.append(_model(name, f"{STUDENTS}/{name}", before="teacher" if kind == SFT else f"{SFT}-{seed}"))
    models.append(_model(UNPRUNED, UNPRUNED, before=STUDENT))
    models.append(_model(PRUNED, PRUNED, before=UNPRUNED, whole=UNPRUNED))
    return models + [_model(name, f"quantized/{name}", before=PRUNED, whole=UNPRUNED) for name in config.schemes]


def _model(name: str, place: str, **beside: str) -> ModelConfig:
    return ModelConfig(name=name, model=OUT + place, scores=f"{OUT}{TESTS}/{name}", **beside)


def _students(config: RankPipelineConfig) -> Iterator[tuple[str, int]]:
    """Kind and seed of every student."""
    for kind in KINDS:
        yield from ((kind, seed) for seed in range(config.seeds if kind in (SFT, KD) else 1))


def student_config(config: RankPipelineConfig, kind: str, seed: int, teacher: str) -> RankTrainConfig:
    """The training of a student by one of KINDS; students of a seed differ in nothing else."""
    student, base = config.student.student, config.student
    if student.scratch is not None:
        student = replace(student, scratch=replace(student.scratch, seed=student.scratch.seed + seed))
    return replace(
        base,
        student=student,
        teacher=RankTeacherConfig(model=teacher),
        loss=replace(base.loss, kd_ratio=0.0 if kind == SFT else config.kd_ratio),
        ranking=replace(
            base.ranking,
            support="vocabulary" if kind == "kd_vocabulary" else "labels",
            listwise_ratio=config.listwise_ratio if kind == "kd_listwise" else 0.0,
        ),
        training=replace(base.training, seed=base.training.seed + seed),
    )


def _further(config: RankPipelineConfig) -> RankTrainConfig:
    """The training of the cut, as one run."""
    cut, start = config.cut, student_config(config, KD, 0, OUT + TEACHER)
    student = StudentConfig(model=f"{OUT}{STUDENTS}/{STUDENT}")
    return replace(start, student=student, training=cut.training, optimizer=cut.optimizer)


def _recovery(config: RankPipelineConfig) -> RankRecoverConfig:
    cut, model = config.cut, f"{OUT}{STUDENTS}/{STUDENT}"
    prune = PruneConfig(model=model, neuron_sparsity=cut.neuron_sparsity, multiple_of=cut.multiple_of)
    return RankRecoverConfig(prune=prune, rank=_further(config), rounds=cut.rounds)


def _quantization(config: RankPipelineConfig, scheme: str) -> QuantizeConfig:
    model = OUT + PRUNED
    gate = GateConfig(labels=config.teacher.features.labels)
    calibration = CalibrationConfig(text=Path(f"{OUT}{PRUNED}/{CALIBRATION}"))
    groups = scheme_of(scheme, config.group_size).group_size
    return QuantizeConfig(model=model, scheme=scheme, group_size=groups, calibration=calibration, gate=gate)
