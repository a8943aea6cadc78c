"""`limbeck report`: one self-contained HTML page, the figures as PNG, and the tables as Markdown and CSV.

1. Collect the rows and put replicates together.
2. Say what was found, make the tables, draw the figures.
3. Fill the templates; write every file through a temporary name, when all of them are made.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from limbeck.config import checked
from limbeck.errors import CheckpointError
from limbeck.report.advice import HOW_TO_READ as HOW_TO_READ_ADVICE
from limbeck.report.advice import advice_findings, advice_plots, advice_table
from limbeck.report.collect import Evidence, Source, collect, flatten
from limbeck.report.compression import HOW_TO_READ, compression_findings, compression_table, layer_plots
from limbeck.report.curves import curve_plots
from limbeck.report.drawing import darken, render
from limbeck.report.findings import findings
from limbeck.report.forgetting import HOW_TO_READ as HOW_TO_READ_SOURCES
from limbeck.report.forgetting import source_table
from limbeck.report.groups import Group, group_rows
from limbeck.report.pipeline import HOW_TO_READ as HOW_TO_READ_PIPELINE
from limbeck.report.pipeline import model_table, pipeline_findings, pipeline_plots, stage_table
from limbeck.report.plots import Plot, plots_of
from limbeck.report.ranked import BASELINE
from limbeck.report.ranking import HOW_TO_READ as HOW_TO_READ_RANKING
from limbeck.report.ranking import ranking_findings, ranking_plots, ranking_table
from limbeck.report.rows import FLOP_PARTS
from limbeck.report.tables import csv_text, cut_table, markdown, part_table, score_table, stop_table
from limbeck.report.units import Kind, digits, quantity

PAGE = "report.html"
_UNITS: dict[str, Kind] = {"bytes": "bytes", "seconds": "seconds", "flops": "flops"}


def write_report(paths: Sequence[Path], out: Path, title: str | None = None, top: Sequence[str] = ()) -> Path:
    """Write `report.html`, `report.md`, `report.csv` and `plots/*.png` into `out`; earlier reports there are replaced.

    Args:
      paths: directories of sweeps, of single runs and of compressed models.
      out: directory of the report; may be that of the sweep.
      title: heading; that of the first sweep when not given.
      top: sentences above all others.
    Returns: the page.
    Raises: CheckpointError when an input is missing or damaged, or `out` cannot be written.
    """
    evidence = collect(paths)
    groups = group_rows(evidence.rows)
    content = _content(evidence, groups, title) | {"top": top}
    files, figures = _draw([*plots_of(groups, evidence.models), *curve_plots(groups)])
    layer_files, layer_figures = _draw(layer_plots(evidence.compressed))
    ranking_files, ranking_figures = _draw(ranking_plots(evidence.ranking))
    pipeline_files, pipeline_figures = _draw(pipeline_plots(evidence.steps))
    content |= {"plots": figures, "layer_plots": layer_figures, "ranking_plots": ranking_figures}
    advice_files, advice_figures = _draw(advice_plots(evidence.advice))
    content |= {"pipeline_plots": pipeline_figures, "advice_plots": advice_figures}
    made = [model.row for model in evidence.compressed]
    files |= layer_files | ranking_files | pipeline_files | advice_files
    files["report.csv"] = csv_text([*evidence.models, *evidence.rows, *made]).encode()
    files["report.md"] = _fill("page.md.jinja", content).encode()
    files[PAGE] = _fill("page.html.jinja", content).encode()
    _write(files, out)
    return out / PAGE


def _content(evidence: Evidence, groups: Sequence[Group], title: str | None) -> dict[str, Any]:
    """What both templates show."""
    return {
        "title": title or _title(evidence),
        "lede": _lede(evidence, groups),
        "findings": [
            *pipeline_findings(evidence.steps, evidence.along),
            *(findings(groups, evidence.models, evidence.sources) if groups else ()),
            *compression_findings(evidence.compressed),
            *ranking_findings(evidence.ranking),
            *advice_findings(evidence.advice),
        ],
        "scores": score_table(groups, evidence.models),
        "how_to_read": _HOW_TO_READ,
        "compressed": compression_table(evidence.compressed),
        "how_to_read_compressed": HOW_TO_READ,
        "ranking": ranking_table(evidence.ranking),
        "how_to_read_ranking": HOW_TO_READ_RANKING,
        "advice": advice_table(evidence.advice),
        "how_to_read_advice": HOW_TO_READ_ADVICE,
        "stages": stage_table(evidence.steps),
        "along": model_table(evidence.along),
        "how_to_read_pipeline": HOW_TO_READ_PIPELINE,
        "costs": part_table(groups),
        "parts": FLOP_PARTS,
        "bars": _bars(groups),
        "cuts": cut_table(groups),
        "stops": stop_table(groups, evidence.models),
        "of_sources": source_table(evidence.rows),
        "how_to_read_sources": HOW_TO_READ_SOURCES,
        "stores": _labelled(evidence.sources, "store"),
        "trace_stats": _labelled(evidence.sources, "trace_stats"),
        "sources": list(map(_origin, evidence.sources)),
        "markdown": markdown,
    }


def _title(evidence: Evidence) -> str:
    """Of a sweep its own; else what there is most to say of."""
    if own := next((source.title for source in evidence.sources if source.title), None):
        return own
    if evidence.steps:
        return "Pipeline"
    if evidence.rows:
        return "Distilled students"
    if evidence.advice:
        return "May the traces be cut?"
    return "Compressed models" if evidence.compressed else "Ranking models"


def _labelled(sources: Sequence[Source], name: str) -> list[dict[str, Any]]:
    """The facts of every source that has any; with several sources under their labels."""
    return [
        {"label": source.label if len(sources) > 1 else "", "facts": list(_facts(getattr(source, name)))}
        for source in sources
        if getattr(source, name)
    ]


_HOW_TO_READ = (
    "Score: fraction of the problems answered correctly. Retention: score over that of the student trained on whole "
    "traces. Gain kept: what the run gained over the student before training, over what whole traces gained. "
    "Derivation right, answer as derived: shares of outputs whose first derivation is right, and whose answer is what "
    "they derived first. In brackets, the interval; whether two runs differ is told by the interval of their "
    "difference, paired over problems where those were kept. Tokens, FLOPs, seconds and peak memory are those of "
    "training; validation, saving and the stored teacher pass are not in them. "
    "Frontier: no other run has at least this score at no more of this cost."
)


def _lede(evidence: Evidence, groups: Sequence[Group]) -> str:
    tasks = dict.fromkeys(_task(source.task) for source in evidence.sources if source.task)
    runs, settings, made = len(evidence.rows), len(groups), sum(bool(model.method) for model in evidence.compressed)
    scorers = sum(not step.name.startswith(BASELINE) for step in evidence.ranking)
    of_settings = f" of {settings} settings" if settings != runs else ""
    counts = {
        f"{runs} {'run' if runs == 1 else 'runs'}{of_settings}": runs,
        f"{made} compressed {'model' if made == 1 else 'models'}": made,
        f"{scorers} ranking {'model' if scorers == 1 else 'models'}": scorers,
        f"{len(evidence.steps)} stages": len(evidence.steps),
        "Advice on cuts": len(evidence.advice),
    }
    return f"{', '.join(text for text, count in counts.items() if count)}. {' '.join(tasks)}".strip()


def _task(task: Mapping[str, Any]) -> str:
    parts = [f"Scored on {task.get('name', 'a task')}"]
    if task.get("num_problems"):
        parts.append(f"{task['num_problems']} problems")
    samples = task.get("num_samples")
    if samples:
        parts.append(f"{samples} {'output' if samples == 1 else 'outputs'} a problem")
    if task.get("temperature") is not None:
        parts.append(f"temperature {task['temperature']}" if task["temperature"] else "greedy decoding")
    return ", ".join(parts) + "."


def _bars(groups: Sequence[Group]) -> list[list[tuple[str, float]]]:
    """Widths in percent of the parts of every group, on one scale; empty when no FLOPs were counted."""
    values = [{part: group.get(f"flops_{part}") or 0.0 for part in FLOP_PARTS} for group in groups]
    largest = max((sum(parts.values()) for parts in values), default=0.0)
    if not largest:
        return []
    return [[(part, round(100 * value / largest, 2)) for part, value in parts.items()] for parts in values]


def _facts(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The numbers of a tree as name and text with units."""
    for path, value in flatten(tree):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        name = path.replace(".", ", ").replace("_", " ")
        yield name, quantity(value, _UNITS[unit]) if (unit := path.rsplit("_", 1)[-1]) in _UNITS else digits(value)


