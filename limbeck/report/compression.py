"""The section on compressed models: their table, what is said of them, and the figures of their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean

from matplotlib.figure import Figure

from limbeck.compress.blocks import ROLES
from limbeck.report.apart import Difference, difference
from limbeck.report.compressed import Compressed
from limbeck.report.drawing import LIGHT, legend, panels, style, upright
from limbeck.report.plots import Plot
from limbeck.report.rows import Row
from limbeck.report.tables import Table, sized
from limbeck.report.units import MISSING, interval, percent, share

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
        columns["made of"], columns["method"], columns["scheme or pattern"] = _origins(models)
    columns |= sized(rows, "parameters", "number", "parameters, {}")
    columns |= sized(rows, "weight_bytes", "bytes", "on disk, {}")
    if not is_brief:
        columns["held-out KL"] = _all_nats(rows, "kl_nats")
        columns["held-out KL from the teacher"] = _all_nats(rows, "teacher_kl_nats")
        columns["perplexity ratio"] = [share(row.get("perplexity_ratio")) for row in rows]
    columns["score"] = [interval(row.estimate("accuracy"), places) for row in rows]
    columns |= sized(rows, "stage_seconds", "seconds", "{}")
    if not is_brief:
        columns |= sized(rows, "peak_bytes", "bytes", "peak, {}")
    return Table.of(columns)


def _origins(models: Sequence[Compressed]) -> tuple[list[str], list[str], list[str]]:
    """Of what, how and into what the models were made."""
    found = [(model.origin or MISSING, model.method or MISSING, model.form or MISSING) for model in models]
    origins, methods, forms = zip(*found, strict=True) if found else ((), (), ())
    return list(origins), list(methods), list(forms)


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


def _all_nats(rows: Sequence[Row], key: str) -> list[str]:
    return [_nats(row.get(key)) for row in rows]


def _nats(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"


def _finding(model: Compressed, named: Mapping[str, Compressed]) -> str | None:
    """Against the first model of the chain; None for that one itself and where there is nothing to compare."""
    first = _first(model, named)
    size, whole = model.row.get("weight_bytes"), first.row.get("weight_bytes")
    if first is model or not size or not whole:
        return None
    start = f"{model.row.name} has {percent(size / whole)} of the bytes of {first.row.name}"
    score, reference = model.row.estimate("accuracy"), first.row.estimate("accuracy")
    if score is None or reference is None:
        ratio = model.row.get("perplexity_ratio")
        return f"{start}; its held-out perplexity is {ratio:.3f} times that of {model.origin}." if ratio else None
    apart = difference(score, reference, model.row.problem_scores, first.row.problem_scores)
    return f"{start} and scores {interval(score, 2)} against {interval(reference, 2)}: {_told(apart)}."


def _first(model: Compressed, named: Mapping[str, Compressed]) -> Compressed:
    """The first model of the chain that it was made in."""
    while model.origin in named and model is not named[model.origin]:
        model = named[model.origin]
    return model


def _told(apart: Difference | None) -> str:
    if apart is None:
        return "no interval tells whether they differ"
    word = ("below" if apart.value < 0 else "above") if apart.is_clear else "not distinguishable on these problems"
    return f"{word} ({apart})"


def _by_depth(models: Sequence[Compressed], key: str) -> Figure:
    """A panel a place, a line a model."""
    places = _places(models)
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


def _places(models: Sequence[Compressed]) -> list[str]:
    """Where the solved layers are in a block, in the order of its computation."""
    found = {layer.place for model in models for layer in model.layers}
    known = [place for place in dict.fromkeys(ROLES.values()) if place in found]
    return known + sorted(found - set(known))


def _line(model: Compressed, place: str, key: str) -> dict[int, float]:
    """Mean error, or all seconds, of the layers of a place, by depth."""
    by_depth: dict[int, list[float]] = {}
    for layer in model.layers:
        if layer.place == place:
            by_depth.setdefault(layer.depth, []).append(getattr(layer, key))
    combine = fmean if key == "error" else sum
    return {depth: combine(values) for depth, values in sorted(by_depth.items())}
