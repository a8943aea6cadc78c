"""Experts of a mixture, one linear layer each instead of one tensor for all.

transformers keeps the experts of a layer in fused parameters. Compression works on linear layers, so for the length of
it a layer's experts are held apart, and put together again for the file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import ModelError

NAMES = {"gate_up_proj", "down_proj"}
"""Parameters of fused experts that can be taken apart."""


class UnfusedExperts(nn.Module):
    """The same mathematics as transformers' fused experts (gate and up in one, then down), a module an expert."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.act_fn = fused.act_fn
        self.valid: Tensor | None = None
        """bool [tokens], where padding is left out; None: all tokens."""
        for number, (gate_up, down) in enumerate(zip(fused.gate_up_proj, fused.down_proj, strict=True)):
            expert = nn.Module()
            expert.gate_up_proj, expert.down_proj = _linear(gate_up), _linear(down)
            self.add_module(str(number), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens D] from [tokens D], the experts of each token [tokens K] and their weights [tokens K]."""
        output = torch.zeros_like(hidden_states)
        for number, module in self.named_children():
            expert: Any = module
            if not number.isdigit():
                continue
            chosen = top_k_index == int(number)
            if self.valid is not None:
                chosen = chosen & self.valid[:, None]
            tokens, slots = chosen.nonzero(as_tuple=True)
            gate, up = expert.gate_up_proj(hidden_states[tokens]).chunk(2, dim=-1)
            result = expert.down_proj(self.act_fn(gate) * up) * top_k_weights[tokens, slots, None]
            output.index_add_(0, tokens, result.to(output.dtype))
        return output

    def fused(self) -> dict[str, Tensor]:
        """The parameters as transformers names and shapes them."""
        experts = [module for name, module in self.named_children() if name.isdigit()]
        return {
            name: torch.stack([getattr(expert, name).weight for expert in experts])
            for name in sorted(NAMES, reverse=True)
        }


def unfuse(block: nn.Module) -> None:
    """Replace every fused group of experts in a block.

    Raises: ModelError for experts that compute something else, such as those with biases, asked with random tokens.
    """
    for module in list(block.modules()):
        experts: Any = getattr(module, "experts", None)
        if isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter):
            known = hasattr(experts, "act_fn") and {n for n, _ in experts.named_parameters()} == NAMES
            apart = UnfusedExperts(experts) if known else None
            if apart is None or not (experts.gate_up_proj.is_meta or _agree(experts, apart)):
                raise ModelError(
                    f"{type(experts).__name__}: experts that compute otherwise than by gate, up and down products "
                    "cannot be taken apart."
                )
            module.experts = apart


@torch.no_grad()
def _agree(fused: Any, apart: UnfusedExperts) -> bool:
    """Whether both give the same for a few random tokens."""
    generator, like = torch.Generator().manual_seed(0), fused.gate_up_proj
    count, width = like.shape[0], like.shape[-1]
    hidden = torch.randn(6, width, generator=generator).to(like)
    chosen = torch.stack([torch.randperm(count, generator=generator)[: min(2, count)] for _ in range(6)])
    weights = torch.rand(chosen.shape, generator=generator).to(like)
    try:
        want, got = (experts(hidden, chosen.to(like.device), weights) for experts in (fused, apart))
    except Exception:  # they are called otherwise, or have other shapes
        return False
    return want.shape == got.shape and torch.allclose(want, got, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def fused_state(block: nn.Module) -> dict[str, Tensor]:
    """The state dict of a block, its experts put together again."""
    tensors = dict(block.state_dict())
    for name, module in block.named_modules():
        if isinstance(module, UnfusedExperts):
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name + ".")}
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.fused().items()}
    return tensors


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
