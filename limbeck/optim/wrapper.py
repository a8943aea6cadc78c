"""What an optimizer around another optimizer shares: groups, state, defaults and checkpoints are the inner one's."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

Groups = list[dict[str, Any]]


class WrappingOptimizer(Optimizer):
    """An optimizer that leaves the step to `optimizer` and does something around it; a subclass writes `step`."""

    optimizer: Optimizer

    def _wrap(self, optimizer: Optimizer, **attributes: Any) -> None:
        # Optimizer.__init__ would make groups of its own; torch's __setstate__ sets up hooks and profiling alone.
        Optimizer.__setstate__(self, {"optimizer": optimizer, **attributes})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's; hooks of both run."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the optimizer; hooks of both run."""
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._load(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    @property
    def param_groups(self) -> Groups:
        """The optimizer's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Groups) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The optimizer's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults
