"""The report on compressed models: made-up directories of prune, quantize and recover, alone and beside a sweep."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from limbeck.errors import CheckpointError, ModelError
from limbeck.models.packing import pack
from limbeck.report.collect import collect
from limbeck.report.compression import compression_findings, compression_table, layer_plots
from limbeck.report.page import write_report as run
from limbeck.report.tables import for_console

NAMES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def layers(names: tuple[str, ...] = NAMES, depth: int = 3, scale: float = 0.01) -> list[dict[str, Any]]:
    """Layers whose error grows with depth."""
    return [
        {
            "name": f"layers.{block}.{name}",
            "error": scale * (block + 1) * (place + 1),
            "seconds": 0.1 * (place + 1),
            "tokens": 64,
            "kept": None,
        }
        for block in range(depth)
        for place, name in enumerate(names)
    ]


def write_model(
    directory: Path,
    stage: str,
    config: dict[str, Any],
    metrics: dict[str, Any],
    *,
    tensors: dict[str, torch.Tensor] | None = None,
    solved: list[dict[str, Any]] | None = None,
    score: float | None = None,
) -> Path:
    directory.mkdir(parents=True)
    manifest = {
        "stage": stage,
        "command": ["limbeck", stage],
        "config": config,
        "config_hash": "0",
        "inputs": {},
        "versions": {"torch": "2.13.0"},
        "machine": {"system": "Linux"},
        "ledger": {"seconds": {stage: 2.5, "saving": 0.5}, "peak_bytes": {stage: 2**20, "total": 2**20}},
        "metrics": metrics,
        "counts": {},
    }
    (directory / "limbeck.json").write_text(json.dumps(manifest))
    save_file(tensors or {"model.a.weight": torch.zeros(8, 16)}, directory / "model.safetensors")
    if solved is not None:
        (directory / "layers.json").write_text(json.dumps(solved))
    if score is not None:
        summary = {"model": "m", "accuracy": score, "accuracy_low": score - 0.03, "accuracy_high": score + 0.03}
        (directory / "evaluation").mkdir()
        (directory / "evaluation" / "summary.json").write_text(json.dumps(summary))
    return directory


def held_out(kl: float, ratio: float) -> dict[str, Any]:
    return {"held_out": {"kl_nats": kl, "perplexity": 2.0, "perplexity_ratio": ratio, "top1_agreement": 0.9}}


def student(directory: Path, score: float | None = 0.9) -> Path:
    tensors = {"model.a.weight": torch.zeros(32, 64), "model.norm.weight": torch.zeros(32)}
    return write_model(directory, "distill", {}, {"validation_ce": 0.1}, tensors=tensors, score=score)


def pruned(directory: Path, model: Path, score: float | None = 0.2) -> Path:
    metrics = {"neurons": [64, 32], "kv_groups": [4, 4], "removed_layers": [1], **held_out(0.25, 1.31)}
    solved = layers(("self_attn.o_proj", "mlp.down_proj"), scale=0.1)
    config = {"model": str(model), "method": "osscar", "pattern": "0.5"}
    return write_model(directory, "prune", config, metrics, solved=solved, score=score)


def quantized(directory: Path, model: Path, score: float | None = 0.88) -> Path:
    config = {"model": str(model), "method": "quantease", "equalization": "awq", "scheme": "w4a16", "group_size": 32}
    tensors = {
        "model.a.weight_packed": pack(torch.zeros(8, 32, dtype=torch.int8), 4),
        "model.a.weight_scale": torch.ones(8, 1),
        "model.a.weight_shape": torch.tensor([8, 32]),
        "model.norm.weight": torch.ones(32),
    }
    return write_model(
        directory, "quantize", config, held_out(0.004, 1.002), tensors=tensors, solved=layers(), score=score
    )


def recovered(directory: Path, model: Path, teacher: str | None = None, rounds: int = 2) -> Path:
    """A recovery with its pruned models, as the stage leaves it."""
    cuts = [{"neurons": [64, 48], "kv_groups": [4, 4]}, {"neurons": [48, 32], "kv_groups": [4, 2]}][:rounds]
    metrics = {"validation_ce": 0.2, "validation_kl": 0.03, "unpruned": {"ce": 0.1, "kl": 0.0}, "rounds": cuts}
    config = {
        "prune": {"model": str(model), "method": "osscar", "pattern": "0.5"},
        "distill": {"student": {"model": str(model)}, "teacher": {"model": teacher}},
        "rounds": rounds,
    }
    write_model(directory, "recover", config, metrics, score=0.89)
    for number in range(1, rounds + 1):
        pruned(directory / f"round-{number}" / "pruned", model, score=None)
    return directory


def cells(path: Path | list[Path], column: str) -> list[str]:
    paths = path if isinstance(path, list) else [path]
    table = compression_table(collect(paths).compressed)
    return [row[table.header.index(column)] for row in table.rows]


def test_a_pruned_model_stands_below_what_it_was_made_of(tmp_path: Path) -> None:
    path = pruned(tmp_path / "pruned", student(tmp_path / "student"))
    assert cells(path, "model") == ["student", "pruned"]
    assert cells(path, "made of") == ["–", "student"]
    assert cells(path, "method") == ["–", "osscar"]
    assert cells(path, "scheme or pattern") == ["–", "neurons 64 → 32, 1 layer out"]
    assert cells(path, "parameters, k") == ["2.08", "0.13"]
    assert cells(path, "held-out KL") == ["–", "0.250"]
    assert cells(path, "perplexity ratio") == ["–", "1.310"]
    assert cells(path, "score") == ["0.900 (0.870–0.930)", "0.200 (0.170–0.230)"]
    assert cells(path, "s") == ["3.00", "3.00"]
    assert cells(path, "peak, MiB") == ["1.00", "1.00"]


def test_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    path = quantized(tmp_path / "quantized", student(tmp_path / "student"))
    models = collect([path]).compressed
    for model, directory in zip(models, (tmp_path / "student", path), strict=True):
        assert model.row.get("weight_bytes") == (directory / "model.safetensors").stat().st_size
    (path / "mask.safetensors").write_bytes(b"x" * 1000)
    assert collect([path]).compressed[1].row.get("weight_bytes") == models[1].row.get("weight_bytes")


def test_packed_weights_are_counted_one_by_one(tmp_path: Path) -> None:
    path = quantized(tmp_path / "quantized", tmp_path / "gone")
    assert collect([path]).compressed[0].row.get("parameters") == 8 * 32 + 32
    assert cells(path, "method") == ["awq + quantease"]
    assert cells(path, "scheme or pattern") == ["w4a16, groups of 32"]
    assert cells(path, "made of") == ["gone"], "a model that is no longer there is still named"


@pytest.mark.parametrize(
    ("change", "method", "form"),
    [
        ({}, "gptq", "w4a16, groups of 32"),
        ({"group_size": None}, "gptq", "w4a16"),
        ({"scheme": "w8a8"}, "gptq", "w8a8"),
        ({"mixed": {"bits_per_weight": 4.5}}, "gptq", "mixed, 4.5 bits a weight, groups of 32"),
        ({"pattern": "2:4", "equalization": "smoothquant"}, "smoothquant + joint", "w4a16, groups of 32, 2:4 sparse"),
    ],
)
def test_schemes(tmp_path: Path, change: dict[str, Any], method: str, form: str) -> None:
    config = {"model": "m", "method": "gptq", "equalization": "none", "scheme": "w4a16", "group_size": 32, **change}
    path = write_model(tmp_path / "quantized", "quantize", config, {"scheme": "w4a16"})
    assert (cells(path, "method"), cells(path, "scheme or pattern")) == ([method], [form])


@pytest.mark.parametrize(
    ("pattern", "words"), [("0.5", "50 % zeros"), ("2:4", "2:4 sparse"), ("0.625", "62.5 % zeros")]
)
def test_patterns_of_single_weights(tmp_path: Path, pattern: str, words: str) -> None:
    config = {"model": "tiny-student", "method": "alps", "pattern": pattern}
    path = write_model(tmp_path / "sparse", "prune", config, {"sparsity": 0.5}, solved=layers())
    assert cells(path, "scheme or pattern") == [words]
    assert cells(path, "made of") == ["tiny-student"]


def test_a_recovery_brings_what_it_pruned(tmp_path: Path) -> None:
    path = recovered(tmp_path / "recovered", student(tmp_path / "student"))
    assert cells(path, "model") == ["student", "recovered/round-1/pruned", "recovered/round-2/pruned", "recovered"]
    assert cells(path, "method")[-1] == "osscar + training, 2 rounds"
    assert cells(path, "scheme or pattern")[-1] == "neurons 64 → 32, KV groups 4 → 2"
    assert cells(path, "held-out KL")[-1] == "0.03"
    assert cells(path, "perplexity ratio")[-1] == "1.105", "exp(0.2 - 0.1)"


def test_divergence_from_a_teacher_has_its_own_column(tmp_path: Path) -> None:
    path = recovered(tmp_path / "recovered", student(tmp_path / "student"), teacher="tiny-teacher", rounds=1)
    assert cells(path, "held-out KL from the teacher") == ["–", "–", "0.03"]
    assert cells(path, "held-out KL")[-1] == "–"


def test_findings_compare_with_the_first_model_of_the_chain(tmp_path: Path) -> None:
    first = student(tmp_path / "student")
    middle = pruned(tmp_path / "pruned", first)
    last = quantized(tmp_path / "quantized", middle)
    found = compression_findings(collect([middle, last]).compressed)
    assert [sentence.replace("\u00a0", " ").partition("%")[2] for sentence in found] == [
        " of the bytes of student and scores 0.20 (0.17–0.23) against 0.90 (0.87–0.93): below (unpaired difference "
        "-0.70, -0.74 to -0.66).",
        " of the bytes of student and scores 0.88 (0.85–0.91) against 0.90 (0.87–0.93): not distinguishable on these "
        "problems (unpaired difference -0.02, -0.06 to +0.02).",
    ]
    size = last.joinpath("model.safetensors").stat().st_size / first.joinpath("model.safetensors").stat().st_size
    assert found[1].startswith(f"quantized has {100 * size:.0f}\u00a0% ")


def test_without_scores_the_perplexity_speaks(tmp_path: Path) -> None:
    path = pruned(tmp_path / "pruned", student(tmp_path / "student", score=None), score=None)
    (sentence,) = compression_findings(collect([path]).compressed)
    assert sentence.endswith("its held-out perplexity is 1.310 times that of student.")
    assert "score" not in compression_table(collect([path]).compressed).header


def test_figures_show_every_layer_once_at_its_place(tmp_path: Path) -> None:
    path = quantized(tmp_path / "quantized", tmp_path / "gone")
    error, seconds = (plot.draw() for plot in layer_plots(collect([path]).compressed))
    assert [axes.get_title(loc="left").split(" (")[0] for axes in error.axes] == [
        "attention in",
        "attention out",
        "MLP in",
        "MLP out",
    ]
    for axes, members in zip(error.axes, ((0, 1), (2,), (3, 4), (5,)), strict=True):
        mean = sum(0.01 * (place + 1) for place in members) / len(members)
        assert list(axes.lines[0].get_xdata()) == [0, 1, 2]
        assert axes.lines[0].get_ydata() == pytest.approx([mean, 2 * mean, 3 * mean])
    for axes, members in zip(seconds.axes, ((0, 1), (2,), (3, 4), (5,)), strict=True):
        assert axes.lines[0].get_ydata() == pytest.approx([sum(0.1 * (place + 1) for place in members)] * 3)
    assert {axes.get_yscale() for axes in error.axes} == {"linear"} and error.axes[0].get_ylim()[0] == 0


def test_errors_far_apart_get_a_logarithmic_axis(tmp_path: Path) -> None:
    paths = [pruned(tmp_path / "a", tmp_path / "gone"), quantized(tmp_path / "b", tmp_path / "gone")]
    error, _ = (plot.draw() for plot in layer_plots(collect(paths).compressed))
    assert {axes.get_yscale() for axes in error.axes} == {"log"}
    lines = [[len(line.get_xdata()) for line in axes.lines] for axes in error.axes[1:]]
    assert lines == [[3, 3], [0, 3], [3, 3]], "what was not solved has no line"


def test_page_of_compressed_models_alone(tmp_path: Path) -> None:
    path = pruned(tmp_path / "pruned", student(tmp_path / "student"))
    page = run([path], tmp_path / "out").read_text()
    assert "<title>Compressed models</title>" in page and "1 compressed model." in page
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["Compressed models", "How to reproduce"]
    assert {file.name for file in (tmp_path / "out" / "plots").iterdir()} == {"layer_error.png", "layer_seconds.png"}
    text = (tmp_path / "out" / "report.md").read_text()
    links = re.findall(r"\]\((.*?)\)", text)
    assert len(links) == 2 and all((tmp_path / "out" / link).is_file() for link in links)
    lines = list(csv.DictReader((tmp_path / "out" / "report.csv").open()))
    assert [line["name"] for line in lines] == ["student", "pruned"]
    assert float(lines[1]["kl_nats"]) == 0.25 and json.loads(lines[1]["neurons"]) == [64, 32]


def test_page_beside_a_sweep(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    runs = [{"name": f"run-{lead}", "lead_fraction": lead, "accuracy": lead, "tokens": lead} for lead in (0.5, 1.0)]
    (sweep / "summary.json").write_text(json.dumps({"title": "A sweep", "runs": runs, "axes": ["lead_fraction"]}))
    path = quantized(tmp_path / "quantized", student(tmp_path / "student"))
    page = run([sweep, path], tmp_path / "out").read_text()
    assert "<title>A sweep</title>" in page and "2 runs, 1 compressed model." in page
    assert re.findall("<h2>(.*?)</h2>", page)[-2:] == ["Compressed models", "How to reproduce"]
    assert "<h2>Quality beside cost</h2>" in page
    assert len(collect([sweep, path]).rows) == 2, "the compressed models are no runs"


def test_console_table_fits_80_columns(tmp_path: Path) -> None:
    path = recovered(tmp_path / "recovered", student(tmp_path / "lead_fraction-1.0_keep_ending-false"), rounds=1)
    console = Console(width=80, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    console.print(for_console(compression_table(collect([path]).compressed, is_brief=True)))
    text = console.export_text()
    assert "…" not in text and "0.89 (0.86–0.92)" in text


def test_other_stages_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "moments", "moments", {}, {})
    with pytest.raises(CheckpointError, match="stage 'moments' has no place in this report"):
        collect([path])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("limbeck.json", '{"stage": "prune"}'),
        ("limbeck.json", '{"stage": "quantize", "config": {"model": "m"}, "metrics": {}}'),
        ("limbeck.json", '{"stage": "recover", "config": {"prune": {}}, "metrics": {"rounds": []}}'),
        ("layers.json", "{}"),
        ("layers.json", '[{"name": "layers.x.mlp", "error": 0.1, "seconds": 1}]'),
        ("layers.json", '[{"name": "layers.0.mlp.down_proj", "error": NaN, "seconds": 1}]'),
        ("evaluation/summary.json", '{"accuracy": "high"}'),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path: Path, file: str, text: str) -> None:
    path = pruned(tmp_path / "pruned", tmp_path / "gone")
    (path / file).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        collect([path])
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    path = pruned(tmp_path / "pruned", tmp_path / "gone")
    (path / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        collect([path])
