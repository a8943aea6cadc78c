"""OptimizerConfig + model -> optimizer with the right parameter groups."""

from __future__ import annotations

import math
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
WITH_MOMENTUM = ("sgd", "asgld", "asg", "agld", "noisy_sgd", "perturb(sgd)")


@checked
class NoiseConfig:
    """When noise is added and how much, for all but adamw and sgd. Only samplers move norms, biases and embeddings."""

    grad_threshold: float | Literal["auto"] = "auto"
    """The gate opens where the clipped gradient's norm is at most this; auto: a tenth of its median so far."""
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
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be finite and greater than 0; found {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be finite and at least 0; found {self.weight_decay}")
        if not 0 < self.epsilon < math.inf:
            raise ConfigError(f"epsilon must be finite and greater than 0; found {self.epsilon}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"beta1 and beta2 must be in [0, 1); found {self.beta1} and {self.beta2}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be in [0, 1); found {self.momentum}")
        if self.name in ("sgld", "psgld") and not (self.noise.temperature or 0) > 0:
            raise ConfigError(f"{self.name} needs noise.temperature, greater than 0; found {self.noise.temperature}")
        if self.name == "noisy_sgd" and self.noise.noise_radius is None:
            raise ConfigError("noisy_sgd adds noise at every step; set noise.noise_radius")


def build_optimizer(model: nn.Module, config: OptimizerConfig, total_steps: int) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters.

    Args:
      total_steps: of the run; the noise ends `noise.quiet_fraction` of them before.
    Raises: ConfigError when nothing trains or the settings cannot work.
    """
    groups = parameter_groups(model, config.weight_decay)
    descent: dict[str, Any] = {"lr": config.learning_rate, "momentum": config.momentum}
    noise = config.noise
    gated: dict[str, Any] = {"grad_threshold": noise.grad_threshold, "escape_steps": noise.escape_steps}
    shape: dict[str, Any] = {"noise_radius": noise.noise_radius, "mode": noise.mode, "noise_scale": noise.noise_scale}
    shared: dict[str, Any] = {"seed": noise.noise_seed}
    optimizer: torch.optim.Optimizer
    if config.name in ("adamw", "sgd"):
        return _plain(config.name, groups, config)
    if config.name in ("sgld", "psgld"):
        optimizer = _sampler(config, groups)
    elif config.name == "asg":
        optimizer = ASG(groups, **descent, **gated, step_boost=noise.step_boost)
    elif config.name == "noisy_sgd":
        optimizer = NoisySGD(groups, **descent, noise_radius=noise.noise_radius or 0.0, **shared)
    elif config.name in ("asgld", "agld"):
        family = ASGLD if config.name == "asgld" else AGLD
        optimizer = family(groups, **descent, **gated, **shape, **shared)
    else:
        inner = _plain(config.name.removeprefix("perturb(").removesuffix(")"), groups, config)
        optimizer = Perturb(inner, **gated, **shape, **shared)
    for group in optimizer.param_groups:
        group["noise_steps"] = round((1 - noise.quiet_fraction) * total_steps)
        if group["is_plain"] and config.name not in ("sgld", "psgld"):
            group["noise_radius"] = 0.0
    return optimizer


def _sampler(config: OptimizerConfig, groups: list[dict]) -> torch.optim.Optimizer:
    noise = config.noise
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "temperature": noise.temperature,
        "seed": noise.noise_seed,
    }
    if config.name == "sgld":
        return SGLD(groups, **settings)
    # The loss makes its gradients in closed form, once: there is no second derivative for the correction term.
    return PSGLD(groups, **settings, correction=False)


def _plain(name: str, groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    # One call for all tensors, where they lie on the same processes; with tensor parallelism they do not.
    meshes = {p.device_mesh for group in groups for p in group["params"] if isinstance(p, DTensor)}
    at_once = len(meshes) < 2
    if name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, foreach=at_once)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=at_once,
        foreach=None if at_once else False,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices with decay; norms, biases and embeddings (a tied head included) without.

    Raises: ConfigError when nothing trains.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("no parameter of the student requires a gradient, so there is nothing to train.")
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    plain = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "is_plain": False},
        {"params": plain, "weight_decay": 0.0, "is_plain": True},
    ]
    return [group for group in groups if group["params"]]
