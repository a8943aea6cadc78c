"""The recipe of a pipeline: the configs of its stages, each of which may be left out, and how they are joined.

A recipe says of every stage what is its own. What joins them is filled in: traces go from stage to stage, every model
is made of the one before it, and the student's teacher, rendering and problems are those of the other stages too. A
field that is written in the recipe stays as it is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from limbeck.compress.export.stage import ExportConfig
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.compress.recover import RecoverConfig
from limbeck.compress.recover import completed as complete_recovery
from limbeck.config import checked, completed_by
from limbeck.distill.config import DistillConfig
from limbeck.errors import ConfigError
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.evaluate.verify import VerifyConfig
from limbeck.pipeline.choose import ChooseConfig
from limbeck.pipeline.ranking import RankPipelineConfig
from limbeck.pipeline.ranking import completed as complete_ranking
from limbeck.pipeline.smoke import SmokeConfig
from limbeck.pipeline.task import OUT
from limbeck.sweep.plan import SweepConfig
from limbeck.teacher.cache import CacheConfig
from limbeck.traces.generation import TRACES_FILE, GenerateConfig
from limbeck.traces.importing import ImportConfig

TRACES, VERIFY, CACHE, SWEEP, CHOOSE = "traces", "verify", "cache", "sweep", "choose"
DISTILL, RECOVER, QUANTIZE, EXPORT, SMOKE = "distill", "recover", "quantize", "export", "smoke"
RANKING = "ranking"
_MAKING = ("generate", TRACES, DISTILL, RECOVER, QUANTIZE, EXPORT)
"""Stages, one of which a recipe has."""
_BESIDE = (VERIFY, CACHE, SWEEP, "evaluate", SMOKE)
"""Stages that need one of those."""


@checked
class CardConfig:
    """What the model card says that no stage knows."""

    name: str | None = None
    """The model's name; null takes the heading of the pipeline."""
    license: str | None = None
    """The Hub's name of the weights' licence, such as apache-2.0; that of the base model binds you."""
    language: tuple[str, ...] = ("en",)
    """Languages of the traces."""
    tags: tuple[str, ...] = ()
    """Further tags on the Hub."""
    limits: str = ""
    """What the model is not for; added to what the pipeline knows."""


@checked
class HubConfig:
    """Where the export goes with its card. Nothing is sent unless this is in the recipe or given as a flag."""

    repository: str
    """OWNER/NAME on the Hub. The token is that of `hf auth login`, or of HF_TOKEN."""
    private: bool = True
    """Whether a repository that is made here is hidden from others."""
    revision: str | None = None
    """Branch to write to; null: main."""

    def __post_init__(self) -> None:
        if self.repository.count("/") != 1 or not all(self.repository.split("/")):
            raise ConfigError(f"push_to_hub.repository: expected OWNER/NAME; found {self.repository!r}")


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe with what joins its stages."""
    return _Joined(tree).tree


@completed_by(completed)
class PipelineConfig:
    """Traces to a served model. Stages that are not in the recipe are left out."""

    title: str = "Pipeline"
    """Heading of the report and of the model card."""
    generate: GenerateConfig | None = None
    """Sample traces: prompts and sampling; the model is the teacher of distill unless another is named."""
    traces: ImportConfig | None = None
    """Read traces instead of sampling them."""
    verify: VerifyConfig | None = None
    """Check and filter the traces. Problems of sweep and evaluate are kept out unless evaluation says otherwise."""
    cache: CacheConfig | None = None
    """Store what the teacher says, for sweep, distill and recover."""
    distill: DistillConfig | None = None
    """The student. Traces are those of the stages before, where there are any."""
    sweep: SweepConfig | None = None
    """Choose fields of distill, such as the cut, by a grid of runs. Its distill holds only what is to differ from the
    pipeline's, say fewer steps; problems and evaluate are those of evaluate unless it has its own."""
    choose: ChooseConfig = field(default_factory=ChooseConfig)
    """Which run of the sweep is taken."""
    recover: RecoverConfig | None = None
    """Prune the student and train it back, in turns. Its distill holds only what differs from the pipeline's."""
    quantize: QuantizeConfig | None = None
    """Round the weights."""
    evaluate: EvaluateStageConfig | None = None
    """Score the student before and after every stage."""
    evaluate_teacher: bool = True
    """Score the teacher too, where it is a model."""
    export: ExportConfig | None = None
    """Write the last model for other engines, with the certificate that they load it."""
    smoke: SmokeConfig | None = None
    """Have the serving engine answer from the export. There unless null is written, where there is an export that the
    engine reads."""
    card: CardConfig = field(default_factory=CardConfig)
    """What the model card says beside what the stages know."""
    push_to_hub: HubConfig | None = None
    """Send export and card to the Hugging Face Hub, last of all."""
    ranking: RankPipelineConfig | None = None
    """Make a scorer of candidates instead: teacher, students, pruning and quantisation, one table."""

    def __post_init__(self) -> None:
        if self.generate is not None and self.traces is not None:
            raise ConfigError("set generate or traces, not both: traces are sampled or read")
        self._check_student()
        if self.push_to_hub is not None and self.export is None:
            raise ConfigError("push_to_hub sends an export; set export")
        self._check_stages()

    def _check_stages(self) -> None:
        others = [name for name in (*_MAKING, *_BESIDE) if getattr(self, name) is not None]
        if self.ranking is not None and others:
            raise ConfigError(f"ranking is a list of stages by itself; leave out {', '.join(others)}")
        if self.ranking is None and not {*_MAKING} & {*others}:
            raise ConfigError(
                "the recipe has no stage; set distill, recover, quantize or export, generate traces, or set ranking"
            )

    def _check_student(self) -> None:
        if (self.cache or self.sweep) and self.distill is None:
            raise ConfigError("cache and sweep are for a student that is trained; set distill")
        if self.cache is not None and (self.distill is None or self.distill.teacher.model is None):
            raise ConfigError("cache stores a teacher's words; set distill.teacher.model")


