"""The machine below the samplers: it hands each one's rule the parameter, the gradient, its state and fresh noise.

A sampler is its `_update`: the rule of its paper, on tensors, in place. Low-precision parameters are sampled through
float32 masters: rounding at every step, stochastic or not, would heat or freeze the chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.optim.block import Block
from limbeck.optim.noise import NoiseKey, segments
from limbeck.optim.noisy import NoisyOptimizer, checked_seed, evaluate
from limbeck.optim.settings import LOW_PRECISION
from limbeck.optim.sharding import Layout, local, sum_over_shards
from limbeck.optim.spread import plain

SAMPLER_DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "noise_steps": None,
    "low_precision": "master",
    "maximize": False,
}


class Sampler(NoisyOptimizer):
    """An optimizer that adds noise at every step, so that its parameters are samples of exp(-f / T)."""

    _counters: tuple[str, ...] = ("noise_step", "fires")
    _state_names: ClassVar[tuple[str, ...]] = ()
    """Tensors of a parameter's size that the rule keeps; they start at 0."""

    def __init__(self, params: Any, settings: dict[str, Any]) -> None:
        settings["seed"] = checked_seed(type(self).__name__, settings.get("seed"))
        super().__init__(params, {**SAMPLER_DEFAULTS, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
          closure: None, or a function that computes the gradients anew and returns the loss.
        Returns: what the closure returned.
        Raises: ConfigError for sparse gradients.
        """
        loss = evaluate(closure)
        blocks = self._gather()
        for block in blocks:
            self._use_masters(block)
            self._make_state(block)
        if self._is_frozen():
            return loss
        self._move(blocks)
        for group in self.param_groups:
            group["noise_step"] += 1
        return loss

    def _move(self, blocks: list[Block]) -> None:
        moving = [
            (block, names)
            for block, names in zip(blocks, self._noise_names(), strict=True)
            if block.params and float(block.group["lr"]) != 0
        ]
        extras = [self._prepare(block, names) for block, names in moving]
        squares = [self._update_block(*item, extra) for item, extra in zip(moving, extras, strict=True)]
        self._noise_square = sum(squares, 0.0)
        for block, _ in moving:
            self._round_masters(block)
            self._conclude(block)

    def stats(self) -> dict[str, Tensor]:
        """As the gated optimizers' `stats`, so that one log fits all; without a gate only `noise_norm` speaks."""
        return {
            "statistic": torch.tensor(math.inf),
            "threshold": torch.tensor(math.inf),
            "fires": torch.as_tensor(self.param_groups[0]["fires"]),
            "steps_since_fire": torch.tensor(math.inf, dtype=torch.float64),
            "noise_norm": torch.as_tensor(self._noise_square).sqrt(),
            "boosted_next": torch.tensor(False),
        }

    def _update(
        self, x: Tensor, grad: Tensor, noise: Tensor | None, states: list[Tensor], settings: Mapping[str, Any]
    ) -> Tensor | float:
        """The rule: change x and the states in place.

        Args:
          noise: standard normal, of the shape of x; None where there is none at this step.
          states: what `_state_names` names, then what `_prepare` returned.
          settings: the group's, and the numbers in the parameter's state.
        Returns: the squared norm of the noise that was added.
        """
        raise NotImplementedError

    def _prepare(self, block: Block, names: list[str]) -> list[list[Tensor]]:
        """More tensors for the rule, one list for each parameter; called once a step, before anything moves."""
        return [[] for _ in block.params]

    def _conclude(self, block: Block) -> None:
        """Called after a block has moved."""

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["low_precision"] == "stochastic":
            raise ConfigError(
                f"{type(self).__name__}: low_precision='stochastic' adds rounding noise at every step, which heats the "
                "chain; use 'master'."
            )

    def _make_state(self, block: Block) -> None:
        for param in block.params:
            state = self.state[param] if self._state_names else {}
            for name in self._state_names:
                if name not in state:
                    dtype = torch.float32 if param.dtype in LOW_PRECISION else None
                    state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def _update_block(self, block: Block, names: list[str], extras: list[list[Tensor]]) -> float | Tensor:
        group, squares = block.group, []
        is_hot = float(group["temperature"]) > 0 and self._is_on(group)
        for j, (key, where) in enumerate(block.draws(group["noise_step"], names)):
            state = self.state.get(block.params[j], {})
            tensors = [block.values[j], self._gradient(block, j), *(local(state[name]) for name in self._state_names)]
            settings = {**group, **{name: value for name, value in state.items() if not isinstance(value, Tensor)}}
            squares.append(self._update_param([*tensors, *extras[j]], key if is_hot else None, where, settings))
        values = torch.stack([torch.as_tensor(square, dtype=torch.float32) for square in squares])
        return plain(sum_over_shards(block.params, values).sum())

    def _update_param(
        self, tensors: list[Tensor], key: NoiseKey | None, where: Layout, settings: Mapping[str, Any]
    ) -> float | Tensor:
        if key is None:
            x, grad, *states = tensors
            return self._update(x, grad, None, states, settings)
        total: float | Tensor = 0.0
        for (x, grad, *states), noise in segments(tensors, key, where):
            total = total + self._update(x, grad, noise, states, settings)
        return total

    def _gradient(self, block: Block, index: int) -> Tensor:
        """In the type of what the step changes, downhill."""
        grad = block.grads[index].detach().to(block.values[index].dtype)
        return -grad if block.group["maximize"] else grad
