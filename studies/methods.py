"""Optimizers by name, for the studies: each a function of parameters, settings and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from limbeck.errors import ConfigError, nearest
from limbeck.optim.jitter import jitter_
from limbeck.optim.langevin import AGLD, ASG, ASGLD
from limbeck.optim.neon import NEON
from limbeck.optim.perturb import Perturb
from limbeck.optim.perturbed import NoisySGD, PerturbedGD, PerturbedSGD
from limbeck.optim.sam import SAM
from limbeck.optim.settings import Gate, NoiseScale
from limbeck.optim.sgld import SGLD
from limbeck.optim.theory import escape_window, radius_to_temperature


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a study sets in its optimizers; each method reads what it knows."""

    lr: float
    """Step size."""
    momentum: float = 0.9
    """Heavy-ball momentum of the methods called *_momentum and of heavy_ball."""
    noise_radius: float = 0.01
    """r: root mean square norm of one draw of injected noise."""
    grad_threshold: float | Literal["auto"] = 0.02
    """The gate fires at or below this gradient norm."""
    escape_steps: int | None = None
    """Steps between two fires; null is the O(log d) window."""
    step_boost: float = 10.0
    """ASG: factor of the longer step after a fire."""
    noise_scale: NoiseScale = "energy"
    """energy: noise_radius is that of all coordinates together; coordinate: that of each one."""
    gate: Gate = "norm"
    """What the gate measures."""
    gate_beta: float = 0.9
    """Averaging of the gate `ema`."""


class Method(NamedTuple):
    """An optimizer and what it must be fed."""

    make: Callable[[list[Tensor], Settings, int], Optimizer]
    """Parameters, settings, seed of the injected noise."""
    is_stochastic: bool = False
    """Steps on mini-batches rather than on the exact gradient."""
    has_momentum: bool = False
    """Uses `Settings.momentum`."""
    needs_closure: bool = False
    """Takes several gradients a step."""


def _asgld(params: list[Tensor], settings: Settings, seed: int, momentum: float = 0.0) -> Optimizer:
    return ASGLD(params, settings.lr, momentum=momentum, seed=seed, **_gated(settings), **_noise(settings))


def _asg(params: list[Tensor], settings: Settings, seed: int, momentum: float = 0.0) -> Optimizer:
    return ASG(params, settings.lr, step_boost=settings.step_boost, momentum=momentum, **_gated(settings))


def _agld(params: list[Tensor], settings: Settings, seed: int, momentum: float = 0.0) -> Optimizer:
    return AGLD(params, settings.lr, momentum=momentum, seed=seed, **_gated(settings), **_noise(settings))


def _perturbed_gd(params: list[Tensor], settings: Settings, seed: int, momentum: float = 0.0) -> Optimizer:
    if settings.grad_threshold == "auto":
        raise ConfigError("perturbed_gd: grad_threshold is 'auto'; its theory asks for a number.")
    window = settings.escape_steps or escape_window(sum(param.numel() for param in params))
    # No test of the loss drop: the studies decide when a run has arrived.
    return PerturbedGD(
        params,
        settings.lr,
        grad_threshold=settings.grad_threshold,
        noise_radius=settings.noise_radius,
        escape_steps=window,
        momentum=momentum,
        seed=seed,
    )


def _sgld(params: list[Tensor], settings: Settings, seed: int) -> Optimizer:
    num_scalars = sum(param.numel() for param in params)
    temperature = radius_to_temperature(settings.noise_radius, settings.lr, num_scalars)
    return SGLD(params, settings.lr, temperature=temperature, seed=seed)


def _perturbed_adamw(params: list[Tensor], settings: Settings, seed: int) -> Optimizer:
    inner = torch.optim.AdamW(params, lr=settings.lr, weight_decay=0.0)
    return Perturb(inner, seed=seed, **_gated(settings), **_noise(settings))


def _jittered(make: Callable[[list[Tensor], Settings, int], Optimizer]) -> Callable[..., Optimizer]:
    """The control of every kick: one at the start, then nothing."""

    def kicked(params: list[Tensor], settings: Settings, seed: int) -> Optimizer:
        jitter_(params, settings.noise_radius, seed)
        return make(params, settings, seed)

    return kicked


