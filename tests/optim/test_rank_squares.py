"""RankSquares in jobs where it cannot work."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from limbeck.errors import ConfigError
from limbeck.optim import RankSquares


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_is_told_that_two_are_the_least(alone):
    model = nn.Linear(3, 2)
    ddp, ranks = DistributedDataParallel(model), RankSquares()
    ddp.register_comm_hook(ranks, RankSquares.hook)
    ddp(torch.ones(2, 3)).sum().backward()
    with pytest.raises(ConfigError, match="needs two at least; this job has one"):
        ranks.estimate(model.parameters())


def test_an_estimate_without_gradients_names_the_hook(alone, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    with pytest.raises(ConfigError, match="register_comm_hook"):
        RankSquares().estimate(nn.Linear(3, 2).parameters())


def test_two_averaged_passes_before_an_estimate_are_refused_and_forgotten(alone, monkeypatch):
    model = nn.Linear(3, 2)
    ddp, ranks = DistributedDataParallel(model), RankSquares()
    ddp.register_comm_hook(ranks, RankSquares.hook)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    for _ in range(2):
        ddp(torch.ones(2, 3)).sum().backward()
    with pytest.raises(ConfigError, match=r"2 backward passes.*no_sync"):
        ranks.estimate(model.parameters())
    with ddp.no_sync():
        ddp(torch.ones(2, 3)).sum().backward()
    ddp(torch.ones(2, 3)).sum().backward()
    assert float(ranks.estimate(model.parameters())) > 0
