"""A saddle of a real model: LoRA whose two factors are both zero, with and without something that leaves it.

Where A and B are both zero, the gradients of both are exactly zero for every text, so that no optimizer without noise
can move. What is compared, on the same batches:

| method | start | optimizer |
|---|---|---|
| standard | A random, B zero, as LoRA is used | AdamW |
| zero | both zero | AdamW |
| zero_momentum | both zero | SGD with momentum |
| zero_jitter | both zero, then one kick of radius r | AdamW |
| zero_perturb | both zero | AdamW with the automatic gate, noise of radius r |

Each run is a cell of its own, so that a run that was stopped costs one of them at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from limbeck.checkpoint import output_directory
from limbeck.config import checked
from limbeck.errors import ConfigError, nearest
from limbeck.models.load import load_model, load_tokenizer
from limbeck.optim.jitter import jitter_
from limbeck.optim.perturb import Perturb
from limbeck.stage import How
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.trace import Trace
from studies import draw
from studies.cells import measure_cells
from studies.command import main
from studies.page import Table, write_study

Cell = tuple[str, int]
"""Method and seed."""
METHODS = ("standard", "zero", "zero_momentum", "zero_jitter", "zero_perturb")


@checked
class LoraConfig:
    """Which model on which text, and how long."""

    model: str = "smollm2-135m"
    """Directory, alias or hub id."""
    traces: TraceConfig = TraceConfig(source="reasoning-gym:gsm_symbolic", num_traces=200, seed=1)
    """The text: problems with their solutions."""
    methods: tuple[str, ...] = METHODS
    """Rows of the table above."""
    rank: int = 8
    """Rank of the adapters, which are put beside all linear layers."""
    row_tokens: int = 128
    """Tokens of a row of a batch."""
    batch_rows: int = 2
    """Rows of a batch."""
    held_out_rows: int = 8
    """Rows that the loss is measured on and nobody trains on."""
    steps: int = 60
    """Optimizer steps."""
    measure_every: int = 10
    """Steps between two measurements of the held-out loss."""
    lr: float = 1e-3
    """AdamW's learning rate."""
    sgd_lr: float = 1.0
    """SGD's."""
    noise_radius: float = 0.1
    """r, of the kick at the start and of those of the gate."""
    num_seeds: int = 1
    """Runs of each method; a seed draws batches, A, and noise."""

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise ConfigError(f"methods: found {name!r}; {nearest(name, METHODS)}")
        for name in ("rank", "row_tokens", "batch_rows", "held_out_rows", "steps", "measure_every", "num_seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more; found {getattr(self, name)}.")


def run(config: LoraConfig, out: Path, *, how: How = How()) -> dict[str, Any]:
    """Train every method, and write result.json, table.md, a plot and page.html into `out`; the result comes back."""
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as directory:
        cells: list[Cell] = [(method, seed) for seed in range(config.num_seeds) for method in config.methods]
        found = measure_cells(measure_cell, config, cells, directory / "cells.jsonl", "lora", num_workers=1)
        result = {method: [found[(method, seed)] for seed in range(config.num_seeds)] for method in config.methods}
        draw.held_out_losses(result, config.measure_every, directory / "lora.png")
        write_study(
            directory,
            stage="studies.lora",
            title=f"LoRA of {config.model} from zero",
            notes=[f"{config.steps} steps of {config.batch_rows} x {config.row_tokens} tokens, rank {config.rank}."],
            config=config,
            result=result,
            tables={"Held-out loss": loss_table(result)},
            plots={"Held-out loss": directory / "lora.png"},
        )
    return result


def measure_cell(config: LoraConfig, cell: Cell) -> dict[str, Any]:
    """Held-out losses along one run, and whether the adapters moved at all."""
    method, seed = cell
    rows = token_rows(config)
    held_out, train = rows[: config.held_out_rows], rows[config.held_out_rows :]
    torch.manual_seed(seed)
    model = adapted(config, is_zero=method != "standard")
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    before = [p.detach().clone() for _, p in parameters]
    optimizer = _optimizer(config, method, parameters, seed)
    order = torch.Generator().manual_seed(seed)
    losses = [_held_out_loss(model, held_out)]
    for step in range(1, config.steps + 1):
        batch = train[torch.randint(len(train), (config.batch_rows,), generator=order)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        if step % config.measure_every == 0:
            losses.append(_held_out_loss(model, held_out))
    moved = any(not torch.equal(p.detach(), start) for (_, p), start in zip(parameters, before, strict=True))
    return {"losses": losses, "has_moved": moved, "fires": int(optimizer.param_groups[0].get("fires", 0))}


def token_rows(config: LoraConfig) -> Tensor:
    """The texts of all traces, one after the other, cut into rows: int64 `[rows, row_tokens]`.

    Raises: ConfigError where too few rows come out to train on.
    """
    traces, _ = read_traces(config.traces)
    ids = load_tokenizer(config.model)("\n\n".join(map(_text, traces))).input_ids
    num_rows = len(ids) // config.row_tokens
    if num_rows < config.held_out_rows + config.batch_rows:
        raise ConfigError(f"traces: their text fills {num_rows} rows of {config.row_tokens} tokens; give more of them.")
    return torch.tensor(ids[: num_rows * config.row_tokens]).view(num_rows, config.row_tokens)


def adapted(config: LoraConfig, is_zero: bool) -> Any:
    """The model with adapters beside all linear layers but the head."""
    settings = peft.LoraConfig(r=config.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_model(config.model), settings)
    for name, parameter in model.named_parameters():
        if is_zero and "lora_A" in name:
            torch.nn.init.zeros_(parameter)
    return model


def loss_table(result: Mapping[str, Any]) -> Table:
    """One row a method: held-out loss at the start and at the end, means over seeds."""
    rows = []
    for method, runs in result.items():
        first, last = (sum(found["losses"][i] for found in runs) / len(runs) for i in (0, -1))
        moved = "yes" if all(found["has_moved"] for found in runs) else "no"
        rows.append((method, first, last, moved, sum(found["fires"] for found in runs)))
    return ("method", "at the start", "at the end", "moved", "fires"), rows


def _optimizer(config: LoraConfig, method: str, parameters: list[tuple[str, Any]], seed: int) -> Any:
    if method == "zero_momentum":
        return torch.optim.SGD(parameters, lr=config.sgd_lr, momentum=0.9)
    if method == "zero_jitter":
        jitter_(parameters, config.noise_radius, seed)
    adamw = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    if method == "zero_perturb":
        return Perturb(adamw, grad_threshold="auto", noise_radius=config.noise_radius, seed=seed)
    return adamw


@torch.no_grad()
def _held_out_loss(model: Any, rows: Tensor) -> float:
    return sum(float(model(input_ids=row.unsqueeze(0), labels=row.unsqueeze(0)).loss) for row in rows) / len(rows)


def _text(trace: Trace) -> str:
    parts = [*(message["content"] for message in trace.messages), trace.cot, trace.answer]
    return "\n".join(part for part in parts if part)


if __name__ == "__main__":
    main(LoraConfig, run, "lora")