def told(config: Any) -> dict[str, Any]:
    """The fields of a config that differ from their defaults, as a tree: what a recipe has to say of it."""
    tree = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if value != default:
            tree[item.name] = _plain(value)
    return tree


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return told(value)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return str(value) if isinstance(value, Path) else value


class _Joined:
    """A recipe's tree, completed stage by stage in the order in which they run."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.tree = dict(tree)
        self.distill = _tree(tree.get(DISTILL))
        self.teacher = _tree(self.distill.get("teacher"))
        self.render = {"render": self.distill["render"]} if self.distill.get("render") else {}
        self._traces()
        self._distill()
        self._sweep()
        self._models()
        self._export()
        if isinstance(self.tree.get(RANKING), Mapping):
            self.tree[RANKING] = complete_ranking(self.tree[RANKING])

    def _default(self, name: str, defaults: Mapping[str, Any]) -> None:
        """Fill in a stage that the recipe has; what it says itself stays."""
        if isinstance(self.tree.get(name), Mapping):
            self.tree[name] = merged(defaults, self.tree[name])

    def _traces(self) -> None:
        generate = _tree(self.tree.get("generate"))
        named = {} if generate.get("server") or not self.teacher.get("model") else {"model": self.teacher["model"]}
        self._default("generate", named | self.render)
        source = None
        if self.tree.get("generate") is not None or self.tree.get("traces") is not None:
            source = f"{OUT}{TRACES}/{TRACES_FILE}"
        if self.tree.get("verify") is not None:
            source = self._verify(source)
        if source is not None:
            self._default(DISTILL, {"traces": {"source": source}})
            self.distill = _tree(self.tree.get(DISTILL))

    def _verify(self, source: str | None) -> str:
        """Complete the check of what `source` holds; returns where the checked traces are."""
        problems = [_tree(self.tree.get(name)).get("problems") for name in ("evaluate", "sweep")]
        held_out = {"evaluation": [given for given in problems if given]}
        own = {"traces": {"source": source}} if source else {}
        self._default("verify", own | self.render | held_out)
        return f"{OUT}{VERIFY}/{TRACES_FILE}"

    def _distill(self) -> None:
        if self.tree.get(CACHE) is not None and self.teacher.get("model"):
            self._default(DISTILL, {"teacher": {"cache": f"{OUT}{CACHE}"}})
            self.distill = _tree(self.tree.get(DISTILL))

    def _sweep(self) -> None:
        evaluate = _tree(self.tree.get("evaluate"))
        own = {name: evaluate[name] for name in ("problems", "evaluate") if evaluate.get(name)}
        stored = {"top_k": 0} if self.tree.get(CACHE) is not None else {}
        title = {"title": f"{self.tree['title']}: choice of the cut"} if self.tree.get("title") else {}
        self._default(SWEEP, {"distill": self.distill, **own, **stored, **title})

    def _models(self) -> None:
        model = f"{OUT}{DISTILL}" if self.tree.get(DISTILL) is not None else None
        if self.tree.get(RECOVER) is not None:
            training = {name: value for name, value in self.distill.items() if name != "student"}
            self._default(RECOVER, {"distill": training} | ({"prune": {"model": model}} if model else {}))
            self.tree[RECOVER] = complete_recovery(self.tree[RECOVER])
            model = f"{OUT}{RECOVER}"
        if self.tree.get(QUANTIZE) is not None:
            self._default(QUANTIZE, ({"model": model} if model else {}) | self._calibration())
            model = f"{OUT}{QUANTIZE}"
        self._default("evaluate", {"model": model or "", **self.render})
        self._default(EXPORT, {"model": model} if model else {})

    def _calibration(self) -> dict[str, Any]:
        """The distillation's traces, where the recipe names no text."""
        own = _tree(_tree(self.tree[QUANTIZE]).get("calibration"))
        if own.get("text") or own.get("traces") or not self.distill.get("traces"):
            return {}
        return {"calibration": {"traces": self.distill["traces"], **self.render}}

    def _export(self) -> None:
        export = self.tree.get(EXPORT)
        if export is None:
            return
        is_gguf = _tree(export).get("format") == "gguf"
        self.tree.setdefault(SMOKE, None if is_gguf else {})
        problems = _tree(self.tree.get("evaluate")).get("problems")
        model = {"model": _tree(export).get("model")} if is_gguf else {}
        self._default(SMOKE, {**model, **({"problems": problems} if problems else {}), **self.render})


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees as one, group by group; where both have a value, that of `over`."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def _tree(value: Any) -> dict[str, Any]:
    """A group of the recipe; empty where it is left out or of another kind, which is refused later."""
    return dict(value) if isinstance(value, Mapping) else {}
