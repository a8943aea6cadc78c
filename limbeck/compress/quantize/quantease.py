"""QuantEase: coordinate descent on the layer's error over weights that stay on the grid.

Source: 2309.01885; its code leaves every third sweep unrounded, which finds a way out of poor fixed points. Deviations:
a sweep makes one matrix product a block and not one a weight; the start is GPTQ; scales are fitted again within sweeps;
every output keeps the best weights that it met, so that unrounded sweeps cannot lose anything.
"""

from __future__ import annotations

from limbeck.compress.problem import DAMPING, LayerProblem
from limbeck.compress.quantize import gptq, rtn
from limbeck.compress.quantize.descent import Descent
from limbeck.compress.quantize.gptq import GptqConfig
from limbeck.compress.quantize.grid import Grid, Quantized
from limbeck.compress.quantize.rtn import RtnConfig
from limbeck.compress.quantize.scales import check_clip
from limbeck.config import checked
from limbeck.errors import ConfigError


@checked
class QuantEaseConfig:
    """Coordinate descent."""

    start: str = "gptq"
    """gptq | rtn: where to start; rtn needs no factorisation, and ends at a larger error."""
    clip: str = "moments"
    """none | mse | moments: how scales are searched for the start."""
    sweeps: int = 8
    """Most sweeps over the inputs; 20 lower the error by about one percent more."""
    unrounded_every: int = 3
    """Every such sweep leaves the weights unrounded, but not the last two; 0 for none."""
    refit_scales: bool = True
    """Fit the scales again in every rounded sweep; those of groups above 256 inputs only in the first, since
    for them it costs as much as two sweeps and gains little."""
    tolerance: float = 1e-3
    """Stop when the sweeps up to the next unrounded one lower the error by less than this share of it."""
    damping: float = DAMPING
    """Share of H's mean diagonal that is added to its diagonal."""
    block: int = 64
    """Inputs settled between two matrix products; for speed only."""

    def __post_init__(self) -> None:
        check_clip(self.clip)
        if self.start not in ("gptq", "rtn"):
            raise ConfigError(f"start must be gptq or rtn; found {self.start!r}")
        if self.sweeps < 0 or self.unrounded_every < 0 or self.tolerance < 0 or self.damping < 0 or self.block < 1:
            raise ConfigError(
                f"sweeps {self.sweeps}, unrounded_every {self.unrounded_every}, tolerance {self.tolerance}, damping "
                f"{self.damping}, block {self.block}: expected 0 or more, and block at least 1"
            )
        if self.unrounded_every == 1:
            raise ConfigError("unrounded_every must be 0 or at least 2: with 1 no sweep would round.")


def solve(problem: LayerProblem, grid: Grid, config: QuantEaseConfig) -> Quantized:
    """Sweeps of u_j = W_j - sum_{i != j} H_ji / H_jj (B_i - W_i), B_j = round(u_j), scales fitted between them.

    Args:
      problem: the layer.
    Returns: codes [O I] and scales [O G]; masked weights have code 0. Without any inputs seen: rounding to nearest.
    Raises: CompressionError when the group size does not divide the inputs.
    """
    if config.start == "gptq":
        begin = gptq.solve(problem, grid, GptqConfig(clip=config.clip, damping=config.damping))
    else:
        begin = rtn.solve(problem, grid, RtnConfig(clip=config.clip))
    return descend(problem, begin, config)


def descend(problem: LayerProblem, begin: Quantized, config: QuantEaseConfig) -> Quantized:
    """`solve` from codes and scales that are given; no output's error (of damped H) ends above its first."""
    descent = Descent(problem, begin.dequantize(), begin.scales, config.damping, config.block)
    period = config.unrounded_every
    before = float(descent.least.sum())
    for sweep in range(1, config.sweeps + 1):
        if period and sweep % period == 0 and sweep <= config.sweeps - 2:
            descent.sweep(None)
            continue
        descent.sweep(begin.grid, config.refit_scales and (descent.short or sweep == 1))
        descent.keep()
        if not period or sweep % period == period - 1:
            now = float(descent.least.sum())
            if before - now <= config.tolerance * before:
                break
            before = now
    return descent.result(begin.grid)
