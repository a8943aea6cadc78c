"""`limbeck rank pipeline`: one recipe for the whole path of a ranking model, with what every step costs and keeps.

    teacher -> students by SFT and by three kinds of KD -> prune and recover in turns -> quantise -> score and time

Each step is a stage that exists by itself, in a directory of its own; called again, the pipeline goes on, and a step
whose config and inputs are what its manifest says is not done again.

    OUT/teacher/   OUT/students/KIND-SEED/   OUT/unpruned/   OUT/pruned/   OUT/quantized/SCHEME/   OUT/tests/MODEL/
    OUT/table.json

`unpruned` is the student that is compressed after as many further steps as the rounds of pruning train: a pruned model
that is set against the student before them would be credited with their training. Quality is that of the test part.
AUC, Kendall's tau and churn are set against the step before, the compressed models' AUC against `unpruned` too. Latency
is that of the scoring engine, a request at a time, prefix not known before, all models in turns on the same requests.

Source: 2502.14305, sections on predictive models: distillation, gradual pruning, quantisation, serving.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limbeck.checkpoint import Checkpoint, write_json, write_manifest
from limbeck.compress.calibrate import CalibrationConfig
from limbeck.compress.commands import QUANTIZE
from limbeck.compress.fidelity import GateConfig
from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.config import checked, completed_by
from limbeck.distill.config import StudentConfig, TeacherConfig, TrainingConfig
from limbeck.engine.backends import load_decoder
from limbeck.engine.scoring import Scorer
from limbeck.errors import ConfigError
from limbeck.models.load import load_model, load_tokenizer, model_hash
from limbeck.models.schemes import scheme_of
from limbeck.optim.build import OptimizerConfig
from limbeck.pipeline.advance import Pipeline
from limbeck.pipeline.task import OUT, Task
from limbeck.ranking.commands import EVALUATE, RECOVER, TRAIN
from limbeck.ranking.data import read_requests
from limbeck.ranking.evaluate import SCORES, RankEvaluateConfig, compare, engine_request, read_scores
from limbeck.ranking.featurize import encode_requests
from limbeck.ranking.recover import CALIBRATION, RankRecoverConfig
from limbeck.ranking.train import RankTrainConfig
from limbeck.report.page import write_report
from limbeck.stage import How

SFT, KD = "sft", "kd_labels"
KINDS = (SFT, KD, "kd_vocabulary", "kd_listwise")
STUDENT, UNPRUNED = f"{KD}-0", "unpruned"
"""The student that is compressed, and what more training makes of it without being pruned."""
TEACHER, STUDENTS, PRUNED, TESTS = "teacher", "students", "pruned", "tests"
TABLE = "table.json"
_WARM_UP_REQUESTS = 4


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


class Model(NamedTuple):
    """A model of the table."""

    name: str
    place: str
    """Its directory, below that of the pipeline."""
    before: str | None
    """The model it is compared with."""
    is_compressed: bool = False
    """Whether it is compared with the unpruned student too."""


def run(config: RankPipelineConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Do what is not done yet, in the directory `out`; its table and page are written there.

    Raises: what the stages raise; their own interrupted work goes on.
    """
    models = models_of(config)
    Pipeline(stages_of(config), out).advance(lambda _: None)
    times = _latencies(config, models, out)
    rows = [_row(model, out) | times[model.name] for model in models]
    result = {"rows": rows, "rounds": Checkpoint(out / PRUNED).manifest["metrics"]["rounds"]}
    write_json(out / TABLE, result)
    inputs = {model.name: model_hash(str(out / model.place)) for model in models} | config.teacher.data.input_hash
    write_manifest(out, stage="rank pipeline", config=config, inputs=inputs, metrics=result)
    write_report([out], out)
    return Checkpoint(out)


def _row(model: Model, out: Path) -> dict[str, Any]:
    """What the test part says of a model, by itself, beside the one before and beside the unpruned student."""
    tests = out / TESTS
    own, scores = Checkpoint(tests / model.name).manifest["metrics"], read_scores(tests / model.name)
    row = {**own, "model": model.name, "before": model.before, **_size(out / model.place)}
    if model.before is not None:
        row |= compare(scores, read_scores(tests / model.before))
    if model.is_compressed:
        whole = compare(scores, read_scores(tests / UNPRUNED))
        row |= {f"{name}_from_unpruned": value for name, value in whole.items()}
        row["relative_auc_from_unpruned"] = whole["auc_difference"] / (row["auc"] - whole["auc_difference"])
    return row


def models_of(config: RankPipelineConfig) -> list[Model]:
    """All models, in the order of the table."""
    models = [Model("teacher", TEACHER, None)]
    for kind, seed in _students(config):
        name = f"{kind}-{seed}"
        models.append(Model(name, f"{STUDENTS}/{name}", "teacher" if kind == SFT else f"{SFT}-{seed}"))
    models.append(Model(UNPRUNED, UNPRUNED, STUDENT))
    models.append(Model(PRUNED, PRUNED, UNPRUNED, is_compressed=True))
    models += [Model(scheme, f"quantized/{scheme}", PRUNED, is_compressed=True) for scheme in config.schemes]
    return models


def stages_of(config: RankPipelineConfig) -> list[Task]:
    """The stages that make the models, then those that test them."""
    stages = [Task("teacher", config.teacher, TRAIN, TEACHER)]
    for kind, seed in _students(config):
        stage = student_config(config, kind, seed, OUT + TEACHER)
        stages.append(Task(f"student-{kind}-{seed}", stage, TRAIN, f"{STUDENTS}/{kind}-{seed}"))
    stages.append(Task(UNPRUNED, _further(config), TRAIN, UNPRUNED))
    stages.append(Task(PRUNED, _recovery(config), RECOVER, PRUNED, gives=("model*.safetensors", CALIBRATION)))
    for scheme in config.schemes:
        stages.append(Task(scheme, _quantization(config, scheme), QUANTIZE, f"quantized/{scheme}"))
    data, features = config.teacher.data, config.teacher.features
    for model in models_of(config):
        asked = RankEvaluateConfig(model=OUT + model.place, data=data, features=features)
        stages.append(Task(f"test-{model.name}", asked, EVALUATE, f"{TESTS}/{model.name}", gives=(SCORES,)))
    return stages


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
        teacher=TeacherConfig(model=teacher),
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


def _size(path: Path) -> dict[str, int]:
    return {
        "parameters": sum(parameter.numel() for parameter in load_model(str(path)).parameters()),
        "weight_bytes": sum(file.stat().st_size for file in path.glob("model*.safetensors")),
    }


def _latencies(config: RankPipelineConfig, models: Sequence[Model], out: Path) -> dict[str, dict[str, float]]:
    """Milliseconds a request under the engine: every model has each request before the next one comes."""
    split, _ = read_requests(config.teacher.data)
    requests = split.test[: config.timed_requests + _WARM_UP_REQUESTS]
    encoded, labels = encode_requests(requests, load_tokenizer(str(out / TEACHER)), config.teacher.features)
    scorers = {model.name: Scorer(load_decoder(str(out / model.place)), budget=0) for model in models}
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for request in encoded:
        asked = engine_request(request, labels)._replace(full=False)
        for name, scorer in scorers.items():
            start = time.perf_counter()
            scorer.score([asked])
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "latency_p50_ms": 1e3 * float(np.median(values[_WARM_UP_REQUESTS:])),
            "latency_p95_ms": 1e3 * float(np.quantile(values[_WARM_UP_REQUESTS:], 0.95)),
        }
        for name, values in seconds.items()
    }
