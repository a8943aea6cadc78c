"""How sure is a ranker? One chain of SGLD as an ensemble, beside one model, jittered copies and a deep ensemble.

A small network ranks the candidates of generated requests, whose click probabilities are known. All methods share the
posterior: log-likelihood of the labels, and a Gaussian prior of the weights.

| method | ensemble | gradients |
|---|---|---|
| single | the mode that AdamW finds | train_steps |
| jitter | copies of it, each moved by a kick | the same |
| sgld | samples along one chain that starts at it | train_steps + sample_steps |
| deep | as many modes, each trained from a start of its own | members x train_steps |

The kick's radius is the best of three on the test set, which favours jitter. An ensemble's probability is the mean of
its members'. Judged by log-loss and calibration error on other requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from limbeck.checkpoint import output_directory
from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.optim.jitter import jitter_
from limbeck.optim.sgld import SGLD
from limbeck.ranking.auc import auc
from limbeck.ranking.metrics import calibration_error, log_loss
from limbeck.ranking.request import Request
from limbeck.ranking.synthetic import SyntheticConfig, generate_requests
from limbeck.stage import How
from studies import draw
from studies.command import main
from studies.page import Table, write_study

RADII = (0.3, 1.0, 3.0)
"""Of the jittered copies."""


@checked
class EnsembleConfig:
    """The data, the network and the chain."""

    train_requests: int = 60
    """Requests to learn from."""
    test_requests: int = 1000
    """Requests to judge by."""
    topics: int = 4
    """Topics of the generator: what a member loves or hates and an item is about."""
    hidden: int = 16
    """Units of the network."""
    members: int = 20
    """Networks of an ensemble."""
    train_steps: int = 2_000
    """Steps of AdamW to a mode."""
    sample_steps: int = 20_000
    """Steps of the chain; the first fifth is thrown away, and the others give the members, evenly spaced."""
    step_size: float = 1e-3
    """e of SGLD's posterior form."""
    prior_precision: float = 0.3
    """Of the Gaussian prior."""
    seed: int = 0
    """Of data, starts and noise."""

    def __post_init__(self) -> None:
        for name in ("train_requests", "test_requests", "hidden", "members", "train_steps", "sample_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more; found {getattr(self, name)}.")
        if self.sample_steps < 2 * self.members:
            raise ConfigError(f"sample_steps {self.sample_steps} are too few for {self.members} members.")


class Data(NamedTuple):
    """Pairs of a member and an item."""

    features: Tensor
    """float32 `[N, words]`: 1 where a word of the vocabulary stands in the pair's text."""
    labels: Tensor
    """float32 `[N]`."""
    requests: Tensor
    """int64 `[N]`: which request a pair belongs to."""
    probabilities: Tensor
    """float32 `[N]`: the generator's own."""


