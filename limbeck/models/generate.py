"""Batched sampling over a key-value cache, for any attention-only Hugging Face causal LM.

1. Prompts go longest first; one prompt is prefilled once for all the samples that enter the batch with it.
2. Rows are right-aligned: padding is on the left, so that every row writes its next key into the same column and one
   slice assignment serves the batch. The cache has room to grow; a step copies nothing that is already there.
3. A finished row stays until an eighth of the batch has finished. Then the survivors are gathered together with newly
   prefilled prompts into one cache, and columns that are padding in every row are cut off.

Draws come from (seed, prompt index, sample index, position) alone, so a completion does not depend on the batch that
it was made in, up to ties that rounding decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from limbeck.errors import ConfigError, ModelError
from limbeck.models.anatomy import causal_lm_of
from limbeck.models.attention import PACKED_ATTENTION

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
PREFILL_TOKENS = 8192
"""Most padded prompt tokens in one forward pass: bounds the activations, not the speed."""
NUCLEUS_CANDIDATES = 512
"""Tokens that top-p sorts before it falls back to the whole vocabulary; enough for nearly every step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How completions are drawn."""

    max_new_tokens: int = 512
    """Longest completion in tokens; a row also ends where the model's context ends."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this share of the probability."""
    num_samples: int = 1
    """Completions a prompt."""
    batch_size: int = 128
    """Sequences decoded at once."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; found {getattr(self, name)}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or more; found {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must lie in (0, 1]; found {self.top_p}")
        if self.temperature == 0.0 and self.num_samples > 1:
            raise ConfigError("num_samples above 1 needs a temperature above 0: greedy samples are all the same")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more; found {self.seed}")


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote after one prompt."""

    token_ids: list[int]
    """The new tokens, with the stop token when there is one."""
    stopped: bool
    """True when the last token is a stop token; False when the length limit ended it."""

    @property
    def text_ids(self) -> list[int]:
        """The new tokens without the stop token: what to decode."""
        return self.token_ids[:-1] if self.stopped else self.token_ids


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    stop_ids: Sequence[int],
    pad_id: int,
    advance: Callable[[int], Any] | None = None,
) -> list[list[Completion]]:
    """Complete every prompt `num_samples` times.

    Args:
      model: a causal LM; it is put into eval mode and back.
      prompts: token ids, none empty.
      config: limits, temperature and seed.
      stop_ids: tokens that end a completion.
      pad_id: any valid token id; padding is masked.
      advance: called with the number of completions that have just ended.
    Returns: for each prompt, in the order given, its samples.
    Raises: ConfigError for an empty prompt or one that fills the context; ModelError for a model with layers other
      than attention.
    """
    context = _checked_context(model, prompts)
    rows = _all_rows(prompts, config, context)
    waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
    decoder = _Decoder(model, config, frozenset(stop_ids), pad_id)
    batch: _Batch | None = None
    with _decoding(model), torch.inference_mode():
        while waiting or batch is not None:
            alive = [] if batch is None else batch.alive()
            admitted = [waiting.popleft() for _ in range(min(len(waiting), config.batch_size - len(alive)))]
            parts = [] if batch is None else [batch]
            parts += [decoder.prefill(group) for group in _prefill_groups(admitted)]
            batch = _gather(parts)
            while batch is not None and batch.num_finished * 8 < len(batch.rows):
                decoder.step(batch)
                if advance is not None and batch.num_finished:
                    pass
    return _collect(rows, len(prompts), config.num_samples)
