"""The section on compressed models: their table, what is said of them, and the figures of their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean

from matplotlib.figure import Figure

from limbeck.compress.blocks import ROLES
from limbeck.report.compressed import Compressed
from limbeck.report.drawing import LIGHT, legend, panels, style, upright
from limbeck.report.plots import Plot
from limbeck.report.rows import Row
from limbeck.report.tables import Table
from limbeck.report.units import MISSING, Kind, interval, percent, scale_of, share

HOW_TO_READ = (
    "On disk: the weights' files. Held-out KL (nats a token) and perplexity ratio: from the model in “made of”, on "
    "sequences beside the calibration text, or beside the training text of a recovery; KL from the teacher where a "
    "recovery had a live one. Seconds and peak memory: of making the model, held-out comparison included; of a "
    "recovery, of all its rounds."
)
_PLACES = {
    "attention_in": "attention in (query, key, value)",
    "attention_out": "attention out",
    "mlp_in": "MLP in (gate, up)",
    "mlp_out": "MLP out (down)",
}
_LISTED = 6


def compression_table(models: Sequence[Compressed], is_brief: bool = False) -> Table:
    """One line a model: size, what it lost, what it cost.

    Args:
      models: as they are read, an original before what was made of it.
      is_brief: fit a console: two decimals, sizes, score and seconds only.
    """
    rows, places = [model.row for model in models], 2 if is_brief else 3
    columns: dict[str, Sequence[str]] = {"model": [row.name for row in rows]}
    if not is_brief:
        columns["made of"] = [model.origin or MISSING for model in models]
        columns["method"] = [model.method or MISSING for model in models]
        columns["scheme or pattern"] = [model.form or MISSING for model in models]
    columns |= _sized(rows, "parameters", "number", "parameters")
    columns |= _sized(rows, "weight_bytes", "bytes", "on disk")
    if not is_brief:
        columns["held-out KL"] = [_nats(row.get("kl_nats")) for row in rows]
        columns["held-out KL from the teacher"] = [_nats(row.get("teacher_kl_nats")) for row in rows]
        columns["perplexity ratio"] = [share(row.get("perplexity_ratio")) for row in rows]
    columns["score"] = [interval(row.estimate("accuracy"), places) for row in rows]
    columns |= _sized(rows, "stage_seconds", "seconds", "")
    if not is_brief:
        columns |= _sized(rows, "peak_bytes", "bytes", "peak")
    return Table.of(columns)


def compression_findings(models: Sequence[Compressed]) -> list[str]:
    """For every compressed model: how much is left of the first model it was made of, and of its score."""
    named = {model.row.name: model for model in models}
    sentences = [sentence for model in models if (sentence := _finding(model, named))]
    return sentences[:_LISTED]


def layer_plots(models: Sequence[Compressed]) -> list[Plot]:
    """Error and seconds of the solved layers over depth; empty when no layer was solved."""
    solved = [model for model in models if model.layers]
    if not solved:
        return []
    what = "over depth, by place in the block"
    return [
        Plot("layer_error", f"Relative error of every layer's outputs {what}.", partial(_by_depth, solved, "error")),
        Plot("layer_seconds", f"Seconds of solving {what}.", partial(_by_depth, solved, "seconds")),
    ]


def _sized(rows: Sequence[Row], key: str, kind: Kind, title: str) -> dict[str, Sequence[str]]:
    values = [row.get(key) for row in rows]
    scale = scale_of(values, kind)
    unit = ", ".join(word for word in (title, scale.unit) if word)
    return {unit: [scale.write(value) for value in values]}


def _nats(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"


def _finding(model: Compressed, named: Mapping[str, Compressed]) -> str | None:
    """Against the first model of the chain; None for that one itself and where there is nothing to compare."""
    first = model
    while first.origin in named and first is not named[first.origin]:
        first = named[first.origin]
    size, whole = model.row.get("weight_bytes"), first.row.get("weight_bytes")
    if first is model or not size or not whole:
        return None
    start = f"{model.row.name} has {percent(size / whole)} of the bytes of {first.row.name}"
    score, reference = model.row.estimate("accuracy"), first.row.estimate("accuracy")
    if score is None or reference is None:
        ratio = model.row.get("perplexity_ratio")
        return f"{start}; its held-out perplexity is {ratio:.3f} times that of {model.origin}." if ratio else None
    told = "not distinguishable on these problems"
    if score.is_apart_from(reference):
        told = "below" if score.value < reference.value else "above"
    return f"{start} and scores {interval(score, 2)} against {interval(reference, 2)}: {told}."


def _by_depth(models: Sequence[Compressed], key: str) -> Figure:
    """A panel a place, a line a model."""
    found = {layer.place for model in models for layer in model.layers}
    places = [place for place in dict.fromkeys(ROLES.values()) if place in found]
    places += sorted(found - set(places))
    figure, drawn = panels([_PLACES.get(place, place) for place in places])
    values: list[float] = []
    for axes, place in zip(drawn, places, strict=True):
        for number, model in enumerate(models):
            line = _line(model, place, key)
            values += line.values()
            axes.plot(list(line), list(line.values()), **style(number) | {"markersize": 4.5})
    for number, model in enumerate(models):
        drawn[0].plot([], [], label=model.row.name, **style(number))
    upright(drawn[0], values)
    for axes in drawn[-2:]:
        axes.set_xlabel("layer")
    label = "relative error of the outputs" if key == "error" else "seconds"
    figure.supylabel(label, color=LIGHT.ink, fontsize=9.5)
    legend(drawn[0], len(models))
    return figure


def _line(model: Compressed, place: str, key: str) -> dict[int, float]:
    """Mean error, or all seconds, of the layers of a place, by depth."""
    by_depth: dict[int, list[float]] = {}
    for layer in model.layers:
        if layer.place == place:
            by_depth.setdefault(layer.depth, []).append(getattr(layer, key))
    combine = fmean if key == "error" else sum
    return {depth: combine(values) for depth, values in sorted(by_depth.items())}
