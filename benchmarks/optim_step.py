"""What the gate costs: seconds a step of ASGLD over torch's SGD, and of Perturb(AdamW) over AdamW.

Regime: float32 parameters and gradients already in memory, one thread, gate shut (the usual state of training: the
gradient is above the threshold, or a kick is being waited out). Limit: a step of SGD moves 12 bytes a parameter
through memory; a separate pass for the gradient's norm would add 4. Bound: 1.0. The gate stops adding up squares as
soon as they have passed the threshold, so its cost should not depend on the number of parameters.
Peer: torch.optim.SGD and AdamW with foreach=True, in the same process, step by step in turn, medians of ratios.

    python benchmarks/optim_step.py [--quick] [--out benchmarks/results]

The last line is JSON. `gated_over_sgd` and `perturb_over_adamw` are the larger of the ratios at the sizes measured;
`auto_over_sgd` and `auto_over_adamw` are those of grad_threshold="auto", which reads the whole gradient at every 16th
step (limits 1.4 and 1.05: a norm reads a third of what SGD moves).
`narrow_over_sgd` is the dearest case, a gradient norm 0.05 percent above the threshold: no early stop.
`noise_over_sgd` is constant mode, which draws noise at every step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _study import Outcome, main

from limbeck.optim import ASGLD, Perturb
from limbeck.optim.rule import AUTO_DENSE, AUTO_EVERY

LR = 1e-6


def measure(quick: bool, scratch: Path) -> Outcome:
    torch.set_num_threads(1)
    sizes = {1_000_000: 20, (10_000_000 if quick else 100_000_000): 50}
    found = {size: measure_size(size, num_tensors, quick) for size, num_tensors in sizes.items()}
    worst = {name: max(cases[name]["ratio"] for cases in found.values()) for name in next(iter(found.values()))}
    rows = [
        (size, name, *(case[key] for key in ("seconds", "peer_seconds", "ratio")), _range(case["middle_half"]))
        for size, cases in found.items()
        for name, case in cases.items()
    ]
    header = ("parameters", "case", "seconds", "peer", "ratio", "middle half")
    return worst | {"sizes": {str(size): cases for size, cases in found.items()}}, {"A step": (header, rows)}, []


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def measure_size(size: int, num_tensors: int, quick: bool) -> dict[str, dict]:
    """Every case at one size, each beside its peer on the same tensors."""
    params = make_params(size, num_tensors)
    norm = sum(float(p.grad.double().square().sum()) for p in params) ** 0.5
    sgd = lambda: torch.optim.SGD(params, LR, foreach=True)  # noqa: E731
    adamw = lambda: torch.optim.AdamW(params, LR, foreach=True)  # noqa: E731
    cases: dict[str, tuple[Callable, Callable]] = {
        "gated_over_sgd": (lambda: ASGLD(params, LR, grad_threshold=norm / 10), sgd),
        "perturb_over_adamw": (lambda: Perturb(adamw(), grad_threshold=norm / 10), adamw),
        "auto_over_sgd": (lambda: ASGLD(params, LR, grad_threshold="auto"), sgd),
        "auto_over_adamw": (lambda: Perturb(adamw(), grad_threshold="auto"), adamw),
        "narrow_over_sgd": (lambda: ASGLD(params, LR, grad_threshold=norm / 1.0005), sgd),
        "noise_over_sgd": (lambda: ASGLD(params, LR, mode="constant", noise_radius=1e-3), sgd),
    }
    repeats = 9 if quick else 21
    found = {}
    for name, (make, peer) in cases.items():
        # Of the steps of "auto" every 16th reads the whole gradient: only a multiple of 16 has its share of them.
        steps = AUTO_EVERY if name.startswith("auto") else max(1, 20_000_000 // size)
        found[name] = compare(make(), peer(), steps, repeats)
    return found


def make_params(size: int, num_tensors: int) -> list[torch.nn.Parameter]:
    """Equal tensors of normal values, with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size // num_tensors, generator=generator)) for _ in range(num_tensors)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def compare(ours: torch.optim.Optimizer, peer: torch.optim.Optimizer, steps: int, repeats: int) -> dict:
    """Alternate between the two, `steps` steps at a time; the ratio is the median over pairs of neighbours."""
    for _ in range(AUTO_DENSE):
        ours.step()
        peer.step()
    pairs = [(seconds_a_step(ours, steps), seconds_a_step(peer, steps)) for _ in range(repeats)]
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    return {
        "ratio": statistics.median(ratios),
        "middle_half": (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]),
        "seconds": statistics.median(mine for mine, _ in pairs),
        "peer_seconds": statistics.median(theirs for _, theirs in pairs),
    }


def seconds_a_step(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Processor time, which a busy machine lengthens less than wall time; with one thread they mean the same."""
    start = time.process_time()
    for _ in range(steps):
        optimizer.step()
    return (time.process_time() - start) / steps


if __name__ == "__main__":
    main("optim_step", __doc__, measure)
