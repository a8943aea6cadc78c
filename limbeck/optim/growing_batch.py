"""Batches that grow slowly and linearly, b_t = min(b_max, b0 + floor(c t)), in three forms.

1. `GrowingBatchSampler`: the batches of a DataLoader.
2. `AccumulationSchedule`: how many micro-batches a step adds up.
3. `EqualLR`: the batch stays, and the learning rate falls as b0 / b_t: the ablation of the other two.

Growth buys fewer iterations, not fewer samples, so all of them count both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler

from limbeck.errors import ConfigError


class BatchGrowth:
    """The batch size of every step.

    Args:
      b0: samples in the first batch.
      growth: c, samples added a step; (b_max - b0) / T reaches b_max after T steps.
      b_max: None: no end.
      mode: linear follows the step; noise_scale grows by the same rule, but only in the steps after `observe`
        has found the batch too noisy, sigma^2 / b_t > ||grad f||^2.
    Raises: ConfigError for values that cannot work.
    """

    def __init__(
        self,
        b0: int,
        growth: float = 0.1,
        b_max: int | None = None,
        mode: Literal["linear", "noise_scale"] = "linear",
    ) -> None:
        if b0 < 1 or growth < 0 or (b_max is not None and b_max < b0):
            raise ConfigError(
                f"BatchGrowth: b0={b0}, growth={growth}, b_max={b_max}; b0 >= 1, growth >= 0 and b_max >= b0."
            )
        if mode not in ("linear", "noise_scale"):
            raise ConfigError(f"BatchGrowth: mode is {mode!r}; known are 'linear' and 'noise_scale'.")
        self.b0, self.growth, self.b_max, self.mode = b0, growth, b_max, mode
        self.iterations = 0
        """Steps taken."""
        self.samples = 0
        """Samples in the batches of these steps."""
        self._grown_steps = 0
        self._too_noisy = False

    @property
    def batch_size(self) -> int:
        """b_t of the coming step."""
        return self.size_at(self._grown_steps)

    def size_at(self, step: int) -> int:
        """min(b_max, b0 + floor(c step))."""
        size = self.b0 + math.floor(self.growth * step)
        return size if self.b_max is None else min(self.b_max, size)

    def rate_factor(self, step: int) -> float:
        """b0 / b_t: what the learning rate is multiplied by where it falls in place of a growing batch."""
        return self.b0 / self.size_at(step)

    def advance(self) -> None:
        """Count a step at the present size, and grow."""
        self.samples += self.batch_size
        self.iterations += 1
        if self.mode == "linear" or self._too_noisy:
            self._grown_steps += 1

    def observe(self, noise_square: float, gradient_square: float) -> None:
        """Tell the mode noise_scale what the last batches showed.

        Args:
          noise_square: sigma^2 / b_t, the variance of the batch gradient; for half-batches ||g_A - g_B||^2 /
            4.
          gradient_square: an unbiased estimate of ||grad f||^2; for half-batches <g_A, g_B>.
        """
        self._too_noisy = noise_square > gradient_square

    def state_dict(self) -> dict[str, Any]:
        """Counters, plain numbers."""
        return {
            "iterations": self.iterations,
            "samples": self.samples,
            "grown_steps": self._grown_steps,
            "too_noisy": self._too_noisy,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.iterations, self.samples = state["iterations"], state["samples"]
        self._grown_steps, self._too_noisy = state["grown_steps"], state["too_noisy"]


class GrowingBatchSampler(Sampler[list[int]]):
    """Batches of growing size out of an endless row of reshuffled epochs, for
    `DataLoader(batch_sampler=...)`.

    The row is a function of the seed alone and a batch is its next b_t entries, so `state_dict` is a few
    numbers and a resumed sampler goes on with the same batches. A batch may cross from one epoch into the
    next; none is short.

    Args:
      size: samples in the dataset.
      growth: the batch sizes; `growth.iterations` and `growth.samples` count what was handed out.
      steps: batches in one iteration over the sampler; the sizes go on growing from one to the next. None: endless.
      seed: of the shuffling.
      rank, world_size: this rank takes every world_size-th entry of each batch, whose size is that of all
        ranks together (rounded up to a multiple of world_size).

    DataLoader workers fetch ahead: save `state_dict` with num_workers=0, or pass it the number of batches
      really used.
    """

    def __init__(
        self,
        size: int,
        growth: BatchGrowth,
        *,
        steps: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if size < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"GrowingBatchSampler: size={size}, rank={rank}, world_size={world_size}; 0 <= rank < world_size."
            )
        self.size, self.growth, self.steps, self.seed = size, growth, steps, seed
        self.rank, self.world_size = rank, world_size
        self._position = 0
        self._done = self._resumed = self._first = 0

    def __len__(self) -> int:
        """Batches in one iteration.

        Raises: TypeError when it is endless.
        """
        if self.steps is None:
            raise TypeError("GrowingBatchSampler without steps is endless and has no length.")
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        # A sampler that was resumed in the middle of an iteration ends that one first.
        self._done, self._resumed = self._resumed, 0
        self._first = self.growth.iterations - self._done
        while self.steps is None or self._done < self.steps:
            count = -(-self.growth.batch_size // self.world_size) * self.world_size
            batch = [self._entry(self._position + i) for i in range(self.rank, count, self.world_size)]
            self._position += count
            self._done += 1
            self.growth.advance()
            yield batch
        self._done = 0

    def state_dict(self, used: int | None = None) -> dict[str, Any]:
        """Where the sampler stands.

        Args:
          used: batches used so far, in all iterations together, when workers have fetched more; needs the mode linear.
        Raises: ConfigError for more batches than were handed out, and in the mode noise_scale.
        """
        handed_out = self.growth.iterations
        if used is None or used == handed_out:
            return {"position": self._position, "done": self._done, "growth": self.growth.state_dict()}
        if not self._first <= used < handed_out:
            raise ConfigError(
                f"GrowingBatchSampler: used={used}; this iteration handed out batches {self._first} to {handed_out}."
            )
        if self.growth.mode != "linear":
            raise ConfigError(
                "GrowingBatchSampler: with mode='noise_scale' the past sizes are not kept; use num_workers=0."
            )
        past = BatchGrowth(self.growth.b0, self.growth.growth, self.growth.b_max)
        position = 0
        for _ in range(used):
            position += -(-past.batch_size // self.world_size) * self.world_size
            past.advance()
        return {"position": position, "done": used - self._first, "growth": past.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the world size may differ if it divides the same batches."""
        self._position = state["position"]
        self.growth.load_state_dict(state["growth"])
        # Older states know of one iteration only, counted from the start.
        self._done = self._resumed = state.get("done", self.growth.iterations)

    def _entry(self, position: int) -> int:
        epoch, index = divmod(position, self.size)
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
        return self._order[index]


