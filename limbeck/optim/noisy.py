"""What every optimizer with noise of its own shares: groups, counters, checkpoints, masters, keys of the noise.

Every setting and counter lies in `param_groups` as a plain number, so that checkpoints of any kind carry them and
schedulers can reach them; state changes inside `step` only.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from limbeck.errors import ConfigError
from limbeck.optim.block import Block, Traits, gather, members, noise_names
from limbeck.optim.seed import agreed_seed
from limbeck.optim.settings import COUNTERS, LOW_PRECISION, check_common, check_whole, whole_number
from limbeck.optim.sharding import layout, local


class NoisyOptimizer(Optimizer):
    """An optimizer whose noise is keyed by seed, step, parameter and element; a subclass writes `step`."""

    _counters: tuple[str, ...] = ("noise_step",)
    """The COUNTERS that its groups have."""
    _transient: ClassVar[tuple[str, ...]] = ()
    """Attributes that a deep copy keeps beside groups and state."""
    _owner: weakref.ref[Any] | None = None
    """The ZeroRedundancyOptimizer whose share of the parameters this is."""
    _noise_square: float | Tensor = 0.0

    def __init__(self, params: Any, settings: dict[str, Any]) -> None:
        params = params if isinstance(params, Tensor) else list(params)
        owner = _zero_redundancy_optimizer()
        self._owner = None if owner is None else weakref.ref(owner)
        if settings["seed"] is None and not isinstance(params, Tensor):
            settings["seed"] = agreed_seed(params if owner is None else owner.param_groups)
        super().__init__(params, settings)

    def stats(self) -> dict[str, Tensor]:
        """What the last step did: statistic, threshold, fires, steps_since_fire, noise_norm, boosted_next."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it starts at the step that the others have reached.

        Raises: ConfigError for settings that cannot work, or that must agree with the other groups' and do not; the
          optimizer is then as it was.
        """
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            self._prepare_group(self.param_groups[-1])
        except Exception:
            del self.param_groups[before:]
            raise

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with every counter as a plain number."""
        return with_plain_counters(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; what the state lacks, because another or an older optimizer wrote it, stays as it is set here.

        Counters that it lacks start anew; float32 masters and averages of low-precision parameters stay float32.

        Raises: ConfigError for settings in it that cannot work; the optimizer is then as it was.
        """
        before = {"state": self.state, "param_groups": self.param_groups}
        super().load_state_dict(state_dict)
        try:
            for group in self.param_groups:
                self._check_group(group)
        except ConfigError:
            self.__dict__.update(before)
            raise
        keep_float32(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: self.__dict__[name] for name in self._transient if name in self.__dict__}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups")
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):
            complete(group, self._counters, self.defaults if before is None else before[i])

    def _prepare_group(self, group: dict[str, Any]) -> None:
        complete(group, self._counters, {})
        group["noise_step"] = self.param_groups[0]["noise_step"]
        self._check_group(group)
        if not self._is_quiet(group):
            for param in group["params"]:
                layout(param)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_common(type(self).__name__, group)
        check_whole(group, self.param_groups[0])

    def _is_quiet(self, group: dict[str, Any]) -> bool:
        """Whether the group is outside the noise domain."""
        return float(group["lr"]) == 0

    def _is_on(self, group: dict[str, Any]) -> bool:
        """Whether the group moves at this step, and its noise is not over yet."""
        ends = group["noise_steps"]
        return float(group["lr"]) != 0 and (ends is None or group["noise_step"] < ends)

    def _is_frozen(self) -> bool:
        """Whether every learning rate is 0: no step is taken then.

        torch's distributed checkpoints rely on it: they call `step` so, with zero gradients, to make an optimizer
        create its state.
        """
        return all(float(group["lr"]) == 0 for group in self.param_groups)

    def _gather(self) -> list[Block]:
        return gather(self.param_groups, self._known_traits())

    def _known_traits(self) -> dict[int, Traits]:
        # Not an attribute from __init__, because deepcopy and unpickling do not call it.
        return self.__dict__.setdefault("_traits", {})

    def _owner_of_all(self) -> Any:
        return None if self._owner is None else self._owner()

    def _noise_names(self) -> list[list[str]]:
        owner = self._owner_of_all()
        if owner is None:
            return noise_names(self.param_groups)
        return noise_names(self.param_groups, {id(p): i for i, p in enumerate(members(owner.param_groups))})

    def _use_masters(self, block: Block) -> None:
        """Let the step change float32 masters in place of the low-precision parameters that have one."""
        if block.group["low_precision"] != "master":
            return
        for j, param in enumerate(block.params):
            if param.dtype in LOW_PRECISION:
                state = self.state[param]
                if "master" not in state:
                    state["master"] = param.detach().float()
                block.values[j] = local(state["master"])

    def _round_masters(self, block: Block) -> None:
        """Write the masters back to their parameters."""
        if block.group["low_precision"] != "master":
            return
        for param, value in zip(block.params, block.values, strict=True):
            if param.dtype in LOW_PRECISION:
                local(param.detach()).copy_(value)


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, with gradients on; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def complete(group: dict[str, Any], counters: tuple[str, ...], settings: dict[str, Any]) -> None:
    """Fill in what a group lacks: counters from their start, settings from `settings`."""
    for name in counters:
        group.setdefault(name, COUNTERS[name])
    for name, value in settings.items():
        if name not in ("params", "param_names"):
            group.setdefault(name, value)


def keep_float32(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Undo torch's cast of loaded state to the type of low-precision parameters, where the state was float32."""
    for i, param in zip(members(state_dict["param_groups"]), members(optimizer.param_groups), strict=True):
        if param.dtype not in LOW_PRECISION:
            continue
        for name, value in state_dict["state"].get(i, {}).items():
            if isinstance(value, Tensor) and value.dtype is torch.float32 and value.shape == param.shape:
                optimizer.state[param][name] = value.detach().clone().to(param.device)


def with_plain_counters(state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` with the counters that an accelerator holds as scalars turned into numbers, in place."""
    for group in state_dict["param_groups"]:
        for name in COUNTERS:
            if isinstance(group.get(name), Tensor):
                group[name] = group[name].item()
    return state_dict


def checked_seed(name: str, seed: Any) -> int | None:
    """None, for a seed that is to be drawn, or the seed as an int.

    Raises: ConfigError for anything else.
    """
    return None if seed is None else whole_number(name, "seed", seed)


def _zero_redundancy_optimizer() -> Any:
    """The ZeroRedundancyOptimizer that is making its local optimizer right now, if any.

    It tells the local one nothing of the ranks, and without that the noise of all ranks would be the same.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, module.ZeroRedundancyOptimizer):
            return found
        frame = frame.f_back
    return None
