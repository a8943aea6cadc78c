"""What the endpoints share: the model's names, its tokenizer, the engine, limits and counters."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path
from typing import Any

from limbeck.checkpoint import MANIFEST, Checkpoint
from limbeck.config import build
from limbeck.engine.backends import load_decoder
from limbeck.engine.budget import Budget
from limbeck.engine.drafter import make_drafter
from limbeck.engine.embedding import Pooling, pooling_of
from limbeck.engine.generation import Generator
from limbeck.engine.requests import label_ids
from limbeck.engine.scoring import Scorer
from limbeck.errors import ModelError
from limbeck.models.load import load_tokenizer, locate, model_hash, stated_ends
from limbeck.ranking.data import training_of
from limbeck.ranking.featurize import FeaturizeConfig
from limbeck.serve.config import ServeConfig
from limbeck.serve.dispatch import Dispatcher
from limbeck.serve.forms import Forms
from limbeck.serve.metrics import Metrics
from limbeck.serve.ranking import GENERAL, trained
from limbeck.serve.threads import Threads
from limbeck.serve.tokenizing import BatchTokenizer
from limbeck.serve.vocabulary import Vocabulary
from limbeck.serve.worker import Worker

LABELS = (" yes", " no")
JOIN_SECONDS = 5.0
"""For the round under way when the server ends."""


class Service:
    """Made before the event loop runs; `start` and `stop` are called on it."""

    def __init__(self, config: ServeConfig) -> None:
        """Loads the model. Raises: ModelError."""
        self.config, self.limits = config, config.limits
        self.name = config.name or config.model
        self.created = int(time.time())
        self.tokenizer = load_tokenizer(config.model)
        self.decoder = load_decoder(config.model, config.precision, config.context_tokens)
        self.budget = Budget(config.limits.memory_bytes, "limits.memory_bytes")
        self.scorer = Scorer(self.decoder, config.scoring, model_hash(config.model), budget=self.budget)
        block, kernels = config.scoring.block_tokens, config.generation.kernels
        drafter = make_drafter(config.speculative, config.model, self.decoder, block, kernels, self.budget)
        self.generator = Generator(self.decoder, self.scorer.cache, config.generation, drafter, self.budget)
        self.vocabulary = Vocabulary(self.tokenizer, stated_ends(config.model, self.decoder.config))
        self.features = _trained_features(config.model)
        self.rank_prompt = GENERAL if self.features is None else trained(self.features)
        self.labels = self._label_ids()
        self.pooling: Pooling | None = None
        self.no_pooling = ""
        """Why the model has no vectors of texts."""
        try:
            self.pooling = pooling_of(config.model, self.decoder)
        except ModelError as error:
            self.no_pooling = str(error)
        self.forms = Forms(self.tokenizer, self.decoder.vocab_size, self.limits, self.budget)
        self.metrics = Metrics(self.name, self._gauges, self._totals)

    def start(self) -> None:
        """Start the engine's thread."""
        self.threads = Threads()
        self.texts = BatchTokenizer(self.tokenizer, self.threads)
        self.forms.start()
        self.worker = Worker(self.scorer, self.generator, self.config, asyncio.get_running_loop())
        self.dispatcher = Dispatcher(self.worker, self.limits, self.metrics)
        self.worker.start()
        gc.collect()
        gc.freeze()  # else each collection that a large body sets off goes through the libraries' objects as well

    async def stop(self) -> None:
        """End it."""
        gc.unfreeze()
        self.worker.stop()
        await self.forms.stop()
        await asyncio.to_thread(self.worker.join, JOIN_SECONDS)
        self.threads.close()

    def _label_ids(self) -> tuple[int, ...] | None:
        """Of requests that name none; None where the tokenizer has no such tokens and nobody asked for them."""
        asked = self.config.labels or (self.features and self.features.labels)
        try:
            return tuple(label_ids(self.tokenizer, asked or LABELS))
        except ModelError:
            if asked:
                raise
            return None

    def _gauges(self) -> dict[str, float | list[float]]:
        cache, speculation = self.scorer.cache_stats(), self.generator.speculation
        return {
            "vllm:num_requests_running": self.dispatcher.running,
            "vllm:num_requests_waiting": self.dispatcher.waiting,
            "vllm:kv_cache_usage_perc": self.generator.usage,
            "limbeck:memory_bytes": self.budget.used_bytes,
            "limbeck:prefix_cache_bytes": cache.used_bytes,
            "limbeck:spec_decode_acceptance": speculation.acceptance,
            "limbeck:spec_decode_mean_length": speculation.mean_length,
        }

    def _totals(self) -> dict[str, float | list[float]]:
        cache, speculation = self.scorer.cache_stats(), self.generator.speculation
        return {
            "vllm:prefix_cache_queries": cache.queried_tokens,
            "vllm:prefix_cache_hits": cache.hit_tokens,
            "limbeck:prefix_cache_evicted_blocks": cache.evicted_blocks,
            "vllm:spec_decode_num_drafts": speculation.drafts,
            "vllm:spec_decode_num_draft_tokens": speculation.draft_tokens,
            "vllm:spec_decode_num_accepted_tokens": speculation.accepted_tokens,
            "vllm:spec_decode_num_accepted_tokens_per_pos": list(speculation.accepted_at),
            "limbeck:spec_decode_skipped_tokens": speculation.skipped_tokens,
        }


def _trained_features(model: str) -> FeaturizeConfig | None:
    """How a ranking model's requests are written, by the manifest beside it; None for any other model."""
    place = locate(model)
    if not place.is_local or not (Path(place.path) / MANIFEST).is_file():
        return None
    tree: Any = training_of(Checkpoint(Path(place.path))).get("features")
    return build(FeaturizeConfig, tree, f"{model}/{MANIFEST}: features") if isinstance(tree, dict) else None
