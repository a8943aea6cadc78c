"""Requests with a known click probability, so that the best reachable AUC is known.

A member has an affinity u_t in {-1, 0, 1} to each of K topics; an item is about `topics_per_item` of them, and has a
quality q in {-1, 0, 1}. A click has the probability

    p = sigmoid(bias + affinity_scale / sqrt(topics_per_item) * sum of u_t over the item's topics + quality_scale * q)

Both vectors are written as words, one a coordinate that is not 0 ("lovesjazz", "hateswar"), so p is a function of the
text and a model can reach it. The quality alone is an easy main effect; the rest is a lookup in the member's profile.
With `show_member` off the profile is left out, and only the history tells of it: then no score reaches the bound.
"""

from __future__ import annotations

import math

import numpy as np

from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.ranking.interaction import Features, Interaction, Request

TOPICS = ("jazz", "war", "chess", "space", "food", "crime", "dance", "horse", "ocean", "robot", "opera", "magic")
_TASTES = {-1: "hates", 1: "loves"}
_QUALITIES = {-1: "poor", 0: "fair", 1: "great"}


@checked
class SyntheticConfig:
    """The generator."""

    requests: int = 1000
    """Number of requests."""
    members: int = 200
    """Number of members; each request is of one drawn at random."""
    items: int = 200
    """Number of items; the candidates of a request are different ones."""
    candidates: int = 8
    """Candidates of a request."""
    history: int = 4
    """Events of a history, drawn from the same model before the request; the first requests of a member have fewer."""
    topics: int = 4
    """Topics K, at most 12."""
    topics_per_item: int = 1
    """Topics of an item, at most K."""
    bias: float = -0.5
    """Log-odds of a click where nothing speaks for or against it."""
    affinity_scale: float = 2.5
    """Weight of the member's affinity to the item."""
    quality_scale: float = 1.0
    """Weight of the item's quality."""
    show_member: bool = True
    """Whether the profile tells the affinities."""
    seed: int = 0
    """Seed of members, items, requests and labels."""

    def __post_init__(self) -> None:
        for name in ("requests", "members", "items", "candidates", "topics", "topics_per_item"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; found {getattr(self, name)}")
        if self.history < 0:
            raise ConfigError(f"history must be at least 0; found {self.history}")
        if self.topics > len(TOPICS) or self.topics_per_item > self.topics:
            raise ConfigError(
                f"topics {self.topics} and topics_per_item {self.topics_per_item}: expected at most {len(TOPICS)}, and "
                "no more per item than there are"
            )
        if self.candidates > self.items:
            raise ConfigError(f"candidates {self.candidates} are more than the items, {self.items}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be in 0 to 2^32 - 1; found {self.seed}")


def generate_requests(config: SyntheticConfig) -> list[Request]:
    """Requests in the order of their time, each candidate with its click probability."""
    rng = np.random.default_rng(config.seed)
    affinities = rng.integers(-1, 2, (config.members, config.topics))
    about = np.zeros((config.items, config.topics))
    for item in about:
        item[rng.choice(config.topics, config.topics_per_item, replace=False)] = 1
    quality = rng.integers(-1, 2, config.items)
    logits = config.bias + config.quality_scale * quality
    logits = logits + config.affinity_scale / math.sqrt(config.topics_per_item) * affinities @ about.T
    probabilities = 1 / (1 + np.exp(-logits))
    items = [_item(about[i], int(quality[i])) for i in range(config.items)]
    pasts: dict[int, list[Interaction]] = {}
    requests = []
    for number in range(config.requests):
        member = int(rng.integers(config.members))
        shown = rng.choice(config.items, config.candidates, replace=False)
        clicked = rng.random(config.candidates) < probabilities[member, shown]
        candidates = tuple(
            Interaction(
                item_id=str(item),
                item=items[item],
                label=bool(label),
                time=float(number),
                probability=float(probabilities[member, item]),
            )
            for item, label in zip(shown.tolist(), clicked, strict=True)
        )
        past = pasts.setdefault(member, [])
        requests.append(
            Request(
                request_id=str(number),
                member_id=str(member),
                member=_member(affinities[member]) if config.show_member else {},
                time=float(number),
                history=tuple(past[-config.history :]) if config.history else (),
                candidates=candidates,
            )
        )
        past.extend(candidates)
    return requests


def _member(affinity: np.ndarray) -> Features:
    words = [_TASTES[int(value)] + TOPICS[topic] for topic, value in enumerate(affinity) if value]
    return {"tastes": " ".join(words) or "none"}


def _item(about: np.ndarray, quality: int) -> Features:
    return {"quality": _QUALITIES[quality], "about": " ".join(TOPICS[topic] for topic in np.flatnonzero(about))}