class AccumulationSchedule:
    """How many micro-batches to add up for the coming step:  ceil(b_t / micro_batch).

        for _ in range(schedule.micro_batches):  (loss / schedule.micro_batches).backward()
        optimizer.step();  schedule.advance()

    Args:
      growth: the wanted batch sizes.
      micro_batch: samples in one forward pass, over all ranks.
    """

    def __init__(self, growth: BatchGrowth, micro_batch: int) -> None:
        if micro_batch < 1:
            raise ConfigError(f"AccumulationSchedule: micro_batch is {micro_batch}; it must be at least 1.")
        self.growth, self.micro_batch = growth, micro_batch
        self.samples = 0
        """Samples really used, which rounding up makes a little more than `growth.samples`."""

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of the coming step."""
        return -(-self.growth.batch_size // self.micro_batch)

    @property
    def iterations(self) -> int:
        """Steps taken."""
        return self.growth.iterations

    def advance(self) -> None:
        """Count a step, and grow."""
        self.samples += self.micro_batches * self.micro_batch
        self.growth.advance()

    def state_dict(self) -> dict[str, Any]:
        """Counters, plain numbers."""
        return {"samples": self.samples, "growth": self.growth.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.samples = state["samples"]
        self.growth.load_state_dict(state["growth"])


class EqualLR(LambdaLR):
    """lr_t = lr b0 / b_t: what a growing batch does to the gradient noise, done by the learning rate at a
    constant batch.

    Args:
      growth: in the mode linear; it is not advanced.
    """

    def __init__(self, optimizer: Optimizer, growth: BatchGrowth, last_epoch: int = -1) -> None:
        super().__init__(optimizer, _Share(growth), last_epoch)


class _Share:
    # A callable object: LambdaLR saves its __dict__, which here holds plain numbers only.
    def __init__(self, growth: BatchGrowth) -> None:
        self.b0, self.growth, self.b_max = growth.b0, growth.growth, growth.b_max

    def __call__(self, step: int) -> float:
        return BatchGrowth(self.b0, self.growth, self.b_max).rate_factor(step)
