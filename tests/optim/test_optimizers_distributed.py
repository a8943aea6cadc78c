"""Two processes, replicated (DDP) or sharded (FSDP2), end with the bits of one that sees both half-batches."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from limbeck.optim import ASGLD
from limbeck.optim.gates import cross_product

WORKER = Path(__file__).with_name("distributed_optim.py")
spec = importlib.util.spec_from_file_location("distributed_optim", WORKER)
work = importlib.util.module_from_spec(spec)
spec.loader.exec_module(work)

pytestmark = pytest.mark.slow
members = pytest.mark.parametrize("name", work.MAKE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return on_ranks(2, tmp_path_factory.mktemp("gloo"))


def on_ranks(world_size, folder):
    """Run the worker on so many processes; what they wrote is in the folder."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world_size)
    ]
    errors = [worker.communicate(timeout=280)[1] for worker in workers]
    for worker, error in zip(workers, errors, strict=True):
        assert worker.returncode == 0, error[-3000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@members
def test_ddp_ends_with_the_bits_of_one_process(ranks, name):
    model, optimizer = work.run_single(name)
    for result in ranks:
        values, fires = result["ddp"][name]
        assert fires == optimizer.param_groups[0]["fires"]
        assert_same_bits(values, list(model.parameters()))


@members
def test_fsdp_ends_with_the_bits_of_one_process(ranks, name):
    model, optimizer = work.run_single(name)
    for result in ranks:
        values, fires, resumed = result["fsdp"][name]
        assert fires == optimizer.param_groups[0]["fires"]
        assert_same_bits(values, list(model.parameters()))
        assert_same_bits(resumed, values)


@members
def test_a_checkpoint_of_two_processes_resumes_in_one(folder, ranks, name):
    model = work.make_model()
    optimizer = work.MAKE[name](model.named_parameters())
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / name.replace(" ", "_"))
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for step in range(work.CUT, work.STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            (work.loss_of(model, step, rank) / 2).backward()
        optimizer.step()
    assert_same_bits(list(model.parameters()), ranks[0]["fsdp"][name][0])


@pytest.mark.parametrize("name", work.IN_SHARES)
def test_zero_redundancy_ends_with_the_bits_of_one_process(ranks, name):
    model, _ = work.run_unshared(name)
    for result in ranks:
        assert_same_bits(result["shares"][name], list(model.parameters()))


def test_what_shares_cannot_know_is_refused(ranks):
    for result in ranks:
        assert len(result["refused"]) == 3
        assert all("ZeroRedundancyOptimizer" in text for text in result["refused"])


def test_ranks_with_global_seeds_of_their_own_agree_on_the_seed_that_they_draw(ranks):
    first, second = (result["seeds"] for result in ranks)
    assert first == second
    assert len(set(first)) == 3


def test_fsdp_over_tensor_parallelism_ends_with_the_bits_of_one_process(tmp_path):
    folder = on_ranks(4, tmp_path)
    expected = work.step_on_noise(work.make_wide_model(), 0.9)
    for rank in range(4):
        for found, whole in zip(torch.load(folder / f"two_dimensions{rank}.pt"), expected, strict=True):
            assert torch.equal(found, whole)


def test_the_gated_members_did_fire(ranks):
    for name in ("gated", "relative ball", "perturb adamw"):
        assert ranks[0]["fsdp"][name][1] > 0


def test_columns_of_a_matrix_get_the_noise_of_the_whole(ranks):
    torch.manual_seed(0)
    value = torch.nn.Parameter(torch.randn(6, 7))
    optimizer = ASGLD([("w", value)], 0.05, mode="smooth", grad_threshold=3.0, noise_radius=0.1, noise="sphere")
    for _ in range(work.STEPS):
        value.grad = value.detach() * 0.3
        optimizer.step()
    assert torch.equal(ranks[0]["columns"], value.detach())


def test_ranks_estimate_what_half_batches_do(ranks):
    model = work.make_model()
    (work.loss_of(model, 0, 0) / 2).backward()
    halves = [p.grad.clone() for p in model.parameters()]
    (work.loss_of(model, 0, 1) / 2).backward()
    expected = float(cross_product(list(model.parameters()), halves))
    for result in ranks:
        assert float(result["cross"]) == pytest.approx(expected, rel=1e-5)
