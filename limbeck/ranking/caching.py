"""The stage `rank cache`: what a teacher says behind every pair, on disk, for `teacher.cache` of rank train."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from limbeck.checkpoint import Checkpoint
from limbeck.config import completed_by
from limbeck.errors import ConfigError
from limbeck.models.load import load_tokenizer
from limbeck.ranking.data import RankingDataConfig, read_requests
from limbeck.ranking.examples import pair_examples
from limbeck.ranking.featurize import FeaturizeConfig, encode_requests
from limbeck.ranking.train import completed
from limbeck.stage import How
from limbeck.teacher.build import write_cache
from limbeck.teacher.cache import CacheConfig
from limbeck.teacher.shard import Stored


@completed_by(completed)
class RankCacheConfig:
    """Whose words behind which pairs are stored."""

    teacher: str
    """Directory, alias or hub id of the teacher; the students that read the cache have its tokenizer."""
    data: RankingDataConfig
    """What is ranked: the pairs of the training and the validation part are stored."""
    features: FeaturizeConfig = field(default_factory=FeaturizeConfig)
    """How requests become text; runs that read the cache must write them in the same way."""
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(mode="hidden"))
    """What is kept at a position: hidden states, or entries that have to hold both labels."""

    def __post_init__(self) -> None:
        if self.cache.privileged:
            raise ConfigError("cache.privileged shows solutions of traces, and candidates have none; leave it out")


def run(config: RankCacheConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Bring the cache in `out` to hold all pairs; a call that was interrupted goes on."""
    split, _ = read_requests(config.data)
    requests = [*split.train, *split.validation]
    encoded, labels = encode_requests(requests, load_tokenizer(config.teacher), config.features)
    pairs = [pair for request in encoded for pair in pair_examples(request, labels)]
    asked = [Stored(pair.sample.input_ids, pair.kd_weight > 0) for pair in pairs]
    write_cache(config.teacher, config.cache, asked, out, config, how.on)
    return Checkpoint(out)
