"""Perplexity of smollm2-135m after every method of compression, beside llm-compressor on the same calibration tokens.

Text: the story that reasoning-gym carries (In the Year 2889) and the beginning of Alice's Adventures in Wonderland,
41 windows of 512 tokens, 20,951 of them predicted. Calibration: 32 windows of 256 tokens of another text, proceedings
of a workshop (lcet10.txt). Intervals are bootstraps over windows (95 %).

Same for all: the float32 checkpoint, the calibration tokens, damping 0.01, all linear layers but the head, block after
block behind the compressed ones before it. W4A16 has symmetric groups of 64 inputs (576 is no multiple of 128), W8A8
one scale an output channel and int8 inputs a token, rounded alike on both sides when perplexity is measured. Ours are
written by `limbeck quantize` and `limbeck prune` and read back; llm-compressor's weights are taken as they act.

`gap closed` is the share of the perplexity between the first row of a setting and the dense model that a method wins
back: llm-compressor's rounding to nearest (ours searches the scales), the smallest weights,
random neurons, random KV groups, the last layers but one. `... + dense targets` aims every layer at the dense model's
output. Neurons and groups that are taken by size are refitted like OSSCAR's where it says so. Wanda is the same rule on
both sides, so it stands once.

Seconds: GPTQ at 4 bits on the whole model, llm-compressor's `oneshot` and our stage, which also writes the checkpoint;
loading apart; in turns, medians. Ours is timed on half of the calibration tokens too, the row `gptq, half the tokens`:
seconds at equal quality are those of the fewest tokens that reach llm-compressor's perplexity.
`--clock cpu` counts CPU-seconds of one thread, for a machine that does other work.

    python benchmarks/perplexity.py [--quick] [--rows W4A16 2:4] [--work DIR] [--threads 2] [--clock wall]
        [--out benchmarks/results]

Rows and seconds that DIR holds already are not measured again. `--finished` publishes those alone.
Peers: `make bench-peers-compress`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _process import MODEL, conditions, markdown, publish
from torch import Tensor

from limbeck.compress import journal
from limbeck.compress.blocks import Blocks, Group
from limbeck.compress.calibrate import CalibrationConfig, calibration_rows
from limbeck.compress.fidelity import GateConfig
from limbeck.compress.folds import Fold
from limbeck.compress.method import Solution, stored_state
from limbeck.compress.problem import LayerProblem
from limbeck.compress.prune import osscar
from limbeck.compress.prune import stage as prune
from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.quantize import stage as quantize
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.compress.shrink import shrink_model
from limbeck.compress.walk import WalkOptions, walk, write_rest
from limbeck.compress.weights import ShardWriter
from limbeck.evaluate.perplexity import PROSE, read_text, window_sums
from limbeck.models.load import load_model, load_tokenizer
from limbeck.models.quantized import rounded_inputs

TEXTS = Path(".venv-compress/texts")
PEER = Path(".venv-compress/bin/python")
WINDOW, WINDOWS = 512, 41
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
GROUP_SIZE = 64
DROPPED_LAYERS = 3
EXACT = GateConfig(sequences=0)
"""Nothing is held out of the calibration text: the comparison is made here."""


class Setup(NamedTuple):
    """What all rows start from."""

    dense: Path
    """The float32 checkpoint."""
    calibration: CalibrationConfig
    tokens: Path
    """The same tokens as JSON, for the peer."""
    windows: list[list[int]]
    """What perplexity is measured on."""
    threads: int


class Row(NamedTuple):
    """One compressed model."""

    setting: str
    method: str
    make: Callable[[Setup, Path], None]
    """Writes a checkpoint into a directory that does not exist yet."""
    rounds_inputs: bool = False
    """Its checkpoint does not say that inputs are rounded to int8, but they are."""


def quantized(method: str, setup: Setup, out: Path, **more: Any) -> None:
    """`limbeck quantize`."""
    more = {"scheme": "w4a16", "group_size": GROUP_SIZE} | more
    config = QuantizeConfig(model=str(setup.dense), method=method, calibration=setup.calibration, gate=EXACT, **more)
    quantize.run(config, out)


def halved(setup: Setup) -> Setup:
    """Half of the calibration tokens."""
    return setup._replace(calibration=replace(setup.calibration, sequences=setup.calibration.sequences // 2))


def pruned(method: str, setup: Setup, out: Path, **more: Any) -> None:
    """`limbeck prune`."""
    gate = GateConfig(sequences=8) if method == "depth" else EXACT
    prune.run(PruneConfig(model=str(setup.dense), method=method, calibration=setup.calibration, gate=gate, **more), out)


def peer(method: str, setup: Setup, out: Path) -> dict[str, float]:
    """llm-compressor in its own venv; returns its seconds by each clock."""
    script = Path(__file__).with_name("_llmcompressor.py")
    command = [PEER, script, setup.dense, setup.tokens, method, out, setup.threads]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(f"llm-compressor {method} failed:\n{answer.stderr[-2000:]}")
    return dict(json.loads(answer.stdout.splitlines()[-1]))


class Chosen:
    """A method of the walk: inputs chosen without OSSCAR go, with a refit of the others or without."""

    def __init__(self, role: str, group_size: int, keep: int, how: str, refit: bool) -> None:
        self._role, self._size, self._keep, self._how, self._refit = role, group_size, keep, how, refit
        self._generator = torch.Generator().manual_seed(0)

    folds = False

    def wants(self, group: Group) -> bool:
        return group.role == self._role

    def check(self, blocks: Blocks, groups: Sequence[Group]) -> None:
        pass

    def solve(self, group: Group, problems: Sequence[LayerProblem], fold: Fold | None) -> Solution:
        (problem,) = problems
        if self._how == "random":
            groups = torch.randperm(problem.weight.shape[1] // self._size, generator=self._generator)[: self._keep]
        else:
            groups = problem.weight.square().sum(0).view(-1, self._size).sum(1).topk(self._keep).indices
        inputs = osscar.inputs_of(problem, groups.sort().values, self._size)
        return Solution([osscar.refit(problem, inputs) if self._refit else problem.weight * inputs])

    def tensors(self, number: int, block: Any, blocks: Blocks) -> dict[str, Tensor]:
        return blocks.stored(number, stored_state(block, blocks.dtypes))


def chosen(role: str, share: float, how: str, refit: bool, setup: Setup, out: Path) -> None:
    """A checkpoint of the dense shape, with zeros where neurons or KV groups are gone."""
    blocks = Blocks(str(setup.dense))
    config: Any = blocks.config
    size, count = 1, config.intermediate_size
    if role == "attention_out":
        count = config.num_key_value_heads
        size = config.head_dim * config.num_attention_heads // count
    method = Chosen(role, size, count - round(share * count), how, refit)
    out.mkdir()
    rows = calibration_rows(setup.calibration, load_tokenizer(str(setup.dense)), str(setup.dense))
    writer = ShardWriter(out, len(blocks) + 1)
    walk(blocks, rows, method, WalkOptions("prune"), writer, "benchmark", torch.device("cpu"))
    write_rest(blocks, writer)
    journal.remove(out)
    config.save_pretrained(out)


def without_last_layers(setup: Setup, out: Path) -> None:
    """The layers before the last one go, which later layers depend on least."""
    model = load_model(str(setup.dense))
    count = model.config.num_hidden_layers
    kept = [layer for layer in range(count) if not count - 1 - DROPPED_LAYERS <= layer < count - 1]
    shrink_model(model, {}, kept).save_pretrained(out)


def rows_of_sparsity(setting: str, pattern: str, peer_name: str) -> list[Row]:
    """Single weights."""
    names = ("magnitude", "wanda", "sparsegpt", "alps")
    rows = [Row(setting, name, partial(pruned, name, pattern=pattern)) for name in names]
    rows.append(Row(setting, "alps + dense targets", partial(pruned, "alps", pattern=pattern, dense_targets=True)))
    rows.append(Row(setting, "llm-compressor sparsegpt", partial(peer, f"{peer_name}-sparsegpt")))
    return rows


def rows_of_neurons(share: float) -> list[Row]:
    """Whole neurons."""
    setting = f"{100 * share:g} % of neurons"
    more = {"neuron_sparsity": share}
    return [
        Row(setting, "random", partial(chosen, "mlp_out", share, "random", False)),
        Row(setting, "largest", partial(chosen, "mlp_out", share, "largest", False)),
        Row(setting, "largest, refitted", partial(chosen, "mlp_out", share, "largest", True)),
        Row(setting, "osscar", partial(pruned, "osscar", **more)),
        Row(setting, "osscar + dense targets", partial(pruned, "osscar", dense_targets=True, **more)),
    ]


W8A8 = {"scheme": "w8a8", "group_size": None}
SMOOTH = W8A8 | {"equalization": "smoothquant"}
GROUPS = {"neuron_sparsity": 0.0, "kv_group_sparsity": 1 / 3}
ROWS = [
    Row("W4A16", "llm-compressor rtn", partial(peer, "w4a16-rtn")),
    Row("W4A16", "rtn", partial(quantized, "rtn")),
    Row("W4A16", "awq", partial(quantized, "rtn", equalization="awq")),
    Row("W4A16", "gptq", partial(quantized, "gptq")),
    Row("W4A16", "gptq, half the tokens", lambda setup, out: quantized("gptq", halved(setup), out)),
    Row("W4A16", "quantease", partial(quantized, "quantease")),
    Row("W4A16", "quantease + dense targets", partial(quantized, "quantease", dense_targets=True)),
    Row("W4A16", "llm-compressor gptq", partial(peer, "w4a16-gptq")),
    Row("W4A16", "llm-compressor awq", partial(peer, "w4a16-awq")),
    Row("W8A8", "rtn", partial(quantized, "rtn", **W8A8)),
    Row("W8A8", "gptq", partial(quantized, "gptq", **W8A8)),
    Row("W8A8", "smoothquant + gptq", partial(quantized, "gptq", **SMOOTH)),
    Row("W8A8", "smoothquant + quantease", partial(quantized, "quantease", **SMOOTH)),
    Row("W8A8", "llm-compressor smoothquant + gptq", partial(peer, "w8a8-smoothquant+gptq"), True),
    *rows_of_sparsity("50 % sparse", "0.5", "sparse50"),
    *rows_of_sparsity("2:4", "2:4", "2:4"),
    *rows_of_neurons(0.25),
    *rows_of_neurons(0.375),
    Row("1 of 3 KV groups", "random", partial(chosen, "attention_out", 1 / 3, "random", False)),
    Row("1 of 3 KV groups", "largest, refitted", partial(chosen, "attention_out", 1 / 3, "largest", True)),
    Row("1 of 3 KV groups", "osscar", partial(pruned, "osscar", **GROUPS)),
    Row(f"{DROPPED_LAYERS} of 30 layers", "last but one", without_last_layers),
    Row(f"{DROPPED_LAYERS} of 30 layers", "depth", partial(pruned, "depth", drop_layers=DROPPED_LAYERS)),
]


def set_up(work: Path, quick: bool, threads: int) -> Setup:
    """Save the dense model and the tokens, unless they are there."""
    dense, tokens = work / "dense", work / "tokens.json"
    if not (dense / "config.json").exists():
        load_model(MODEL).save_pretrained(dense)
        load_tokenizer(MODEL).save_pretrained(dense)
    tokenizer = load_tokenizer(str(dense))
    sequences = 4 if quick else 32
    calibration = CalibrationConfig(text=TEXTS / "lcet10.txt", sequences=sequences, sequence_length_tokens=256)
    tokens.write_text(json.dumps(calibration_rows(calibration, tokenizer, "").input_ids.tolist()), encoding="utf-8")
    text = read_text(PROSE) + "\n\n" + read_text(str(TEXTS / "alice29.txt"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + WINDOW] for start in range(0, (4 if quick else WINDOWS) * WINDOW, WINDOW)]
    return Setup(dense, calibration, tokens, windows, threads)


def kept(row: Row, work: Path) -> Path:
    """Where the perplexity of a row is kept."""
    return work / (f"{row.setting}-{row.method}".replace(" ", "-").replace("/", "-") + ".json")


def measured(row: Row, setup: Setup, work: Path) -> dict[str, Any]:
    """Perplexity of a row; kept in a file beside the checkpoint, which goes once it is measured."""
    path = kept(row, work)
    out = path.with_suffix("")
    if not path.exists():
        if not out.exists():
            # A run that is cut off leaves nothing under the row's own name.
            partial_out = out.with_name(out.name + ".partial")
            shutil.rmtree(partial_out, ignore_errors=True)
            row.make(setup, partial_out)
            partial_out.rename(out)
        found = {"setting": row.setting, "method": row.method} | perplexity(out, setup, row.rounds_inputs)
        path.write_text(json.dumps(found), encoding="utf-8")
        shutil.rmtree(out)
    return json.loads(path.read_text(encoding="utf-8"))


def perplexity(directory: Path, setup: Setup, rounds_inputs: bool = False) -> dict[str, Any]:
    """The summary of a checkpoint."""
    model = load_model(str(directory))
    if rounds_inputs:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
                module.register_forward_pre_hook(lambda _, inputs: (rounded_inputs(inputs[0], "int", None),))
    return window_sums(model, setup.windows).summary()


def gptq_seconds(setup: Setup, work: Path, repeats: int, clock: str) -> dict[str, list[float]]:
    """Seconds of GPTQ on the whole model, theirs and ours in turns; kept in a file."""
    path = work / "seconds.json"
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    seconds: dict[str, list[float]] = {"ours": [], "ours, half the tokens": [], "llm-compressor": []}
    now = CLOCKS[clock]
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as scratch:
            seconds["llm-compressor"].append(peer("w4a16-gptq", setup, Path(scratch) / "theirs")[clock])
            for name, tokens in {"ours": setup, "ours, half the tokens": halved(setup)}.items():
                start = now()
                quantized("gptq", tokens, Path(scratch) / name)
                seconds[name].append(now() - start)
    path.write_text(json.dumps(seconds), encoding="utf-8")
    return seconds


def with_gaps(rows: Sequence[dict[str, Any]], dense: float) -> list[dict[str, Any]]:
    """Rows with the share of the gap from the first of their setting to the dense model; None where it is not there."""
    baselines: dict[str, str] = {}
    for row in ROWS:
        baselines.setdefault(row.setting, row.method)
    found = {(row["setting"], row["method"]): row["perplexity"] for row in rows}

    def gap(row: dict[str, Any]) -> float | None:
        baseline = found.get((row["setting"], baselines[row["setting"]]))
        return None if baseline is None else (baseline - row["perplexity"]) / (baseline - dense)

    return [row | {"gap_closed": gap(row)} for row in rows]


def summarise(rows: Sequence[dict[str, Any]], dense: float, seconds: dict[str, list[float]] | None) -> dict[str, Any]:
    """For every setting our best perplexity over the best of llm-compressor, or over the best baseline."""
    keys: dict[str, Any] = {"perplexity_dense": dense}
    for setting in dict.fromkeys(row["setting"] for row in rows):
        key = setting.lower().replace(" % of ", "_percent_").replace(" % ", "_percent_").replace(" ", "_")
        members = [row for row in rows if row["setting"] == setting]
        best = min(members, key=lambda row: row["perplexity"])
        theirs = [row["perplexity"] for row in members if row["method"].startswith("llm-compressor")]
        mine = [row["perplexity"] for row in members if not row["method"].startswith("llm-compressor")]
        keys[f"best_{key}"] = best["method"]
        keys[f"gap_closed_{key}"] = best["gap_closed"]
        if theirs and mine:
            keys[f"perplexity_over_llmcompressor_{key}"] = min(mine) / min(theirs)
    named = {row["method"]: row["perplexity"] for row in rows if row["setting"] == "W4A16"}
    if {"gptq", "gptq, half the tokens", "llm-compressor gptq"} <= set(named):
        keys["gptq_perplexity_over_llmcompressor"] = named["gptq"] / named["llm-compressor gptq"]
        halves = named["gptq, half the tokens"] / named["llm-compressor gptq"]
        keys["gptq_perplexity_over_llmcompressor_half_the_tokens"] = halves
    if seconds:
        median = {name: statistics.median(values) for name, values in seconds.items()}
        keys["gptq_seconds_over_llmcompressor"] = median["ours"] / median["llm-compressor"]
        halves = median["ours, half the tokens"] / median["llm-compressor"]
        keys["gptq_seconds_over_llmcompressor_half_the_tokens"] = halves
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in keys.items()}


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """One row a model."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    columns = ["setting", "method", "perplexity", "95 %", "gap closed"]
    return markdown(columns, [
        [row["setting"], row["method"], f"{row['perplexity']:.2f}",
         f"{row['perplexity_low']:.2f} to {row['perplexity_high']:.2f}", share(row["gap_closed"])]
        for row in rows
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens; figures mean nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="of the timing")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: CPU-seconds, for --threads 1")
    parser.add_argument("--rows", nargs="+", help="only rows whose setting and method begin so, or `seconds`")
    parser.add_argument("--finished", action="store_true", help="measure nothing: publish the rows that --work holds")
    parser.add_argument("--work", type=Path, help="directory that keeps finished rows")
    parser.add_argument("--out", type=Path, help="directory for perplexity.md and perplexity.json")
    options = parser.parse_args()
    if not PEER.exists():
        raise SystemExit(f"{PEER} is missing: make bench-peers-compress")
    header = (
        conditions(options.threads, ("torch", "transformers"))
        + f"; clock: {options.clock}; peer llmcompressor 0.14.0.1"
    )
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        setup = set_up(work, options.quick, options.threads)
        dense_row = Row("dense", "dense", lambda setup, out: shutil.copytree(setup.dense, out))
        dense = measured(dense_row, setup, work)
        wanted = tuple(options.rows or [""])
        chosen = [row for row in ROWS if f"{row.setting} {row.method}".startswith(wanted)]
        if options.finished:
            chosen = [row for row in chosen if kept(row, work).exists()]
        rows = [measured(row, setup, work) for row in chosen]
        timed = "seconds".startswith(wanted)
        seconds = gptq_seconds(setup, work, options.repeats, options.clock) if timed else None
    rows = with_gaps(rows, dense["perplexity"])
    keys = summarise(rows, dense["perplexity"], seconds)
    table = f"Dense: {dense['perplexity']:.2f}\n\n" + table_of(rows)
    publish("perplexity", __doc__, header, table, keys, {"dense": dense, "rows": rows, "seconds": seconds}, options.out)


if __name__ == "__main__":
    main()
