"""OptimizerConfig + model -> optimizer with the right parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from limbeck.config import checked, only
from limbeck.errors import ConfigError
from limbeck.optim.langevin import AGLD, ASG, ASGLD
from limbeck.optim.perturb import Perturb
from limbeck.optim.perturbed import NoisySGD
from limbeck.optim.psgld import PSGLD
from limbeck.optim.sgld import SGLD

OptimizerName = Literal[
    "adamw", "sgd", "asgld", "asg", "agld", "sgld", "psgld", "noisy_sgd", "perturb(adamw)", "perturb(sgd)"
]
ADAM = ("adamw", "perturb(adamw)")
NOISY = tuple(name for name in get_args(OptimizerName) if name not in ("adamw", "sgd"))
SAMPLERS = ("sgld", "psgld")
WITH_MOMENTUM = ("sgd", "asgld", "asg", "agld", "noisy_sgd", "perturb(sgd)")


@checked
class NoiseConfig:
    """When noise is added and how much, for all but adamw and sgd. Only samplers move norms, biases and embeddings."""

    grad_threshold: float | Literal["auto"] = "auto"
    """The gate opens where the clipped gradient's norm is at most this; auto: a twentieth of its median so far."""
    noise_radius: float | None = None
    """Root of the expected squared norm of a draw; null: learning rate times threshold, so it follows the schedule."""
    escape_steps: int | None = None
    """Steps between two draws at least; null: the optimizer's own."""
    mode: Literal["gated", "smooth", "annealed", "constant"] = "gated"
    """gated: all or nothing; smooth: more the closer to stationary; annealed, constant: at every step."""
    noise_scale: Literal["relative", "energy"] = "relative"
    """relative: each tensor is moved by the same share of its norm; energy: each coordinate by the same amount."""
    step_boost: float = 10.0
    """asg: factor of the steps after a fire."""
    temperature: float | None = None
    """sgld, psgld: T of the stationary distribution exp(-loss / T)."""
    quiet_fraction: float = 0.2
    """Last share of the steps, without noise and boost."""
    noise_seed: int = 0
    """Keys the noise, together with step, parameter and element."""

    def __post_init__(self) -> None:
        if not 0 <= self.quiet_fraction <= 1:
            raise ConfigError(f"quiet_fraction must be in [0, 1]; found {self.quiet_fraction}")


@checked
class OptimizerConfig:
    """Which optimizer, with which settings."""

    name: OptimizerName = "adamw"
    """adamw (Loshchilov and Hutter, arXiv 1711.05101), sgd, or one that leaves saddles: see docs/optimizers.md."""
    learning_rate: float = 1e-4
    """Peak learning rate, > 0."""
    weight_decay: float = 0.01
    """Decay of weight matrices, decoupled (sgd: coupled); norms, biases and embeddings have none."""
    beta1: float = only("name", *ADAM, default=0.9)
    """Decay of the first moment."""
    beta2: float = only("name", *ADAM, default=0.999)
    """Decay of the second moment."""
    epsilon: float = only("name", *ADAM, default=1e-8)
    """Added to the root of the second moment."""
    momentum: float = only("name", *WITH_MOMENTUM, default=0.9)
    """Decay of the momentum buffer, which noise does not enter."""
    noise: NoiseConfig = only("name", *NOISY, default_factory=NoiseConfig)
    """Gate and noise."""

    def __post_init__(self) -> None:
        for field, is_in, wanted in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "finite and greater than 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "finite and at least 0"),
            ("epsilon", 0 < self.epsilon < math.inf, "finite and greater than 0"),
            ("beta1", 0 <= self.beta1 < 1, "in [0, 1)"),
            ("beta2", 0 <= self.beta2 < 1, "in [0, 1)"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
        ):
            if not is_in:
                raise ConfigError(f"{field} must be {wanted}; found {getattr(self, field)}")
        if self.name in SAMPLERS and not (self.noise.temperature or 0) > 0:
            raise ConfigError(f"{self.name} needs noise.temperature, greater than 0; found {self.noise.temperature}")
        if self.name == "noisy_sgd" and self.noise.noise_radius is None:
            raise ConfigError("noisy_sgd adds noise at every step; set noise.noise_radius")


def build_optimizer(model: nn.Module, config: OptimizerConfig, total_steps: int) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters.

    Args:
      total_steps: of the run; the noise ends `noise.quiet_fraction` of them before.
    Raises: ConfigError when nothing trains or the settings cannot work.
    """
    optimizer = MAKERS[config.name](parameter_groups(model, config.weight_decay), config)
    if config.name not in NOISY:
        return optimizer
    for group in optimizer.param_groups:
        group["noise_steps"] = round((1 - config.noise.quiet_fraction) * total_steps)
        if group["is_plain"] and config.name not in SAMPLERS:
            group["noise_radius"] = 0.0
    return optimizer


def _gate(noise: NoiseConfig) -> dict[str, Any]:
    return {"grad_threshold": noise.grad_threshold, "escape_steps": noise.escape_steps}


def _spread(noise: NoiseConfig) -> dict[str, Any]:
    return {
        "noise_radius": noise.noise_radius,
        "mode": noise.mode,
        "noise_scale": noise.noise_scale,
        "seed": noise.noise_seed,
    }


def _descent(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "momentum": config.momentum}


def _sampler(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "temperature": config.noise.temperature, "seed": config.noise.noise_seed}


def _noisy_sgd(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    noise = config.noise
    return NoisySGD(groups, **_descent(config), noise_radius=noise.noise_radius or 0.0, seed=noise.noise_seed)


def _sgd(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, **_descent(config), foreach=_on_one_mesh(groups))


def _adamw(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    at_once = _on_one_mesh(groups)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=at_once,
        foreach=None if at_once else False,
    )


def _on_one_mesh(groups: list[dict]) -> bool:
    """Whether all tensors lie on the same processes, so that one call can step them; in tensor parallelism not."""
    return len({p.device_mesh for group in groups for p in group["params"] if isinstance(p, DTensor)}) < 2


MAKERS: dict[str, Callable[[list[dict], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "asgld": lambda groups, c: ASGLD(groups, **_descent(c), **_gate(c.noise), **_spread(c.noise)),
    "asg": lambda groups, c: ASG(groups, **_descent(c), **_gate(c.noise), step_boost=c.noise.step_boost),
    "agld": lambda groups, c: AGLD(groups, **_descent(c), **_gate(c.noise), **_spread(c.noise)),
    "sgld": lambda groups, c: SGLD(groups, **_sampler(c)),
    "psgld": lambda groups, c: PSGLD(groups, **_sampler(c)),
    "noisy_sgd": _noisy_sgd,
    "perturb(adamw)": lambda groups, c: Perturb(_adamw(groups, c), **_gate(c.noise), **_spread(c.noise)),
    "perturb(sgd)": lambda groups, c: Perturb(_sgd(groups, c), **_gate(c.noise), **_spread(c.noise)),
}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices with decay; norms, biases and embeddings (a tied head included) without.

    Raises: ConfigError when nothing trains.
    """
    embeddings = _embeddings(model)
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or id(parameter) in embeddings
            (plain if is_plain else decayed).append(parameter)
    if not decayed and not plain:
        raise ConfigError("no parameter of the student requires a gradient, so there is nothing to train.")
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "is_plain": False},
        {"params": plain, "weight_decay": 0.0, "is_plain": True},
    ]
    return [group for group in groups if group["params"]]


def _embeddings(model: nn.Module) -> set[int]:
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return {id(parameter) for table in tables for parameter in table.parameters(recurse=False)}
