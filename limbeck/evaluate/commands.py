"""The commands that score models and check traces."""

from __future__ import annotations

from limbeck.evaluate import stage, verify
from limbeck.evaluate.cost import predict_evaluate
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.models.load import model_hash
from limbeck.stage import Stage


def _read_by_evaluation(config: EvaluateStageConfig) -> dict[str, str]:
    return {"model": model_hash(config.model)}


EVALUATE = Stage(
    name="evaluate",
    config=EvaluateStageConfig,
    run=stage.run,
    inputs=_read_by_evaluation,
    predict=predict_evaluate,
    subject="model",
)
VERIFY = Stage(name="traces verify", config=verify.VerifyConfig, run=verify.run, takes=("overwrite", "on"))
