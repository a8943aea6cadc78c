"""The commands that score models and check traces."""

from __future__ import annotations

from limbeck.evaluate import cut_and_complete, show, stage, verify
from limbeck.evaluate.cost import predict_evaluate
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.models.load import model_hash
from limbeck.stage import Stage, View


def _read_by_evaluation(config: EvaluateStageConfig) -> dict[str, str]:
    return {"model": model_hash(config.model)}


EVALUATE = Stage(
    name="evaluate",
    config=EvaluateStageConfig,
    run=stage.run,
    inputs=_read_by_evaluation,
    predict=predict_evaluate,
    subject="model",
    first=(
        "model",
        "problems.source",
        "problems.format",
        "problems.num_traces",
        "problems.seed",
        "benchmark.name",
        "benchmark.data",
        "benchmark.num_shots",
        "benchmark.num_problems",
        "perplexity.text",
        "perplexity.reference",
        "evaluate.max_new_tokens",
        "evaluate.temperature",
        "evaluate.top_p",
        "evaluate.num_samples",
        "evaluate.batch_size",
        "evaluate.seed",
        "evaluate.answer_style",
        "evaluate.checker",
    ),
)
VERIFY = Stage(
    name="traces verify",
    loads=False,
    config=verify.VerifyConfig,
    run=verify.run,
    takes=("overwrite", "on"),
    first=(
        "traces.source",
        "traces.format",
        "checker",
        "answer_style",
        "keep",
        "min_pass_rate",
        "max_pass_rate",
        "max_tokens",
        "tokenizer",
        "evaluation",
    ),
)
COMPLETE = Stage(
    name="traces complete",
    config=cut_and_complete.CompleteConfig,
    run=cut_and_complete.run,
    takes=("overwrite", "resume"),
    predict=cut_and_complete.predict_complete,
    subject="student",
    first=(
        "student",
        "traces.source",
        "traces.num_traces",
        "truncation.policy",
        "truncation.lead_fraction",
        "sampling.num_samples",
        "sampling.temperature",
        "sampling.max_new_tokens",
        "failed",
        "checker",
    ),
)
SHOW = View(
    name="evaluate show",
    config=show.ShowResultsConfig,
    run=show.run,
    show=show.print_results,
    as_dict=show.Shown.as_dict,
    subject="run",
)
