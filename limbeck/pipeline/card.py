"""The model card: what the export is, what was cut, what it costs beside what it is worth, and what it is not for.

Everything in it is read from what the stages wrote. Its head is the Hub's metadata (base model, data sets, metrics).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from limbeck.checkpoint import Checkpoint
from limbeck.pipeline.config import CHOOSE, EXPORT, QUANTIZE, RECOVER, SMOKE, TRACES, VERIFY, CardConfig
from limbeck.pipeline.task import OUT
from limbeck.report.compressed import read_compressed
from limbeck.report.pipeline import model_table, stage_table
from limbeck.report.pipelined import Along, StageRow
from limbeck.report.tables import markdown
from limbeck.traces.hub import is_hub_id
from limbeck.version import __version__

HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Aliases that the Hub knows by another name."""
Tree = Mapping[str, Any]


def card_text(title: str, config: CardConfig, settings: Tree, recipe: str, metrics: Tree, pipeline: Path) -> str:
    """The whole card.

    Args:
      title: heading where the card has no name of its own.
      settings: the pipeline's config as a tree, every field present.
      recipe: what the recipe says of it, as YAML.
      metrics: those of the pipeline's manifest: stages and models.
      pipeline: its directory.
    """
    name = config.name or title
    models = [Along(row["name"], row["numbers"]) for row in metrics["models"]]
    steps = [StageRow(r["stage"], r["ran"], r["measured"], r["predicted"] or {}) for r in metrics["stages"]]
    parts = [
        f"---\n{_metadata(name, config, settings, models).to_yaml()}\n---\n",
        f"# {name}\n",
        f"{_summary(settings)}\n",
        *_section("How it was made", [f"- {line}" for line in made_lines(pipeline)]),
        *_section("Quality and size", [markdown(model_table(models)), "", _scored(settings)] if models else []),
        *_section("What it took", [markdown(stage_table(steps))]),
        *_section("How to use it", _usage(settings, config)),
        *_section("Limits", [f"- {line}" for line in limit_lines(config, settings, pipeline)]),
        *_section("Recipe", [f"`limbeck pipeline` {__version__} with:", "", "```yaml", recipe.rstrip(), "```"]),
    ]
    return "\n".join(parts)


def made_lines(pipeline: Path) -> Iterator[str]:
    """One sentence for every stage that left something to say."""
    for place, tell in _TEXT_LINES.items():
        manifest = _manifest(pipeline / place)
        if (said := manifest.get("metrics" if place == CHOOSE else "counts")) is not None:
            yield tell(said)
    yield from _compressed_lines(pipeline)
    for place, tell in _MODEL_LINES.items():
        if (said := _manifest(pipeline / place).get("metrics")) is not None:
            yield tell(said)


def _compressed_lines(pipeline: Path) -> Iterator[str]:
    compressed = [pipeline / name for name in (RECOVER, QUANTIZE) if Checkpoint(pipeline / name).is_finished]
    for model in read_compressed(compressed):
        if model.method and model.row.name in (RECOVER, QUANTIZE):
            yield f"{model.row.name}: {model.method}, {model.form}"


def _traces_line(counts: Tree) -> str:
    return f"traces: {_counted(counts)}"


def _verified_line(counts: Tree) -> str:
    return f"verified: {counts['kept']} kept, dropped {json.dumps(counts['dropped'])}"


def _choice_line(choice: Tree) -> str:
    axes = ", ".join(f"{axis} {value}" for axis, value in choice["axes"].items())
    less = "" if choice["keeps_enough"] else ", less than asked for: no run kept enough"
    return f"cut chosen from a sweep: {axes}; it keeps {choice['retention']:.3f} of the score of the uncut run{less}"


def _export_line(metrics: Tree) -> str:
    loaded = ", ".join(_consumers(metrics, "agrees"))
    checked = f"; loaded and compared in {loaded} (certificate.md)" if loaded else ""
    return f"export: {metrics['format']}, {metrics['bytes_after']:,} bytes of weights{checked}"


def _smoke_line(metrics: Tree) -> str:
    return (
        f"tried in limbeck's serving engine: {metrics['new_tokens']} tokens for {metrics['prompts']} prompts, "
        f"{metrics['stopped']} of which stopped by themselves; log-probabilities within "
        f"{metrics['max_difference_nats']:.2g} nats of those of transformers"
    )


_TEXT_LINES = {TRACES: _traces_line, VERIFY: _verified_line, CHOOSE: _choice_line}
_MODEL_LINES = {EXPORT: _export_line, SMOKE: _smoke_line}
"""From a stage to what it says of itself, before and behind compression."""


def _consumers(metrics: Tree, verdict: str) -> list[str]:
    """The programs whose test of the export ended so."""
    return [key.removeprefix("in_") for key, value in metrics.items() if value == verdict]


def limit_lines(config: CardConfig, settings: Tree, pipeline: Path) -> Iterator[str]:
    """What the numbers above do not say."""
    problems = (settings.get("evaluate") or {}).get("problems")
    if problems is not None:
        yield f"It was scored on {_source(problems)} only; on other tasks it was not measured."
    else:
        yield "It was scored on no task."
    if settings.get("verify") is None and settings.get("distill") is not None:
        yield "Training answers were not checked, nor kept apart from test problems."
    if settings.get("recover") is not None or settings.get("quantize") is not None:
        yield "Pruning and rounding were calibrated on the training traces; text of other kinds may lose more."
    if missing := _consumers(_manifest(pipeline / EXPORT).get("metrics") or {}, "not run"):
        yield f"It was not loaded in {', '.join(missing)} before it was published."
    yield "Nothing was done for safety or against harmful answers beyond what the base model has."
    if config.limits:
        yield config.limits


