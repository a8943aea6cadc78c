"""What two gloo processes do in test_optimizers_distributed.py:  python distributed_optim.py RANK WORLD_SIZE FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from limbeck.errors import ConfigError
from limbeck.optim import ASGLD, SGLD, Perturb, RankSquares

STEPS, CUT = 12, 5
MAKE = {
    "gated": lambda p: ASGLD(p, 0.05, grad_threshold=0.8, escape_steps=2, noise_radius=0.1, momentum=0.9),
    "smooth sphere": lambda p: ASGLD(p, 0.05, grad_threshold=2.0, mode="smooth", noise_radius=0.1, noise="sphere"),
    "relative ball": lambda p: ASGLD(
        p, 0.05, grad_threshold=1.5, escape_steps=1, noise_radius=0.1, noise="ball", noise_scale="relative"
    ),
    "ema": lambda p: ASGLD(p, 0.05, grad_threshold=0.8, gate="ema", escape_steps=2, noise_radius=0.1),
    "sgld": lambda p: SGLD(p, 0.05, temperature=0.01),
    "perturb adamw": lambda p: Perturb(
        torch.optim.AdamW(p, 0.01), grad_threshold=0.8, escape_steps=2, noise_radius=0.1
    ),
}


def make_model():
    torch.manual_seed(0)
    # 7 and 3 rows do not divide by 2, so that shards are uneven.
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3, bias=False))


def half(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)


def loss_of(model, step, rank):
    inputs, targets = half(step, rank)
    return ((model(inputs) - targets) ** 2).mean()


IN_SHARES = {
    "gated": (ASGLD, {"grad_threshold": 0.8, "escape_steps": 2, "noise_radius": 0.1, "momentum": 0.9}),
    "smooth sphere": (ASGLD, {"grad_threshold": 2.0, "mode": "smooth", "noise_radius": 0.1, "noise": "sphere"}),
    "ball": (ASGLD, {"mode": "constant", "noise_radius": 0.1, "noise": "ball"}),
    "auto": (ASGLD, {"grad_threshold": "auto", "noise_radius": 0.1}),
    "sgld": (SGLD, {"temperature": 0.01}),
}
"""Members that ZeroRedundancyOptimizer makes, which hands each rank a share of the parameters, without names."""


def run_single(name, steps=STEPS):
    """One process that adds up both halves."""
    model = make_model()
    return train_alone(model, MAKE[name](model.named_parameters()), steps)


def run_unshared(name):
    """What a ZeroRedundancyOptimizer on any number of ranks must do."""
    model = make_model()
    kind, settings = IN_SHARES[name]
    return train_alone(model, kind(model.parameters(), lr=0.05, **settings), STEPS)


def train_alone(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(2):
            (loss_of(model, step, rank) / 2).backward()
        optimizer.step()
    return model, optimizer


def run_parallel(model, optimizer, rank, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()


def full_values(model):
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in model.parameters()]


def run_ddp(name, rank):
    model = make_model()
    optimizer = MAKE[name](model.named_parameters())
    run_parallel(DistributedDataParallel(model), optimizer, rank, range(STEPS))
    return full_values(model), optimizer.param_groups[0]["fires"]


def make_sharded(name, mesh):
    model = make_model()
    fully_shard(model, mesh=mesh)
    return model, MAKE[name](model.named_parameters())


def run_fsdp(name, rank, mesh, folder):
    """Sharded from the start, and once more from a distributed checkpoint taken in the middle."""
    model, optimizer = make_sharded(name, mesh)
    run_parallel(model, optimizer, rank, range(CUT))
    path = folder / name.replace(" ", "_")
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=path)
    run_parallel(model, optimizer, rank, range(CUT, STEPS))
    return full_values(model), optimizer.param_groups[0]["fires"], resume_fsdp(name, rank, mesh, path)


def resume_fsdp(name, rank, mesh, path):
    model, optimizer = make_sharded(name, mesh)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    run_parallel(model, optimizer, rank, range(CUT, STEPS))
    return full_values(model)


def run_columns(mesh):
    """A parameter sharded along its second dimension, as tensor parallelism does it."""
    torch.manual_seed(0)
    whole = torch.randn(6, 7)
    value = torch.nn.Parameter(distribute_tensor(whole.clone(), mesh, [Shard(1)]))
    optimizer = ASGLD([("w", value)], 0.05, mode="smooth", grad_threshold=3.0, noise_radius=0.1, noise="sphere")
    for _ in range(STEPS):
        value.grad = value.detach() * 0.3
        optimizer.step()
    return value.full_tensor().detach()


def run_shares(name, rank):
    """ZeRO-1, and the state of rank 0, where all shares come together."""
    model = make_model()
    kind, settings = IN_SHARES[name]
    ddp = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(ddp.parameters(), optimizer_class=kind, lr=0.05, **settings)
    run_parallel(ddp, optimizer, rank, range(STEPS))
    return full_values(model)


def run_drawn_seeds(rank):
    """Ranks whose global seeds differ: the seed of each of three optimizers."""
    torch.manual_seed(100 + rank)
    params = [torch.nn.Parameter(torch.zeros(3))]
    return [ASGLD(params, 0.1, grad_threshold=1.0).param_groups[0]["seed"] for _ in range(3)]


def run_refused_shares():
    """What the shares of ZeRO-1 cannot know."""
    said = []
    for settings in ({"gate": "ema"}, {"gate": "snr"}, {"noise_scale": "relative"}):
        params = list(make_model().parameters())
        try:
            ZeroRedundancyOptimizer(
                params, optimizer_class=ASGLD, lr=0.1, grad_threshold=1.0, noise_radius=0.1, **settings
            )
        except ConfigError as error:
            said.append(str(error))
    return said


def make_wide_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 6))


def step_on_noise(model, momentum):
    """A gradient of noise alone, twice, under the gate and under constant noise."""
    settings = {"mode": "smooth", "grad_threshold": 30.0, "noise_radius": 0.5, "noise": "sphere", "seed": 4}
    optimizer = ASGLD(model.named_parameters(), 0.05, momentum=momentum, **settings)
    for _ in range(2):
        for p in model.parameters():
            p.grad = p.detach() * 0.5
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in model.parameters()]


def run_two_dimensions():
    """FSDP2 over tensor parallelism, on four ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = make_wide_model()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return step_on_noise(model, 0.9)


def run_cross(rank):
    """The estimate of RankSquares, which is that of two half-batches."""
    model = make_model()
    ddp, ranks = DistributedDataParallel(model), RankSquares()
    ddp.register_comm_hook(ranks, RankSquares.hook)
    loss_of(ddp, 0, rank).backward()
    return ranks.estimate(model.parameters())


def main():
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    if world_size == 4:
        torch.save(run_two_dimensions(), folder / f"two_dimensions{rank}.pt")
        dist.destroy_process_group()
        return
    mesh = init_device_mesh("cpu", (world_size,))
    result = {"ddp": {}, "fsdp": {}, "columns": run_columns(mesh), "cross": run_cross(rank)}
    result["shares"] = {name: run_shares(name, rank) for name in IN_SHARES}
    result["seeds"] = run_drawn_seeds(rank)
    result["refused"] = run_refused_shares()
    for name in MAKE:
        result["ddp"][name] = run_ddp(name, rank)
        result["fsdp"][name] = run_fsdp(name, rank, mesh, folder)
    torch.save(result, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