class Nets(torch.nn.Module):
    """Two-layer networks side by side: features `[N, words]` to log-odds `[members, N]`."""

    def __init__(self, members: int, num_words: int, hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(torch.randn(members, num_words, hidden, generator=generator) * 0.5)
        self.second = torch.nn.Parameter(torch.randn(members, hidden, 1, generator=generator) * 0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Log-odds of a click."""
        return (torch.tanh(features @ self.first) @ self.second).squeeze(-1)


def run(config: EnsembleConfig, out: Path, *, how: How = How()) -> dict[str, Any]:
    """Train, sample, judge, and write result.json, table.md, a plot and page.html into `out`; the result comes back."""
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as directory:
        train, test = make_data(config)
        found = predictions(config, train, test)
        result = {name: _judged(probabilities, test) for name, probabilities in found.items()}
        draw.reliability(found, test.labels, directory / "reliability.png")
        write_study(
            directory,
            stage="studies.ensemble",
            title="How sure is a ranker?",
            notes=[f"{len(train.labels)} pairs to learn from, {len(test.labels)} to judge by."],
            config=config,
            result=result,
            tables={"On other requests": judged_table(result)},
            plots={"Reliability": directory / "reliability.png"},
        )
    return result


def make_data(config: EnsembleConfig) -> tuple[Data, Data]:
    """Pairs to learn from, and pairs of later requests."""
    made = SyntheticConfig(
        requests=config.train_requests + config.test_requests, topics=config.topics, history=0, seed=config.seed
    )
    requests = generate_requests(made)
    words = sorted({word for request in requests for text in _texts(request) for word in text})
    parts = requests[: config.train_requests], requests[config.train_requests :]
    train, test = (_data(part, words) for part in parts)
    return train, test


def predictions(config: EnsembleConfig, train: Data, test: Data) -> dict[str, Tensor]:
    """Each method's probabilities of a click on the test pairs, and the generator's."""
    num_words = train.features.shape[1]
    single = Nets(1, num_words, config.hidden, config.seed)
    fit(config, single, train)
    deep = Nets(config.members, num_words, config.hidden, config.seed + 1)
    fit(config, deep, train)
    jittered = [_jittered(config, single, test, radius) for radius in RADII]
    return {
        "single": _probabilities(single, test),
        "jitter": min(jittered, key=lambda p: log_loss(p, test.labels, test.requests).value),
        "sgld": sample(config, single, train, test),
        "deep": _probabilities(deep, test),
        "the truth": test.probabilities,
    }


def fit(config: EnsembleConfig, nets: Nets, train: Data) -> None:
    """Bring every network to a mode of the posterior."""
    optimizer = torch.optim.AdamW(nets.parameters(), lr=0.02, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.train_steps)
    for _ in range(config.train_steps):
        optimizer.zero_grad()
        prior = 0.5 * config.prior_precision / len(train.labels) * sum(p.square().sum() for p in nets.parameters())
        (_loss(nets, train) + prior).backward()
        optimizer.step()
        schedule.step()


def sample(config: EnsembleConfig, start: Nets, train: Data, test: Data) -> Tensor:
    """The mean probabilities of networks along one chain of SGLD that begins at `start`."""
    nets = Nets(1, train.features.shape[1], config.hidden, seed=0)
    nets.load_state_dict(start.state_dict())
    sampler = SGLD.from_posterior(
        nets.named_parameters(),
        config.step_size,
        len(train.labels),
        prior_precision=config.prior_precision,
        seed=config.seed,
    )
    burn_in = config.sample_steps // 5
    every = (config.sample_steps - burn_in) // config.members
    total = torch.zeros(len(test.labels))
    for step in range(burn_in + every * config.members):
        sampler.zero_grad()
        _loss(nets, train).backward()
        sampler.step()
        if step >= burn_in and (step - burn_in + 1) % every == 0:
            total += _probabilities(nets, test)
    return total / config.members


def judged_table(result: Mapping[str, Any]) -> Table:
    """One row a method."""
    rows = [
        (
            name,
            *(f"{found[key]:.3f} ({found[f'{key}_low']:.3f} to {found[f'{key}_high']:.3f})" for key in KEYS),
            found["auc"],
        )
        for name, found in result.items()
    ]
    return ("method", "log-loss (95 %)", "calibration error (95 %)", "AUC"), rows


KEYS = ("log_loss", "calibration_error")


def _judged(probabilities: Tensor, test: Data) -> dict[str, float]:
    values: dict[str, float] = {"auc": auc(probabilities.numpy(), test.labels.numpy() > 0.5)}
    intervals = {
        "log_loss": log_loss(probabilities, test.labels, test.requests),
        "calibration_error": calibration_error(probabilities, test.labels, test.requests),
    }
    for key, interval in intervals.items():
        values |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
    return values


def _jittered(config: EnsembleConfig, single: Nets, test: Data, radius: float) -> Tensor:
    copies = Nets(config.members, test.features.shape[1], config.hidden, seed=0)
    for copied, one in zip(copies.parameters(), single.parameters(), strict=True):
        copied.data.copy_(one.data.expand_as(copied))
    # The radius is one network's; the kick is that of all together.
    jitter_(copies.named_parameters(), radius * config.members**0.5, config.seed)
    return _probabilities(copies, test)


def _loss(nets: Nets, data: Data) -> Tensor:
    """Mean over pairs, sum over networks, whose gradients do not mix."""
    logits = nets(data.features)
    return binary_cross_entropy_with_logits(logits, data.labels.expand_as(logits), reduction="none").mean(1).sum()


@torch.no_grad()
def _probabilities(nets: Nets, data: Data) -> Tensor:
    return torch.sigmoid(nets(data.features)).mean(0)


def _texts(request: Request) -> list[list[str]]:
    member = " ".join(request.member.values()).split()
    return [[*member, *" ".join(candidate.item.values()).split()] for candidate in request.candidates]


def _data(requests: Sequence[Request], words: Sequence[str]) -> Data:
    texts = [text for request in requests for text in _texts(request)]
    pairs = [(i, candidate) for i, request in enumerate(requests) for candidate in request.candidates]
    return Data(
        torch.tensor([[float(word in text) for word in words] for text in texts]),
        torch.tensor([float(candidate.label) for _, candidate in pairs]),
        torch.tensor([i for i, _ in pairs]),
        torch.tensor([candidate.probability or 0.0 for _, candidate in pairs]),
    )


if __name__ == "__main__":
    main(EnsembleConfig, run, "ensemble")