_TAGS = {"distill": ["distillation"], RECOVER: ["pruned"], QUANTIZE: ["quantized", "compressed-tensors"]}
"""What a stage makes of a model, as the Hub's tags have it."""


def _stage_tags(settings: Tree) -> list[str]:
    return [tag for stage, own in _TAGS.items() if settings.get(stage) is not None for tag in own]


def _metadata(name: str, config: CardConfig, settings: Tree, models: Sequence[Along]) -> ModelCardData:
    bases = map(_hub_name, filter(None, base_models(settings)))
    results = _results(settings, models)
    return ModelCardData(
        base_model=list(filter(None, bases)) or None,
        datasets=list(filter(is_hub_id, _sources(settings))) or None,
        language=list(config.language) or None,
        license=config.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys(["limbeck", *_stage_tags(settings), *config.tags])],
        metrics=[*dict.fromkeys(result.metric_type for result in results)] or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _results(settings: Tree, models: Sequence[Along]) -> list[EvalResult]:
    """Scores of the last model, for the Hub's table of results."""
    evaluate = settings.get("evaluate") or {}
    if not models:
        return []
    numbers, results = models[-1].numbers, []
    if evaluate.get("problems") is not None and numbers.get("accuracy") is not None:
        results.append(_result(evaluate["problems"]["source"], "accuracy", numbers["accuracy"]))
    if evaluate.get("perplexity") is not None and numbers.get("perplexity") is not None:
        results.append(_result(evaluate["perplexity"]["text"], "perplexity", numbers["perplexity"]))
    return results


def _result(source: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=Path(source).name if not is_hub_id(source) else source,
        dataset_name=Path(source).name,
        metric_type=metric,
        metric_value=round(value, 4),
    )


def base_models(settings: Tree) -> tuple[str | None, str | None]:
    """The model that the pipeline started from, and the teacher where it is another one."""
    distill = settings.get("distill")
    if not distill:
        stages = ((settings.get(RECOVER) or {}).get("prune"), settings.get(QUANTIZE), settings.get(EXPORT))
        return next((stage.get("model") for stage in stages if stage), None), None
    start, teacher = ((distill.get(role) or {}).get("model") for role in ("student", "teacher"))
    return start, teacher if teacher != start else None


def _hub_name(model: str) -> str | None:
    name = HUB_NAMES.get(model, model)
    return name if is_hub_id(name) and not Path(name).exists() else None


def _sources(settings: Tree) -> list[str]:
    """Where the traces came from: the first stage that reads what no other one wrote."""
    for stage, group in (("generate", "prompts"), ("traces", "traces"), ("verify", "traces"), ("distill", "traces")):
        source = ((settings.get(stage) or {}).get(group) or {}).get("source")
        if source and not source.startswith(OUT):
            return [source]
    return []


def _summary(settings: Tree) -> str:
    base, teacher = base_models(settings)
    start = f"`{Path(base).name}`" if base else "a small model from scratch"
    sentences = [f"Made from {start}" + (f" with `{Path(teacher).name}` as its teacher" if teacher else "")]
    sources = ", ".join(_source({"source": source}) for source in _sources(settings))
    return sentences[0] + (f", on traces of {sources}." if sources else ".")


def _scored(settings: Tree) -> str:
    evaluate = settings.get("evaluate") or {}
    problems, settings = evaluate.get("problems"), evaluate.get("evaluate") or {}
    if problems is None:
        return "Perplexity: of the text that the recipe names."
    drawn = "greedy" if not settings.get("temperature") else f"temperature {settings['temperature']}"
    return (
        f"Score: share of right answers on {_source(problems)}, {drawn}, at most {settings.get('max_new_tokens')} new "
        "tokens; in brackets 95 % intervals over problems. “start” is the model before training."
    )


def _source(tree: Tree) -> str:
    count = f"{tree['num_traces']} problems of " if tree.get("num_traces") else ""
    return f"{count}`{Path(tree['source']).name if Path(tree['source']).exists() else tree['source']}`"


def _usage(settings: Tree, config: CardConfig) -> list[str]:
    hub = settings.get("push_to_hub")
    place = hub["repository"] if hub else "PATH/OF/THIS/DIRECTORY"
    if (settings.get(EXPORT) or {}).get("format") == "gguf":
        return ["```bash", f"limbeck serve {place} --engine llamacpp", "```"]
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{place}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
        "```",
        "",
        "or behind an OpenAI-compatible server:",
        "",
        "```bash",
        f"limbeck serve {place}",
        f"vllm serve {place}",
        "```",
    ]


def _section(heading: str, lines: Sequence[str]) -> list[str]:
    return [f"## {heading}\n", "\n".join(lines) + "\n"] if lines else []


def _manifest(directory: Path) -> Tree:
    checkpoint = Checkpoint(directory)
    return checkpoint.manifest if checkpoint.is_finished else {}


def _counted(counts: Tree) -> str:
    if "samples" in counts:
        return f"{counts['kept']} of {counts['samples']} sampled outputs were whole"
    return f"{counts['selected']['kept']} of {counts['read']['read']} read were selected"
