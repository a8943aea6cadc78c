"""Tokens a second of limbeck's engine over those of transformers' `generate`, 64 sequences at once.

Two regimes at temperature 0.9, float32 on a CPU, up to a limit of new tokens or the end of turn: 8 prompts with 8
samples each, as an on-policy step draws them, and 64 prompts with one sample each. Prompts are chains of the built-in
task for tiny-teacher and gsm_symbolic problems for smollm2-135m. Only tokens written up to the end of turn count. Both
sides have the same model, prompts and limits in one process, warmed up, alternating; medians over the repeats. The key
without a suffix is the smallest of all float32 ratios. A third arm writes with int8 products, the rounding of the
weights included.

Peer: `generate(do_sample=True, num_return_sequences=SAMPLES)` of transformers with its own dynamic cache, left padding,
one call. It reads every prompt once a sample, and decodes all rows until the last one has ended.

Bound: where all time goes into the linear layers (smollm2-135m: 135 M weights are read once a step for 64 rows) both
sides do the same products, and only cache copies, attention over padding, the sampling and Python remain to be saved.

    python benchmarks/rollouts.py [--quick] [--threads 2] [--repeats 3] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from _process import conditions, markdown, publish

from limbeck.engine.complete import complete
from limbeck.engine.sampling import SamplingConfig
from limbeck.models.load import load_model, load_tokenizer
from limbeck.traces.render import RenderConfig, render_prompt, stop_ids
from limbeck.traces.sources import TraceConfig, read_traces

BATCH, TEMPERATURE = 64, 0.9
SAMPLES = (8, 1)
"""Of each prompt, by regime."""
TASKS = {
    "tiny-teacher": ("builtin:chain", "builtin:chain"),
    "smollm2-135m": ("reasoning-gym:gsm_symbolic", "reasoning-gym:basic_arithmetic"),
}
"""Prompts: in full, and with --quick (shorter ones, since generate reads each of them once a sample)."""
LIMITS = {"tiny-teacher": (240, 96), "smollm2-135m": (128, 16)}
"""New tokens at most: in full, and with --quick."""


class Side:
    """One model with the prompts of one regime, sampled by either side."""

    def __init__(self, name: str, samples: int, is_quick: bool) -> None:
        self.model, self.samples = load_model(name).eval(), samples
        tokenizer = load_tokenizer(name)
        traces, _ = read_traces(TraceConfig(source=TASKS[name][is_quick], num_traces=BATCH // samples, seed=11))
        self.prompts = [render_prompt(tokenizer, trace.messages, RenderConfig()) for trace in traces]
        self.stops = list(stop_ids(tokenizer, RenderConfig()))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stops[0]

    def ours(self, limit: int, seed: int, precision: Literal["float32", "int8"] = "float32") -> int:
        """Tokens written by limbeck's engine; int8 rounds the weights anew, as it has to after every update."""
        config = SamplingConfig(
            max_new_tokens=limit,
            temperature=TEMPERATURE,
            num_samples=self.samples,
            batch_size=BATCH,
            precision=precision,
        )
        found = complete(self.model, self.prompts, config, self.stops, seed)
        return sum(len(completion.token_ids) for samples in found for completion in samples)

    def theirs(self, limit: int, seed: int) -> int:
        """Tokens written by transformers' generate."""
        torch.manual_seed(seed)
        width = max(map(len, self.prompts))
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt in self.prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts])
        output = self.model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            num_return_sequences=self.samples,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=limit,
            eos_token_id=self.stops,
            pad_token_id=self.pad,
        )
        return sum(_written(row, self.stops) for row in output[:, width:].tolist())


def _written(row: list[int], stops: list[int]) -> int:
    return next((place + 1 for place, token in enumerate(row) if token in stops), len(row))


def measure(name: str, samples: int, is_quick: bool, repeats: int) -> dict[str, Any]:
    """Tokens and seconds of both sides, alternating."""
    side, limit = Side(name, samples, is_quick), LIMITS[name][is_quick]
    calls = {"ours": side.ours, "int8": partial(side.ours, precision="int8"), "theirs": side.theirs}
    for call in calls.values():
        call(1, 0)
    rows: dict[str, list[dict[str, float]]] = {key: [] for key in calls}
    for repeat in range(repeats):
        for key in calls if repeat % 2 == 0 else reversed(calls):
            start = time.perf_counter()
            tokens = calls[key](limit, repeat)
            rows[key].append({"tokens": tokens, "seconds": time.perf_counter() - start})
    return {"model": name, "prompts": len(side.prompts), "samples": samples, "limit": limit, **rows}


def rate(rows: list[dict[str, float]]) -> float:
    """Median tokens a second."""
    return statistics.median(row["tokens"] / row["seconds"] for row in rows)


def ratio(one: dict[str, Any], ours: str = "ours") -> float:
    """Our rate over theirs."""
    return rate(one[ours]) / rate(one["theirs"])


def table_of(found: list[dict[str, Any]]) -> str:
    """One row a model."""
    rows = [
        [
            one["model"],
            f"{one['prompts']} x {one['samples']}",
            str(one["limit"]),
            f"{statistics.mean(row['tokens'] for row in one['ours']):.0f}",
            *(f"{rate(one[key]):,.0f} ({_spread(one[key])})" for key in ("ours", "int8", "theirs")),
            f"{ratio(one):.2f}",
            f"{ratio(one, 'int8'):.2f}",
        ]
        for one in found
    ]
    columns = ["model", "prompts x samples", "limit", "tokens written", "ours, tokens/s (range)", "int8"]
    return markdown([*columns, "generate, tokens/s (range)", "ratio", "int8"], rows)


def _spread(rows: list[dict[str, float]]) -> str:
    speeds = [row["tokens"] / row["seconds"] for row in rows]
    return f"{min(speeds):,.0f} to {max(speeds):,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter limits and one repeat, under 60 seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="directory for rollouts.md and rollouts.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ("torch", "transformers"))
    found = [
        measure(name, samples, options.quick, 1 if options.quick else options.repeats)
        for name in TASKS
        for samples in SAMPLES
    ]
    names = [f"{one['model']}_{one['prompts']}x{one['samples']}" for one in found]
    ratios = {name: round(ratio(one), 3) for name, one in zip(names, found, strict=True)}
    rounded = {name: round(ratio(one, "int8"), 3) for name, one in zip(names, found, strict=True)}
    keys = {
        "tokens_per_second_over_generate": min(ratios.values()),
        **{f"tokens_per_second_over_generate_{name}": value for name, value in ratios.items()},
        **{f"int8_tokens_per_second_over_generate_{name}": value for name, value in rounded.items()},
    }
    publish("rollouts", __doc__, header, table_of(found), keys, found, options.out)


if __name__ == "__main__":
    main()
