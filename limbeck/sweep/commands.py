"""A sweep before it runs: the teacher's pass, every run, and every score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.cost.hardware import Hardware
from limbeck.cost.prediction import Prediction
from limbeck.cost.shapes import config_of, scratch_shape
from limbeck.distill.caching_cost import predict_stored
from limbeck.distill.config import DistillConfig
from limbeck.distill.predict import predict_distill
from limbeck.evaluate.cost import predict_evaluate
from limbeck.models.load import load_tokenizer, vocabulary_size
from limbeck.stage import Stage
from limbeck.sweep import cut_advice
from limbeck.sweep.execute import all_runs, asked_of_teacher, has_cache, run, scoring_of, with_cache
from limbeck.sweep.plan import PlannedRun, SweepConfig, base_directory, tokenizer_name
from limbeck.sweep.seen import CutAdviceConfig
from limbeck.sweep.tuning import setting_of

SCORE_OF = "score of "
"""Begins the name of what scoring a model costs."""


def predict_sweep(config: SweepConfig, *, hardware: Hardware) -> list[Prediction]:
    """What `limbeck sweep` will cost, as if nothing of it were done: one prediction a pass, run and score."""
    sweep = config
    runs = all_runs(sweep)
    tokenizer = load_tokenizer(tokenizer_name(sweep.distill))
    found = []
    teacher = sweep.distill.teacher.model
    if has_cache(sweep) and teacher is not None:
        asked = asked_of_teacher(sweep, runs)
        found.append(predict_stored(config_of(teacher), asked, vocabulary_size(tokenizer), False, hardware))
    # A directory that cannot exist: what a cache will hold is known from the sweep.
    nowhere = Path("a sweep that has not begun")
    for planned in runs:
        run_config = with_cache(sweep, planned, nowhere).config
        found.append(replace(predict_distill(run_config, tokenizer=tokenizer, hardware=hardware), stage=planned.name))
        found += _other_rates(sweep, runs, planned, found[-1])
    scored = [(f"{SCORE_OF}{planned.name}", _student(planned.config)) for planned in runs]
    scored.append((f"{SCORE_OF}the base", _student(sweep.distill)))
    others = {base_directory(sweep, planned, nowhere): planned.config for planned in runs}
    scored += [
        (f"{SCORE_OF}{place.name}", _student(config)) for place, config in others.items() if place.name != "base"
    ]
    if sweep.evaluate_teacher and teacher is not None:
        scored.append((f"{SCORE_OF}the teacher", config_of(teacher)))
    scoring = scoring_of(sweep, sweep.distill)
    for name, shape in scored:
        score = predict_evaluate(scoring, model=shape, tokenizer=tokenizer, hardware=hardware)
        found.append(replace(score, stage=name))
    return found


def _other_rates(
    sweep: SweepConfig, runs: Sequence[PlannedRun], planned: PlannedRun, predicted: Prediction
) -> list[Prediction]:
    """A run at the learning rates that it is tuned over, beside the one that it takes."""
    first = next(run for run in runs if setting_of(run.config) == setting_of(planned.config))
    rates = sweep.tune[1:] if first is planned else []
    return [replace(predicted, stage=f"{planned.name} at another learning rate") for _ in rates]


def _student(config: DistillConfig) -> Any:
    scratch = config.student.scratch
    return scratch_shape(scratch) if scratch is not None else config_of(config.student.model or "")


SWEEP = Stage(
    name="sweep",
    config=SweepConfig,
    run=run,
    takes=("on",),
    predict=predict_sweep,
    first=(
        "distill",
        "problems.source",
        "problems.num_traces",
        "problems.seed",
        "title",
        "grid",
        "runs",
        "match",
        "controls",
        "tune",
        "evaluate.max_new_tokens",
        "evaluate.temperature",
        "evaluate.num_samples",
        "evaluate.batch_size",
        "top_k",
        "evaluate_teacher",
    ),
    refers={"distill": "distill"},
    shows="limbeck.report.tables:show_sweep",
)
ADVISE_CUT = Stage(
    name="traces advise",
    config=CutAdviceConfig,
    run=cut_advice.run,
    first=(
        "distill.student.model",
        "distill.teacher.model",
        "distill.traces.source",
        "distill.traces.num_traces",
        "distill.render.derivation_pattern",
        "distill.optimizer.learning_rate",
        "distill.training.epochs",
        "distill.training.batch_size",
        "most_traces",
        "most_prompts",
        "fractions",
    ),
    refers={"distill": "distill"},
)
