"""The commands that run stages in order."""

from __future__ import annotations

from limbeck.pipeline import command, ranking
from limbeck.pipeline.config import PipelineConfig
from limbeck.stage import Stage

PIPELINE = Stage(name="pipeline", config=PipelineConfig, run=command.run, takes=(), tell=command.tell)
RANK_PIPELINE = Stage(name="rank pipeline", config=ranking.RankPipelineConfig, run=ranking.run, takes=())
