"""What every stage of a pipeline will take, from the recipe and from what earlier stages have written already.

Traces that are not there yet are taken to be as many and as long as those of their source (its own solutions, or the
limit on new tokens where it has none); models that are not there yet have the shape that the recipe gives them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.compress.predict import predict_quantize, predict_recover, pruned_shape
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.config import build, to_dict
from limbeck.cost.hardware import Hardware
from limbeck.cost.prediction import Prediction, total
from limbeck.cost.shapes import config_of, scratch_shape
from limbeck.distill.caching_cost import predict_cache
from limbeck.distill.config import DistillConfig
from limbeck.distill.predict import predict_distill
from limbeck.evaluate.cost import predict_evaluate
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.models.load import load_tokenizer
from limbeck.pipeline.choose import CHOICE, read_choice, with_axes
from limbeck.pipeline.config import DISTILL, EXPORT, QUANTIZE, RECOVER, PipelineConfig
from limbeck.pipeline.stages import CachePartsConfig, ChosenStudentConfig, SmallerConfig
from limbeck.pipeline.task import OUT, Task, resolved
from limbeck.sweep.commands import SCORE_OF, predict_sweep
from limbeck.sweep.plan import SweepConfig
from limbeck.traces.generation import GenerateConfig
from limbeck.traces.generation_cost import predict_generate


class Predictor:
    """Predictions for the stages of one recipe in one directory."""

    def __init__(self, config: PipelineConfig, out: Path, hardware: Hardware) -> None:
        self.config, self.out, self.hardware = config, out, hardware

    def of(self, stage: Task) -> Prediction | None:
        """What a stage will take; None for those that take next to nothing, and for scorers.

        Raises: what reading configs, tokenizers and traces raises.
        """
        if self.config.ranking is not None:
            return None
        named = stage.config
        config = self._readable(named)
        found: Prediction | None = None
        if isinstance(config, GenerateConfig):
            found = predict_generate(config, hardware=self.hardware)
        elif isinstance(config, CachePartsConfig):
            found = total(stage.name, [predict_cache(part, hardware=self.hardware) for part in config.parts])
        elif isinstance(config, SweepConfig):
            found = self._sweep(config)
        elif isinstance(config, ChosenStudentConfig):
            found = self._student(config)
        elif isinstance(config, SmallerConfig):
            found = self._smaller(named, config)
        elif isinstance(config, QuantizeConfig):
            found = predict_quantize(config, **self._model(named.model))
        elif isinstance(config, EvaluateStageConfig):
            found = predict_evaluate(config, **self._model(named.model))
        return found

    def _sweep(self, config: SweepConfig) -> Prediction:
        """All of a sweep's time and memory, but the tokens and FLOPs of its training only: they are what it counts."""
        parts = predict_sweep(config, hardware=self.hardware)
        trained = total("runs", [part for part in parts if not part.stage.startswith(SCORE_OF)])
        return replace(total("sweep", parts), tokens=trained.tokens, new_tokens=trained.new_tokens, flops=trained.flops)

    def _student(self, config: ChosenStudentConfig) -> Prediction:
        if self.config.sweep is not None and self.config.distill == self.config.sweep.distill:
            return Prediction(DISTILL, notes=("the chosen run of the sweep is taken over, not trained again",))
        found = predict_distill(self._chosen(config.distill, config.choice), hardware=self.hardware)
        if config.choice is None or (Path(config.choice) / CHOICE).is_file():
            return found
        return replace(found, notes=(*found.notes, "the cut is not chosen yet: the student as the recipe has it"))

    def _smaller(self, named: SmallerConfig, config: SmallerConfig) -> Prediction:
        recovery = config.recover
        tree = to_dict(recovery) | {"distill": to_dict(self._chosen(recovery.distill, config.choice))}
        found = predict_recover(build(type(recovery), tree), **self._model(named.recover.prune.model))
        # Its tokens are those of calibration too, which the stage does not count.
        return replace(found, tokens=0)

    def _chosen(self, config: DistillConfig, choice: str | None) -> DistillConfig:
        """The run by the choice, once it is made; before it, as the recipe has it."""
        if choice is None or not (Path(choice) / CHOICE).is_file():
            return config
        return with_axes(config, read_choice(Path(choice))["axes"])

    def _model(self, name: str) -> dict[str, Any]:
        """The arguments that stand for a model, whether it is there or not."""
        return {"model": self._shape(name), "tokenizer": _tokenizer(self._origin(name)), "hardware": self.hardware}

    def _shape(self, name: str) -> Any:
        """The transformers config that a model has or will have."""
        config, place = self.config, name.removeprefix(OUT)
        if not name.startswith(OUT):
            return config_of(name)
        if place == DISTILL and config.distill is not None:
            scratch = config.distill.student.scratch
            return scratch_shape(scratch) if scratch is not None else config_of(config.distill.student.model or "")
        if place == RECOVER and config.recover is not None:
            return pruned_shape(self._shape(config.recover.prune.model), config.recover.prune)
        return self._shape(self._before(place))

    def _origin(self, name: str) -> str:
        """The model, there already, whose tokenizer another one has."""
        config, place = self.config, name.removeprefix(OUT)
        if not name.startswith(OUT):
            return name
        if place == DISTILL and config.distill is not None:
            return config.distill.student.model or "tiny-student"
        if place == RECOVER and config.recover is not None:
            return self._origin(config.recover.prune.model)
        return self._origin(self._before(place))

    def _before(self, place: str) -> str:
        """The model that a quantised or exported one was made of; both have its shape."""
        made = {QUANTIZE: self.config.quantize, EXPORT: self.config.export}[place]
        assert made is not None
        return made.model

    def _readable(self, config: Any) -> Any:
        """A stage's config with sources of traces that can be read now."""
        tree = to_dict(config)
        return resolved(build(type(config), self._with_sources(tree)), self.out)

    def _with_sources(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self._with_sources(value) for value in tree]
        if not isinstance(tree, Mapping):
            return tree
        source = tree.get("source")
        if "chain_min_steps" in tree and str(source).startswith(OUT):
            return tree if (self.out / str(source).removeprefix(OUT)).exists() else self._source()
        return {key: self._with_sources(value) for key, value in tree.items()}

    def _source(self) -> Mapping[str, Any]:
        """Where the pipeline's traces, or the prompts that they are to answer, come from."""
        config = self.config
        if config.generate is not None:
            return to_dict(config.generate.prompts)
        if config.traces is not None:
            return to_dict(config.traces.traces)
        assert config.verify is not None
        return to_dict(config.verify.traces)


@functools.cache
def _tokenizer(name: str) -> Any:
    return load_tokenizer(name)


def facts(prediction: Prediction) -> dict[str, Any]:
    """What is kept of a prediction beside what is measured; FLOPs are those that a ledger counts."""
    return {
        "seconds": prediction.seconds,
        "flops": prediction.total_flops,
        "peak_bytes": prediction.peak_bytes,
        "tokens": prediction.tokens,
        "new_tokens": prediction.new_tokens,
        "notes": list(prediction.notes),
    }
