"""The stages at the end of a pipeline, which tell of it: report, model card, and the way to the Hub.

They read the records of all other stages, so they run again whenever one of those did.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from limbeck.checkpoint import MANIFEST, output_directory, write_json, write_manifest
from limbeck.compress.weights import stored_size
from limbeck.config import checked, to_dict
from limbeck.errors import CheckpointError
from limbeck.models.load import locate
from limbeck.pipeline import hub
from limbeck.pipeline.config import (
    DISTILL,
    EXPORT,
    QUANTIZE,
    RECOVER,
    SWEEP,
    CardConfig,
    HubConfig,
    PipelineConfig,
    told,
)
from limbeck.pipeline.ranking import TABLE
from limbeck.pipeline.record import RAN, STATE, read_record
from limbeck.pipeline.stages import EVALUATE
from limbeck.pipeline.task import OUT, Task
from limbeck.report.pipelined import STAGE

REPORT, CARD, PUSH = "report", "card", "push"
PAGE, README = "report.html", "README.md"
"""The report, in the pipeline's directory, and the model card, in that of the export."""
_WRITTEN = (PAGE, "report.md", "report.csv", MANIFEST, "plots/*.png")


@checked
class ReportStageConfig:
    """What the report tells of."""

    title: str
    """Heading."""
    recipe: str
    """What the recipe says, as YAML."""
    stages: list[str]
    """Names of all other stages, in order."""
    models: Mapping[str, str]
    """Name of every scored model, and the directory of its score."""


@checked
class CardStageConfig:
    """What the model card tells of."""

    title: str
    """Name of the model, unless the card has its own."""
    card: CardConfig
    """What the recipe says for the card."""
    settings: str
    """All settings of the pipeline, as JSON."""
    recipe: str
    """Those that the recipe has, as YAML."""


@checked
class PushConfig:
    """What is sent where."""

    hub: HubConfig
    """The repository."""
    source: str
    """The export with its card."""


def telling_stages(config: PipelineConfig, stages: Sequence[Task]) -> list[Task]:
    """Report, card and push, as far as the recipe has something for them."""
    names = tuple(stage.name for stage in stages)
    own = told(config)
    if config.sweep is not None and config.sweep.distill == config.distill:
        del own[SWEEP]["distill"]
    recipe, public = _yaml(own), _yaml(_without_places(own))
    scores = {s.name.removeprefix(f"{EVALUATE}-"): OUT + s.place for s in stages if s.name.startswith(f"{EVALUATE}-")}
    report = ReportStageConfig(title=config.title, recipe=recipe, stages=list(names), models=scores)
    found = [Task(REPORT, report, call_report, "", gives=(MANIFEST,), files=_WRITTEN, follows=names)]
    if config.export is not None:
        settings = json.dumps(to_dict(config))
        written = CardStageConfig(title=config.title, card=config.card, settings=settings, recipe=public)
        readme, follows = (README,), (REPORT,)
        found.append(Task(CARD, written, call_card, EXPORT, gives=readme, files=readme, follows=follows))
    if config.push_to_hub is not None:
        push = PushConfig(hub=config.push_to_hub, source=OUT + EXPORT)
        found.append(Task(PUSH, push, call_push, PUSH, gives=(MANIFEST,), follows=(CARD,)))
    return found


def call_report(config: ReportStageConfig, out: Path, resume: bool) -> None:
    """Write the pipeline's manifest and its page."""
    records = {name: record for name in config.stages if (record := read_record(out, name)) is not None}
    ran = _ran(out)
    rows = [
        {"stage": name, "ran": name in ran, "measured": dict(record.measured), "predicted": record.predicted}
        for name, record in records.items()
    ]
    metrics = {"stages": rows, "models": models_of(config, out), "shows": _shown(config.stages)}
    inputs = {name: record.key for name, record in records.items()}
    recipe = _Recipe(recipe=yaml.safe_load(config.recipe))
    write_manifest(out, stage=STAGE, config=recipe, inputs=inputs, metrics=metrics)
    # What draws takes a second to import, which a finished pipeline need not wait for; the card has its tables.
    importlib.import_module("limbeck.report.page").write_report([out], out, config.title)


def models_of(config: ReportStageConfig, out: Path) -> list[dict[str, Any]]:
    """Score and size of every model that was evaluated, in order; `of_teacher` is its score over the teacher's."""
    found = []
    for name, directory in config.models.items():
        record = read_record(out, f"{EVALUATE}-{name}")
        summary = json.loads((Path(directory) / "summary.json").read_text(encoding="utf-8"))
        model = str(record.config["model"]) if record is not None else ""
        size = _size(str(out / model.removeprefix(OUT)) if model.startswith(OUT) else model)
        found.append({"name": name, "model": model.removeprefix(OUT), "numbers": summary | size})
    teacher = next((row["numbers"].get("accuracy") for row in found if row["name"] == "teacher"), None)
    for row in found:
        if teacher and row["numbers"].get("accuracy") is not None:
            row["numbers"]["of_teacher"] = row["numbers"]["accuracy"] / teacher
    return found


def call_card(config: CardStageConfig, out: Path, resume: bool) -> None:
    """Write the model card beside the weights."""
    pipeline = out.parent
    metrics = json.loads((pipeline / MANIFEST).read_text(encoding="utf-8"))["metrics"]
    settings = json.loads(config.settings)
    card = importlib.import_module("limbeck.pipeline.card")
    text = card.card_text(config.title, config.card, settings, config.recipe, metrics, pipeline)
    (out / README).write_text(text, encoding="utf-8")


def call_push(config: PushConfig, out: Path, resume: bool) -> None:
    """Send export and card to the Hub, and remember the commit."""
    commit = hub.push(config.hub, Path(config.source))
    with output_directory(out, overwrite=True) as working:
        write_json(working / "push.json", commit)
        write_manifest(working, stage=PUSH, config=config, inputs={}, metrics=commit)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recipe:
    """What the pipeline's own manifest has for a config."""

    recipe: Mapping[str, Any]


def _ran(out: Path) -> set[str]:
    try:
        return set(json.loads((out / STATE / RAN).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{out / STATE / RAN}: cannot be read ({error}); call the pipeline again.") from error


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _without_places(tree: Any) -> Any:
    """A tree with the names of files in place of where they are on this machine."""
    if isinstance(tree, Mapping):
        return {key: _without_places(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_places(value) for value in tree]
    return Path(tree).name if isinstance(tree, str) and tree.startswith(("/", "~/")) else tree


def _shown(stages: Sequence[str]) -> list[str]:
    """The stages whose directories the report reads: the sweep or the student, what was made of it, a table."""
    first = [SWEEP] if SWEEP in stages else [DISTILL]
    return [name for name in (*first, RECOVER, QUANTIZE, TABLE) if name in stages]


def _size(model: str) -> dict[str, int | None]:
    """Parameters and bytes of a local model's weights; nothing of one that is elsewhere or in another format."""
    place = locate(model)
    if not place.is_local or place.gguf_file:
        return {}
    size = stored_size(Path(place.path))
    return {"parameters": size.parameters, "weight_bytes": size.bytes}