def _origin(source: Source) -> dict[str, Any]:
    machine = ", ".join(f"{key} {value}" for key, value in source.machine.items())
    versions = ", ".join(f"{key} {value}" for key, value in source.versions.items())
    facts = [("machine", machine), ("versions", versions)]
    return {
        "label": source.label,
        "command": shlex.join(source.command),
        "facts": [(name, text) for name, text in facts if text],
        "config": yaml.safe_dump(dict(source.config), sort_keys=False, allow_unicode=True) if source.config else "",
    }


def _draw(plots: Sequence[Plot]) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The figures as PNG files by name, and as the templates want them: linked, and inline for light and dark pages."""
    files, figures = {}, []
    for plot in plots:
        figure = plot.draw()
        name = f"plots/{plot.name}.png"
        files[name] = render(figure, "png")
        svg = render(figure, "svg")
        width, height = figure.get_size_inches()
        picture = {"caption": plot.caption, "file": name, "height": round(500 * height / width)}
        figures.append(picture | {"light": _data(svg), "dark": _data(darken(svg))})
    return files, figures


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _fill(template: str, content: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(content)


def _write(files: Mapping[str, bytes], out: Path) -> None:
    try:
        for name, data in files.items():
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(data)
            partial.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{out}: the report cannot be written ({error.strerror}); choose another output."
        ) from error


@checked
class ReportConfig:
    """What is shown on one page."""

    sources: tuple[Path, ...]
    """Directories of sweeps, of single runs, of compressed models and of pipelines."""
    out: Path = Path("runs/report")
    """Directory of the page; may be that of a sweep."""
    title: str | None = None
    """Heading; null takes that of the first sweep."""
