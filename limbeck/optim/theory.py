"""Formulas behind the optimizers: settings from constants, noise radius and temperature, escape time, loss bump."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from limbeck.errors import ConfigError


class TheorySettings(NamedTuple):
    """Settings of perturbed gradient descent for an (eps, sqrt(rho eps)) second-order stationary point."""

    lr: float
    noise_radius: float
    grad_threshold: float
    escape_steps: int
    loss_drop: float
    """A kick that lowers the loss by less than this within `escape_steps` has found no way down: stop there."""


def from_constants(
    L: float, rho: float, eps: float, delta: float, delta_f: float, d: int, c: float = 1.0
) -> TheorySettings:
    """The settings of Jin et al. 2017.

        chi = 3 max(ln(d L delta_f / (c eps^2 delta)), 4)      lr = c / L          r = sqrt(c) eps / (chi^2 L)
        g_thres = sqrt(c) eps / chi^2      f_thres = c / chi^3 sqrt(eps^3 / rho)   t_thres = chi L / (c^2 sqrt(rho eps))

    Args:
      L: Lipschitz constant of the gradient.
      rho: Lipschitz constant of the Hessian.
      eps: wanted gradient norm.
      delta: allowed probability of failure, in (0, 1).
      delta_f: f(start) - min f.
      d: number of parameters.
      c: a constant that the paper leaves open, in (0, 1].
    Raises: ConfigError for values outside these ranges.
    Source: Jin, Ge, Netrapalli, Kakade, Jordan 2017, arXiv:1703.00887, algorithm 2 (perturbed gradient
      descent).
    """
    for name, value in {"L": L, "rho": rho, "eps": eps, "delta_f": delta_f, "d": d}.items():
        if not value > 0:
            raise ConfigError(f"from_constants: {name} is {value}; it must be positive.")
    if not 0 < delta < 1 or not 0 < c <= 1:
        raise ConfigError(f"from_constants: delta is {delta} and c is {c}; delta lies in (0, 1) and c in (0, 1].")
    chi = 3 * max(math.log(d * L * delta_f / (c * eps**2 * delta)), 4)
    return TheorySettings(
        lr=c / L,
        noise_radius=math.sqrt(c) * eps / (chi**2 * L),
        grad_threshold=math.sqrt(c) * eps / chi**2,
        escape_steps=math.ceil(chi * L / (c**2 * math.sqrt(rho * eps))),
        loss_drop=c / chi**3 * math.sqrt(eps**3 / rho),
    )


def temperature_to_radius(temperature: float, lr: float, d: int) -> float:
    """r = sqrt(2 lr T d): the noise radius whose coordinates have SGLD's standard deviation sqrt(2 lr T)."""
    return math.sqrt(2 * lr * temperature * d)


def radius_to_temperature(noise_radius: float, lr: float, d: int) -> float:
    """T = r^2 / (2 lr d), the inverse of `temperature_to_radius`."""
    return noise_radius**2 / (2 * lr * d)


@functools.cache
def escape_window(d: int, rate: float = 0.1) -> int:
    """ceil((4 + 0.5 ln d) / ln(1 + rate)): steps that a kick is given to leave a saddle, the default of
    `escape_steps`.

    Args:
      rate: lr * gamma, by which a step stretches the escape direction; 0.1 when nothing is known.
    """
    return math.ceil((4 + 0.5 * math.log(max(d, 1))) / math.log1p(rate))


def growth_per_step(lr: float, gamma: float, momentum: float = 0.0) -> float:
    """Factor by which a step stretches a direction of curvature -gamma: the larger root z of

    z^2 - (1 + momentum + lr gamma) z + momentum = 0,  which is 1 + lr gamma without momentum.
    """
    middle = 1 + momentum + lr * gamma
    return (middle + math.sqrt(middle**2 - 4 * momentum)) / 2


def escape_slope(lr: float, gamma: float, momentum: float = 0.0) -> float:
    """Steps of escape time per unit of ln d:  1 / (2 ln z),  z from `growth_per_step`."""
    return 1 / (2 * math.log(growth_per_step(lr, gamma, momentum)))


def predicted_escape_steps(
    lr: float, gamma: float, d: int, noise_radius: float, distance: float, momentum: float = 0.0
) -> float:
    """Median steps from a kick of energy r^2 at a saddle to `distance` along its escape direction.

        T = ln(distance sqrt(d) / (0.6745 r)) / ln z

    The kick's share along the direction is normal with standard deviation r / sqrt(d); 0.6745 is the median
    of its size. With momentum a kick of the parameters alone starts the growing mode with weight (z -
    momentum) / (z - momentum / z) of it.
    """
    z = growth_per_step(lr, gamma, momentum)
    # The state (x, last change) = (a, 0) after the kick, written in the two modes z and momentum / z of the
    # recursion.
    weight = (z - momentum) / (z - momentum / z)
    start = 0.6744897501960817 * noise_radius / math.sqrt(d) * weight
    return max(0.0, math.log(distance / start) / math.log(z))


def predicted_loss_bump(noise_radius: float, hessian_trace: float, d: int) -> float:
    """Expected rise of the loss from one kick at a minimum:  0.5 r^2 tr(H) / d."""
    return 0.5 * noise_radius**2 * hessian_trace / d


def stationary_variance(curvature: float, lr: float, temperature: float) -> float:
    """Variance of x under SGLD on curvature x^2 / 2:  T / (curvature (1 - lr curvature / 2)), at any stable lr."""
    return temperature / (curvature * (1 - lr * curvature / 2))
