"""Compressed models: what `prune`, `quantize` and `recover` left behind, each beside the model that it was made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.checkpoint import MANIFEST, Checkpoint
from limbeck.compress.blocks import ROLES
from limbeck.compress.stage import ERRORS
from limbeck.compress.weights import stored_size
from limbeck.errors import CheckpointError, LimbeckError
from limbeck.evaluate.run import problem_scores
from limbeck.report.files import object_in, read_list, read_object
from limbeck.report.rows import Row, row_of

STAGES = ("prune", "quantize", "recover")
ORIGINS = (*STAGES, "distill")
"""Stages whose models are shown as that of which a compressed one was made."""
EVALUATION = Path("evaluation") / "summary.json"


class Layer(NamedTuple):
    """One solved layer."""

    depth: int
    """Number of its block."""
    place: str
    """In the block, as the values of ROLES."""
    error: float
    """Share of its outputs' energy that the compression changed, on the calibration tokens."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """A compressed model, or the one that it was made of."""

    row: Row
    """Name and numbers."""
    origin: str
    """Name of the model that it was made of; empty where that is not shown."""
    method: str
    form: str
    """What is left of the model, or how it is stored."""
    layers: tuple[Layer, ...] = ()


def read_compressed(paths: Sequence[Path]) -> list[Compressed]:
    """The compressed models of some directories, the pruned ones of a recovery among them.

    A model that one of them was made of comes before it where its directory is still there.
    Raises: CheckpointError when a file in them is damaged.
    """
    asked = [place for path in paths for place in (*_pruned_in(path), path)]
    labels = {place.resolve(): _label(place, paths) for place in asked}
    found: dict[Path, Compressed] = {}
    for place in asked:
        origin = _origin(place)
        if origin is not None and origin.resolve() not in labels:
            labels[origin.resolve()] = origin.resolve().name
            found[origin.resolve()] = _read(origin, labels, with_layers=False)
        found[place.resolve()] = _read(place, labels, with_layers=True)
    return list(found.values())


def _pruned_in(path: Path) -> list[Path]:
    """What a recovery pruned, round by round."""
    rounds = [place for place in path.glob("round-*/pruned") if (place / MANIFEST).is_file()]
    return sorted(rounds, key=lambda place: int(place.parent.name.rpartition("-")[2]))


def _label(place: Path, paths: Sequence[Path]) -> str:
    """Name of the directory that was asked for, and the way from there."""
    top = next(path for path in paths if place == path or path in place.parents)
    return str(Path(top.resolve().name) / place.relative_to(top))


def _origin(path: Path) -> Path | None:
    """The directory of the model that a compressed one was made of, if it is there."""
    name = _model_of(read_object(path / MANIFEST))
    origin = Path(Checkpoint(path).path_of(name))
    if not name or not (origin / MANIFEST).is_file():
        return None
    return origin if Checkpoint(origin).manifest["stage"] in ORIGINS else None


def _model_of(manifest: Mapping[str, Any]) -> str:
    config = manifest.get("config") or {}
    return str((config.get("prune") or {}).get("model") or config.get("model") or "")


def _read(path: Path, labels: Mapping[Path, str], *, with_layers: bool) -> Compressed:
    file = path / MANIFEST
    manifest = read_object(file)
    origin = _origin(path)
    try:
        method, form = _DESCRIBE[manifest["stage"]](manifest)
        numbers = _numbers(path, manifest)
    except LimbeckError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: not a manifest as stage {manifest.get('stage')} writes it ({error!r}); make the model again."
        ) from error
    return Compressed(
        row=row_of(numbers | {"name": labels[path.resolve()]}, (), str(file), ""),
        origin=labels.get(origin.resolve(), "") if origin is not None else Path(_model_of(manifest)).name,
        method=method,
        form=form,
        layers=tuple(_layers(path / ERRORS)) if with_layers and (path / ERRORS).is_file() else (),
    )


