"""A model in parts: every process holds a share of each parameter and gathers one layer at a time (FSDP2).

1. The first process loads the model; all processes build the same model without storage (on the meta device).
2. That one is split: layers and embeddings with `fully_shard`, the head by rows. Nothing is allocated before.
3. The first process sends one tensor after the other, and each keeps its share, so that no host but the first ever
   holds the whole model.

Layers gather their weights in hooks of `nn.Module.__call__`, so a split model takes transformers' own forward, whose
layers are called; the lean forward (models/lean.py) reads weights and calls no module, and leaves split models alone.
The head is never called either: the loss reads its weight, whole (`whole_head`) or its own rows (`sharded_softmax`),
and so it is a plain DTensor outside FSDP's care. Tied embeddings are one parameter in both roles.

Gradients are summed over the processes, not averaged: denominators are those of the whole step (distill.microbatch).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from limbeck.errors import ModelError
from limbeck.models.anatomy import Head, backbone_of, causal_lm_of
from limbeck.models.tensor_parallel import split_products


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the model, so that all of them must run it together."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def load_in_parts(
    load: Callable[[], Any],
    finish: Callable[[Any], Any],
    mesh: DeviceMesh,
    device: torch.device,
    products: torch.dtype,
) -> tuple[Any, Any]:
    """A model split over `mesh`, and the same model without storage, which `assemble` fills.

    Args:
      load: makes the model; called on the first process.
      finish: what is done to a loaded model (adapters, frozen weights); called on all of them.
      mesh: dimensions [replicate,] shard [, tensor]: copies of the model, parts of one, parts of each product.
      device: where this process keeps its part.
      products: dtype of the gathered weights; parts are kept, and gradients summed, in float32.
    """
    loaded = load() if dist.get_rank() == 0 else None
    kind = [None if loaded is None else (type(loaded), loaded.config)]
    dist.broadcast_object_list(kind, src=0)
    assert kind[0] is not None
    build, config = kind[0]
    with torch.device("meta"):
        model = finish(build(config))
    source = {} if loaded is None else tensors_of(finish(loaded))
    empty = copy.deepcopy(model)
    _split(model, mesh, products)
    model.to_empty(device=device)
    _receive(model, source, device)
    return model.eval(), empty


def assemble(model: nn.Module, empty: Any) -> Any:
    """The whole model on the CPU of the first process, which fills `empty`; None on the others. All must call it."""
    is_first = dist.get_rank() == 0
    parts = tensors_of(model)
    for name, tensor in parts.items():
        whole = whole_tensor(tensor)
        if is_first:
            owner, _, attribute = name.rpartition(".")
            module = empty.get_submodule(owner)
            table = module._parameters if attribute in module._parameters else module._buffers
            wants_gradient = getattr(table[attribute], "requires_grad", False)
            table[attribute] = whole.cpu()
            if table is module._parameters:
                table[attribute] = nn.Parameter(table[attribute], requires_grad=wants_gradient)
    if not is_first:
        return None
    causal_lm_of(empty).tie_weights()
    return empty.eval()


def whole_head(head: Head) -> Head:
    """The head with all of its rows; gradients by them are summed over the processes and handed back to their parts."""
    return Head(_gathered(head.weight), None if head.bias is None else _gathered(head.bias), head.softcap)


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a detached tensor that may be in parts; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole_(target: Tensor, whole: Tensor) -> None:
    """Copy `whole`, or the part of it that this process holds, into `target`."""
    target = target.detach()
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    box = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    target.to_local().copy_(whole[box])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, detached; buffers that are not saved with a model are among them."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _split(model: Any, mesh: DeviceMesh, products: torch.dtype) -> None:
    lm, backbone = causal_lm_of(model), backbone_of(model)
    embeddings: Any = backbone.embed_tokens
    is_tied = lm.lm_head.weight is embeddings.weight
    names = mesh.mesh_dim_names or ()
    if "tensor" in names:
        split_products(backbone, mesh["tensor"])
    data = mesh["replicate", "shard"] if "replicate" in names else mesh["shard"]
    policy = MixedPrecisionPolicy(
        param_dtype=None if products == torch.float32 else products, reduce_dtype=torch.float32
    )
    parts = data.size(-1)
    layers: Any = backbone.layers
    for module in [*layers, embeddings, backbone]:
        fully_shard(
            module,
            mesh=data,
            mp_policy=policy,
            # The root too: weights that stay gathered after a validation would be stale after the next step.
            reshard_after_forward=True,
            shard_placement_fn=lambda parameter: _placement(parameter, parts),
        )
    for module in backbone.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if is_tied:
        lm.lm_head.weight = embeddings.weight
    _split_head(lm.lm_head, data)


def _split_head(head: nn.Module, data: DeviceMesh) -> None:
    """Its rows over the processes, as far as they are not split with the embeddings."""
    rows = [Shard(0)] if data.ndim == 1 else [Replicate(), Shard(0)]
    for name, tensor in list(head.named_parameters()):
        if not isinstance(tensor, DTensor):
            part = distribute_tensor(tensor.detach(), data, rows, src_data_rank=None)
            setattr(head, name, nn.Parameter(part, requires_grad=tensor.requires_grad))


def _placement(parameter: nn.Parameter, parts: int) -> Shard | None:
    """Rows; but columns where tensor parallelism has split the rows, so that a part is one box of the whole."""
    if not (isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)):
        return None
    if parameter.shape[1] % parts:
        raise ModelError(
            f"a width of {parameter.shape[1]} cannot be shared by {parts} processes beside tensor parallelism; set "
            "parallel.shard_size to a divisor."
        )
    return Shard(1)


@torch.no_grad()
def _receive(model: nn.Module, source: Mapping[str, Tensor], device: torch.device) -> None:
    """Fill the parts from the first process's `source`, a tensor at a time."""
    for name, target in tensors_of(model).items():
        whole = source[name].to(device) if source else torch.empty(target.shape, dtype=target.dtype, device=device)
        whole = whole.contiguous()
        dist.broadcast(whole, src=0)
        copy_whole_(target, whole)


def _gathered(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    partial: list[Placement] = [Partial()] * tensor.device_mesh.ndim
    return tensor.full_tensor(grad_placements=partial)
