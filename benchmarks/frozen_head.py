"""Time and error of forward KL over the whole vocabulary where the student's head is frozen: forward and backward pass.

Regime: float32 on a CPU, 2,048 supervised tokens, vocabularies of 49,152 (SmolLM2: width 576 for both models) and
151,936 (Qwen: student 896, teacher 1,536); no CE term. Three forms of the same teacher through `fused_loss`:

    dense      hidden states and the teacher's head: three products with a head, exact
    top_k      its 50 likeliest entries and the mass of the rest: two products, inexact
    projected  `c = W^T t` and a constant, written once into the cache: two products, exact

Bound: the two products. `gradient_error` is the largest difference of the gradient by the student's hidden states
from the dense one, over the largest entry of that; `_bf16` and `_int8` with targets stored so. Medians over repeats,
forms in turn, the order reversed every other time.

    python benchmarks/frozen_head.py [--quick] [--threads 2] [--repeats 5] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _process import conditions, markdown, publish
from torch import Tensor

from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.fused import fused_loss
from limbeck.models.anatomy import Head
from limbeck.teacher import DenseTargets, OneTeacherTargets, ProjectedTargets, TopKTargets
from limbeck.teacher.projected import Precision, decode, encode, project

WIDTHS = {49_152: (576, 576), 151_936: (896, 1536)}
KEPT = 50
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16", "int8")


def make_targets(dense: DenseTargets, head: Head) -> dict[str, OneTeacherTargets]:
    """All forms of the same teacher, projected once a precision."""
    kept, projected = [], []
    for part in torch.arange(len(dense)).split(64):
        log_probs = dense.take(part).logits().log_softmax(-1)
        values, ids = log_probs.topk(KEPT)
        kept.append((ids, values, torch.log1p(-values.exp().sum(-1))))
        projected.append(project(log_probs, head, 1.0))
    mean_rows, constants = (torch.cat(tensors) for tensors in zip(*projected, strict=True))
    stored = {
        name: ProjectedTargets(*decode(encode(mean_rows, constants, name), len(dense), name)) for name in PRECISIONS
    }
    top_k = TopKTargets(*(torch.cat(tensors) for tensors in zip(*kept, strict=True)))
    return {"dense": dense, "top_k": top_k, "projected": stored.pop("float32"), **stored}


def solve(hidden: Tensor, head: Head, targets: OneTeacherTargets) -> tuple[float, Tensor]:
    """Seconds of the loss with its gradient, and the gradient."""
    states, tokens = hidden.clone().requires_grad_(), len(hidden)
    coef = torch.full((tokens,), 1 / tokens)
    start = time.perf_counter()
    loss = fused_loss(
        states,
        head.weight,
        torch.zeros(tokens, dtype=torch.int64),
        ce_coef=torch.zeros(tokens),
        kd_coef=coef,
        targets=targets,
        divergence=DivergenceConfig(),
    )
    loss.total.backward()
    seconds = time.perf_counter() - start
    assert states.grad is not None
    return seconds, states.grad


def measure(vocab: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of the three forms and errors of all."""
    torch.manual_seed(0)
    width, teacher_width = WIDTHS[vocab]
    head = Head(torch.randn(vocab, width).mul_(2 / math.sqrt(width)), None, None)
    dense = DenseTargets(
        torch.randn(tokens, teacher_width), torch.randn(vocab, teacher_width).mul_(2 / math.sqrt(teacher_width))
    )
    hidden, targets = torch.randn(tokens, width), make_targets(dense, head)
    gradients = {name: solve(hidden, head, form)[1] for name, form in targets.items()}
    largest = gradients["dense"].abs().max()
    timed = ("dense", "top_k", "projected")
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats):
        for name in timed if repeat % 2 == 0 else reversed(timed):
            seconds[name].append(solve(hidden, head, targets[name])[0])
    return {
        "vocab": vocab,
        "tokens": tokens,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "gradient_error": {
            name: float((gradient - gradients["dense"]).abs().max() / largest) for name, gradient in gradients.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 tokens of the smaller vocabulary, three repeats")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory for frozen_head.md and frozen_head.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ("torch",))
    vocabularies, tokens = (list(WIDTHS)[:1], 256) if options.quick else (list(WIDTHS), 2048)
    found = [measure(vocab, tokens, 3 if options.quick else options.repeats) for vocab in vocabularies]
    keys = {
        f"seconds_over_{name}": round(max(one["seconds"]["projected"] / one["seconds"][name] for one in found), 3)
        for name in ("dense", "top_k")
    }
    errors = {
        f"gradient_error{suffix}": max(one["gradient_error"][name] for one in found)
        for name, suffix in (("projected", ""), ("bf16", "_bf16"), ("int8", "_int8"), ("top_k", "_top_k"))
    }
    rows = [
        [
            f"{one['vocab']:,}",
            *(f"{one['seconds'][name]:.2f}" for name in ("dense", "top_k", "projected")),
            *(f"{one['gradient_error'][name]:.1e}" for name in ("top_k", "projected", "bf16", "int8")),
        ]
        for one in found
    ]
    columns = ["vocabulary", "dense, s", "top-k, s", "projected, s"]
    columns += ["gradient error of top-k", "projected", "projected in bf16", "projected in int8"]
    publish("frozen_head", __doc__, header, markdown(columns, rows), keys | errors, found, options.out)


if __name__ == "__main__":
    main()
