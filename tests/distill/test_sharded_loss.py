"""The fused loss over a vocabulary in parts is that over the whole one: values and gradients, in float64."""

import pytest
import torch
import torch.distributed as dist
from parallel_runs import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from limbeck.distill.divergence import DIVERGENCES, DivergenceConfig
from limbeck.distill.fused import fused_loss
from limbeck.models.anatomy import Head
from limbeck.models.sharded_softmax import head_rows, part_of
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.topk import TopKTargets

ROWS, WIDTH, KEPT = (5, 2, 0, 3), 6, 4
"""Rows of each process; the third has none."""


def inputs(vocab, padded):
    generator = torch.Generator().manual_seed(vocab)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = sum(ROWS)
    logits = normal(n, vocab)
    best = torch.log_softmax(logits, -1).topk(min(KEPT, vocab))
    tail = torch.log1p(-best.values.exp().sum(-1).clamp(max=1.0))
    log_probs = best.values.clone()
    log_probs[1, 2:] = -torch.inf
    return {
        "hidden": normal(n, WIDTH),
        "head": normal(padded, WIDTH),
        "bias": normal(padded),
        "labels": torch.randint(0, vocab, (n,), generator=generator),
        "ce_coef": torch.rand(n, generator=generator, dtype=torch.float64) * (torch.arange(n) % 3 > 0),
        "kd_coef": torch.rand(n, generator=generator, dtype=torch.float64) * (torch.arange(n) % 4 > 0),
        "dense": DenseTargets(normal(n, 4), normal(padded + 1, 4), normal(padded + 1)),
        "top-k": TopKTargets(best.indices, log_probs, tail),
        "text": None,
    }


def cut(targets, rows, part):
    """The teacher's word on some rows, with the head rows of this process."""
    if targets is None:
        return None
    return targets.take(rows).map_heads(lambda head: head if part is None else head_rows(head, part))


def loss_of(given, targets, vocab, rows, divergence, temperature, mesh=None):
    hidden = given["hidden"][rows].clone().requires_grad_()
    weight, bias = given["head"].clone(), given["bias"].clone()
    if mesh is not None:
        weight, bias = (distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, bias))
    head = Head(weight.requires_grad_(), bias.requires_grad_())
    part = part_of(weight, vocab) if mesh is not None else None
    used = head if part is None else head_rows(head, part)
    kd_coef = given["kd_coef"][rows] * (targets is not None)
    found = fused_loss(
        hidden, used.weight, given["labels"][rows], head_bias=used.bias, ce_coef=given["ce_coef"][rows],
        kd_coef=kd_coef, targets=cut(targets, rows, part),
        divergence=DivergenceConfig(name=divergence), temperature=temperature, vocab_size=vocab,
        chunk_bytes=3 * vocab * 8, part=part,
    )  # fmt: skip
    found.total.backward()
    return found, hidden.grad, weight.grad, bias.grad


def compare(vocab, padded):
    world = dist.get_world_size() if dist.is_initialized() else None
    if world is None:
        dist.init_process_group("gloo")
        world = dist.get_world_size()
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    given = inputs(vocab, padded)
    starts = torch.tensor([0, *ROWS]).cumsum(0).tolist()
    last = starts[-1] if rank == world - 1 else starts[rank + 1]
    mine, everything = slice(starts[rank], last), slice(0, sum(ROWS))
    for kind in ("dense", "top-k", "text"):
        for divergence in DIVERGENCES if kind != "text" else ["forward_kl"]:
            for temperature in (1.0, 2.0):
                targets = given[kind]
                whole, *expected = loss_of(given, targets, vocab, everything, divergence, temperature)
                found, *gradients = loss_of(given, targets, vocab, mine, divergence, temperature, mesh)
                values = torch.stack([found.ce_sum, found.kd_sum, found.total.detach()])
                dist.all_reduce(values)
                wanted = torch.stack([whole.ce_sum, whole.kd_sum, whole.total.detach()])
                torch.testing.assert_close(values, wanted, rtol=1e-12, atol=1e-12, msg=f"{kind} {divergence}")
                expected[0] = expected[0][mine]
                for name, gradient, other in zip(("hidden", "head", "bias"), gradients, expected, strict=True):
                    gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                    torch.testing.assert_close(
                        gradient,
                        other,
                        rtol=1e-11,
                        atol=1e-12,
                        msg=lambda m, n=name, k=kind, d=divergence: f"{k} {d} {n}: {m}",
                    )


@pytest.mark.parametrize(("processes", "vocab", "padded"), [(2, 11, 12), (4, 5, 9)], ids=["uneven", "an empty part"])
def test_parts_of_the_vocabulary_give_the_loss_of_the_whole(processes, vocab, padded):
    on_ranks(processes, compare, vocab, padded)