def _sgd(params: list[Tensor], settings: Settings, seed: int) -> Optimizer:
    return torch.optim.SGD(params, lr=settings.lr, momentum=settings.momentum)


def _adam(params: list[Tensor], settings: Settings, seed: int) -> Optimizer:
    return torch.optim.Adam(params, lr=settings.lr)


def _neon(params: list[Tensor], settings: Settings, seed: int) -> Optimizer:
    threshold = 0.02 if settings.grad_threshold == "auto" else settings.grad_threshold
    return NEON(
        params,
        settings.lr,
        grad_threshold=threshold,
        noise_radius=settings.noise_radius / 100,
        escape_distance=settings.noise_radius,
        seed=seed,
    )


METHODS: dict[str, Method] = {
    "gd": Method(lambda params, s, seed: torch.optim.SGD(params, lr=s.lr)),
    "sgd": Method(lambda params, s, seed: torch.optim.SGD(params, lr=s.lr), is_stochastic=True),
    "heavy_ball": Method(
        lambda params, s, seed: torch.optim.SGD(params, lr=s.lr, momentum=s.momentum), has_momentum=True
    ),
    "sgd_momentum": Method(_sgd, is_stochastic=True, has_momentum=True),
    "jitter_sgd_momentum": Method(_jittered(_sgd), is_stochastic=True, has_momentum=True),
    "jitter_heavy_ball": Method(_jittered(_sgd), has_momentum=True),
    "jitter_adam": Method(_jittered(_adam)),
    "jitter_gd": Method(_jittered(lambda params, s, seed: torch.optim.SGD(params, lr=s.lr))),
    "sam": Method(
        lambda params, s, seed: SAM(_sgd(params, s, seed), rho=s.noise_radius), has_momentum=True, needs_closure=True
    ),
    "neon": Method(_neon, needs_closure=True),
    "perturbed_gd": Method(_perturbed_gd),
    "perturbed_gd_momentum": Method(
        lambda params, s, seed: _perturbed_gd(params, s, seed, s.momentum), has_momentum=True
    ),
    "perturbed_sgd": Method(
        lambda params, s, seed: PerturbedSGD(params, s.lr, noise_radius=s.noise_radius / s.lr, seed=seed),
        is_stochastic=True,
    ),
    "noisy_sgd": Method(
        lambda params, s, seed: NoisySGD(params, s.lr, noise_radius=s.noise_radius / s.lr, seed=seed),
        is_stochastic=True,
    ),
    "sgld": Method(_sgld, is_stochastic=True),
    "asgld": Method(_asgld, is_stochastic=True),
    "asgld_momentum": Method(
        lambda params, s, seed: _asgld(params, s, seed, s.momentum), is_stochastic=True, has_momentum=True
    ),
    "asg": Method(_asg, is_stochastic=True),
    "asg_momentum": Method(
        lambda params, s, seed: _asg(params, s, seed, s.momentum), is_stochastic=True, has_momentum=True
    ),
    "agld": Method(_agld),
    "agld_momentum": Method(lambda params, s, seed: _agld(params, s, seed, s.momentum), has_momentum=True),
    "adam": Method(lambda params, s, seed: torch.optim.Adam(params, lr=s.lr)),
    "adamw": Method(lambda params, s, seed: torch.optim.AdamW(params, lr=s.lr, weight_decay=0.0)),
    "perturbed_adamw": Method(_perturbed_adamw),
}
"""Method name to its maker. adamw has no weight decay here: decay would move the minima of the problems."""


def method_named(name: str) -> Method:
    """The method called `name`.

    Raises: ConfigError for an unknown name.
    """
    if name not in METHODS:
        raise ConfigError(f"methods: found {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


def _gated(settings: Settings) -> dict:
    return {
        "grad_threshold": settings.grad_threshold,
        "escape_steps": settings.escape_steps,
        "gate": settings.gate,
        "gate_beta": settings.gate_beta,
    }


def _noise(settings: Settings) -> dict:
    return {"noise_radius": settings.noise_radius, "noise_scale": settings.noise_scale}
