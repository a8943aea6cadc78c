"""Speculative decoding beside plain decoding of the same model: tokens a second, acceptance, tokens a pass.

smollm2-135m on a CPU, one text at a time, behind each of `PROMPTS` 96 tokens, no end token, both sides in turns. The
drafts are the served model itself, in int8 or cut to its first blocks; nothing was trained for it, so the cut ones show
what speculation costs where a draft is poor. Greedy texts of all drafts are checked to be those of plain decoding.

Columns: plain and drafted tokens a second of decoding (medians; prompts are not timed), their ratio, the share of the
proposed tokens that was accepted, and the tokens that a pass of the target brought.

    python benchmarks/speculative.py [--quick] [--threads 2] [--repeats 3] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _process import MODEL, conditions, markdown, publish

from limbeck.engine.backends import load_decoder
from limbeck.engine.decoder import Decoder
from limbeck.engine.drafter import make_drafter
from limbeck.engine.generation import Generator
from limbeck.engine.jobs import Job
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.sampling import Sampling
from limbeck.engine.speculative import SpeculativeConfig
from limbeck.models.load import load_tokenizer

PROMPTS = (
    "The history of the printing press begins in the fifteenth century, when",
    "Question: A train leaves at 9:40 and arrives at 13:05. How long is the journey?\nAnswer: Let us count the hours.",
    'def moving_average(values, width):\n    """Mean of each window of `width` values."""\n',
    "Photosynthesis is the process by which plants turn light into chemical energy. It takes place in",
)


class Case(NamedTuple):
    """A target and its draft."""

    target: Any
    """Precision."""
    config: SpeculativeConfig

    @property
    def name(self) -> str:
        """For the table and the keys."""
        cut = "" if self.config.layers is None else f"_{self.config.layers}_layers"
        return f"{self.target}_by_{self.config.precision}{cut}_k{self.config.num_tokens}"


CASES = (
    Case("float32", SpeculativeConfig(draft="self", num_tokens=3)),
    Case("float32", SpeculativeConfig(draft="self", num_tokens=5)),
    Case("float32", SpeculativeConfig(draft="self", num_tokens=3, layers=20)),
    Case("int8", SpeculativeConfig(draft="self", num_tokens=3, layers=20)),
    Case("int8", SpeculativeConfig(draft="self", num_tokens=2, layers=10)),
)


def timed(generator: Generator, prompt: list[int], count: int, sampling: Sampling) -> tuple[float, list[int]]:
    """Tokens a second behind the first one, and the text."""
    generator.add(Job(prompt=prompt, max_tokens=count, sampling=sampling))
    text: list[int] = []
    start = 0.0
    while generator.running:
        for progress in generator.step():
            text += [drawn.token for drawn in progress.tokens]
        start = start or time.perf_counter()
    assert len(text) == count
    return (count - 1) / (time.perf_counter() - start), text


def measure(case: Case, target: Decoder, prompts: list[list[int]], count: int, repeats: int) -> list[dict[str, Any]]:
    """Greedy and sampled."""
    found = []
    for temperature in (0.0, 0.8):
        drafter = make_drafter(case.config, MODEL, target)
        sides = {
            "plain": Generator(target, PrefixCache(0, 64, MODEL)),
            "drafted": Generator(target, PrefixCache(0, 64, MODEL), None, drafter),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(repeats + 1):
            for number, prompt in enumerate(prompts):
                texts = {}
                for name, generator in sides.items():
                    sampling = Sampling(temperature=temperature, seed=100 * repeat + number)
                    rate, texts[name] = timed(generator, prompt, count, sampling)
                    rates[name] += [rate] if repeat else []  # the first time warms up
                assert temperature > 0 or texts["plain"] == texts["drafted"]
        stats = sides["drafted"].speculation
        median = {name: statistics.median(values) for name, values in rates.items()}
        found.append(
            {
                "case": case.name,
                "temperature": temperature,
                "rates": rates,
                "plain": median["plain"],
                "drafted": median["drafted"],
                "acceptance": stats.acceptance,
                "tokens_per_pass": stats.mean_length,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat of short texts, under 60 seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="directory for speculative.md and speculative.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ("torch", "transformers"))
    count, repeats = (16, 1) if options.quick else (96, options.repeats)
    prompts = [load_tokenizer(MODEL).encode(prompt) for prompt in PROMPTS]
    targets = {precision: load_decoder(MODEL, precision) for precision in ("float32", "int8")}
    found = [row for case in CASES for row in measure(case, targets[case.target], prompts, count, repeats)]
    keys = {
        f"{kind}_{row['case']}_at_{row['temperature']}": float(f"{value:.4g}")
        for row in found
        for kind, value in (("speedup", row["drafted"] / row["plain"]), ("acceptance", row["acceptance"]))
    }
    table = markdown(
        [
            "target and draft",
            "temperature",
            "plain, tokens/s",
            "drafted, tokens/s",
            "ratio",
            "accepted",
            "tokens a pass",
        ],
        [
            [
                row["case"],
                f"{row['temperature']}",
                f"{row['plain']:.1f}",
                f"{row['drafted']:.1f}",
                f"{row['drafted'] / row['plain']:.2f}",
                f"{row['acceptance']:.2f}",
                f"{row['tokens_per_pass']:.2f}",
            ]
            for row in found
        ],
    )
    publish("speculative", __doc__, header, table, keys, found, options.out)


if __name__ == "__main__":
    main()