def _numbers(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the run measured, under the names of a row."""
    file = path / MANIFEST
    ledger, metrics = object_in(manifest, "ledger", file), object_in(manifest, "metrics", file)
    size, held_out = stored_size(path), object_in(metrics, "held_out", file)
    numbers = {key: value for key, value in metrics.items() if key != "held_out"} | held_out
    if manifest["stage"] == "recover":
        numbers |= _recovery(manifest, metrics, file)
    evaluation = path / EVALUATION
    return {
        **numbers,
        **(read_object(evaluation) if evaluation.exists() else {}),
        "problem_scores": problem_scores(evaluation.parent),
        "parameters": size.parameters or metrics.get("parameters"),
        "weight_bytes": size.bytes or metrics.get("weight_bytes"),
        "stage_seconds": sum(object_in(ledger, "seconds", file).values()),
        "peak_bytes": object_in(ledger, "peak_bytes", file).get("total"),
    }


def _recovery(manifest: Mapping[str, Any], metrics: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Held-out numbers of a recovered model; its divergence is from the teacher, which may be the model it was."""
    before, after = object_in(metrics, "unpruned", file).get("ce"), metrics.get("validation_ce")
    config = object_in(manifest, "config", file)
    teacher = object_in(object_in(config, "distill", file), "teacher", file).get("model")
    key = "kl_nats" if teacher in (None, _model_of(manifest)) else "teacher_kl_nats"
    ratio = math.exp(after - before) if before is not None and after is not None else None
    return {key: metrics.get("validation_kl"), "perplexity_ratio": ratio}


def _layers(file: Path) -> Iterator[Layer]:
    for number, tree in enumerate(read_list(file)):
        try:
            name, error, seconds = str(tree["name"]), float(tree["error"]), float(tree["seconds"])
            depth = int(name.split(".")[1])
        except (TypeError, KeyError, ValueError, IndexError) as problem:
            raise CheckpointError(
                f"{file}: entry {number} is no layer with name, error and seconds; make the model again."
            ) from problem
        last = name.rpartition(".")[2]
        yield Layer(depth, ROLES.get(last, last), error, seconds)


def _describe_distill(manifest: Mapping[str, Any]) -> tuple[str, str]:
    return "", ""


def _describe_prune(manifest: Mapping[str, Any]) -> tuple[str, str]:
    config, metrics = manifest["config"], manifest["metrics"]
    if "sparsity" in metrics:
        return config["method"], _pattern(str(config["pattern"]))
    return config["method"], _shape([metrics])


def _describe_quantize(manifest: Mapping[str, Any]) -> tuple[str, str]:
    config = manifest["config"]
    pattern, mixed = config.get("pattern"), config.get("mixed")
    methods = [config.get("equalization"), "joint" if pattern else config["method"]]
    parts = [config["scheme"] if mixed is None else f"mixed, {mixed['bits_per_weight']:g} bits a weight"]
    if config.get("group_size") and (mixed is not None or config["scheme"].endswith("a16")):
        parts.append(f"groups of {config['group_size']}")
    parts += [_pattern(str(pattern))] if pattern else []
    return " + ".join(method for method in methods if method not in (None, "none")), ", ".join(parts)


def _describe_recover(manifest: Mapping[str, Any]) -> tuple[str, str]:
    config, rounds = manifest["config"], manifest["metrics"]["rounds"]
    count = f", {len(rounds)} rounds" if len(rounds) > 1 else ""
    if "sparsity" in rounds[-1]:
        form = _pattern(str(config["prune"]["pattern"]))
    else:
        form = _shape(rounds)
    return f"{config['prune']['method']} + training{count}", form


_DESCRIBE = {
    "distill": _describe_distill,
    "prune": _describe_prune,
    "quantize": _describe_quantize,
    "recover": _describe_recover,
}


def _pattern(pattern: str) -> str:
    return f"{pattern} sparse" if ":" in pattern else f"{100 * float(pattern):.3g} % zeros"


def _shape(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Sizes before the first and after the last of some cuts, where they differ."""
    parts = []
    for key, word in (("neurons", "neurons"), ("kv_groups", "KV groups")):
        if key in rounds[0]:
            before, after = rounds[0][key][0], rounds[-1][key][1]
            parts += [f"{word} {before} → {after}"] if before != after else []
    removed = sum(len(cut.get("removed_layers", ())) for cut in rounds)
    parts += [f"{removed} {'layer' if removed == 1 else 'layers'} out"] if removed else []
    return ", ".join(parts)
