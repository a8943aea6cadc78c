"""Layer solvers of other projects behind one protocol; run by the interpreter of the venv that holds them.

    .venv-compress/bin/python benchmarks/_peer_solvers.py THREADS     (or .venv-fmchisel; limbeck is not imported here)

Each line of standard input is a JSON object: `problem`, a safetensors file with `weight` [O I] and `gram` [I I], both
float32; `solver`, a name below; `options`, its arguments; `out`, the file for the answer `weight`. Each line of
standard output is {"wall": ..., "cpu": ...}, seconds of the solver's call alone. The solvers change what they are
given, so it is read anew for each, and add the damping themselves (0.01 of the mean diagonal, as ours).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DAMPING, BLOCK = 0.01, 128


def layer(weight: Tensor) -> Any:
    """A linear layer with this weight."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight.clone()
    return module


def grid(bits: int, group_size: int, **more: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=group_size, **more)


def fmchisel_alps(weight: Tensor, gram: Tensor, sparsity: float, kept: int, group: int) -> Callable[[], Tensor]:
    from fmchisel.pruning.alps.utils.alps_sparsify import sparsify_weight

    module = layer(weight)
    return lambda: sparsify_weight(module, {module: gram}, sparsity=sparsity, prunen=kept, prunem=group)[1]


def fmchisel_osscar(weight: Tensor, gram: Tensor, group_size: int, keep: int) -> Callable[[], Tensor]:
    from fmchisel.pruning.osscar.utils.osscar_sparsify import sparsify_weight

    module, groups = layer(weight), weight.shape[1] // group_size
    return lambda: sparsify_weight(module, {module: gram}, num_keep=keep, update_iter=1, num_cin=groups)[1]


def fmchisel_quantease(weight: Tensor, gram: Tensor, bits: int, group_size: int) -> Callable[[], Tensor]:
    from fmchisel.quantization.quantease.utils.quantease_quantize import quantize_module

    module, arguments = layer(weight), grid(bits, group_size, type="int", observer="minmax")

    def solve() -> Tensor:
        return quantize_module(module, arguments, {module: gram}, nsamples=1, calculate_error=False)[1]

    return solve


def llmcompressor_gptq(
    weight: Tensor, gram: Tensor, bits: int, group_size: int, actorder: str | None
) -> Callable[[], Tensor]:
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    arguments = grid(bits, group_size, actorder=actorder)
    grouped = weight.view(len(weight), -1, group_size)
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)

    def solve() -> Tensor:
        parts = (part[None] for part in (weight, gram, scale, zero_point))
        return quantize_weight(*parts, None, arguments, blocksize=BLOCK, percdamp=DAMPING)[0][0]

    return solve


def llmcompressor_sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float, kept: int, group: int
) -> Callable[[], Tensor]:
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    module = layer(weight)
    arguments = {"sparsity": sparsity, "prune_n": group - kept, "prune_m": group, "block_size": BLOCK}
    arguments |= {"dampening_frac": DAMPING, "preserve_sparsity_mask": False}
    return lambda: sparsify_weight(module, {module: gram}, **arguments)[1]


def llmcompressor_wanda(weight: Tensor, gram: Tensor, sparsity: float, kept: int, group: int) -> Callable[[], Tensor]:
    from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight

    module, scalars = layer(weight), gram.diagonal().clone()
    return lambda: sparsify_weight(module, {module: scalars}, sparsity, group - kept, group)


SOLVERS: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "fmchisel alps": fmchisel_alps,
    "fmchisel osscar": fmchisel_osscar,
    "fmchisel quantease": fmchisel_quantease,
    "llmcompressor gptq": llmcompressor_gptq,
    "llmcompressor sparsegpt": llmcompressor_sparsegpt,
    "llmcompressor wanda": llmcompressor_wanda,
}


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    # The peers print as they like; answers keep the real standard output for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        problem = load_file(asked["problem"])
        with torch.no_grad():
            solve = SOLVERS[asked["solver"]](problem["weight"], problem["gram"], **asked["options"])
            starts = time.perf_counter(), time.process_time()
            answer = solve()
            seconds = {"wall": time.perf_counter() - starts[0], "cpu": time.process_time() - starts[1]}
        save_file({"weight": answer.detach().float().contiguous()}, asked["out"])
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
