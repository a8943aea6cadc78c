"""Tensor parallelism: the products of a layer shared out over neighbouring processes, by the plan of transformers.

A config's `base_model_tp_plan` says which linear layers are cut by output (colwise) and which by input (rowwise);
torch's own styles cut them and add up what the second kind leaves in parts. Every process reads the same tokens, and
all that lies between the layers (residual stream, norms, head) is computed on each of them alike. Norms of single heads
(Qwen3's) see the heads of their process only; torch's style for a split dimension adds up their gradients.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from limbeck.errors import ModelError

_HEADS = 2
"""Dimension of the heads in what enters a norm of single heads: [B T N H]."""


def split_products(backbone: Any, mesh: DeviceMesh) -> None:
    """Cut the linear layers of a backbone over the one dimension of `mesh`.

    Raises: ModelError when transformers has no plan for it, or the plan or the shape cannot be split so.
    """
    name, size = type(backbone).__name__, mesh.size()
    styles = _styles(backbone)
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(backbone.config, field) % size:
            raise ModelError(
                f"{name}: {field} {getattr(backbone.config, field)} cannot be shared by {size} processes; set "
                "parallel.tensor_parallel_size to a divisor."
            )
    for layer in backbone.layers:
        for module in styles:
            if getattr(layer.get_submodule(module), "bias", None) is not None:
                raise ModelError(f"{name}: {module} has a bias, which is not cut; set parallel.tensor_parallel_size 1.")
        parallelize_module(layer, mesh, styles)


def _styles(backbone: Any) -> dict[str, ParallelStyle]:
    """From a module's name within a layer to how it is cut."""
    known = {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(),
        "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=_HEADS, use_local_output=True),
    }
    plan = getattr(backbone.config, "base_model_tp_plan", None) or {}
    rules = {rule.removeprefix("layers.*."): style for rule, style in plan.items() if rule.startswith("layers.*.")}
    if not rules or not set(rules.values()) <= known.keys():
        raise ModelError(
            f"{type(backbone).__name__}: transformers has no tensor-parallel plan for it that can be followed (known "
            f"are {', '.join(known)}); set parallel.tensor_parallel_size 1."
        )
    return {module: known[style] for module, style in rules.items()}
