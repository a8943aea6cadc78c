"""Batched sampling over a key-value cache, for any attention-only Hugging Face causal LM.

1. Prompts go longest first; one prompt is prefilled once for all the samples that enter the batch with it.
2. Rows are right-aligned: padding is on the left, so that every row writes its next key into the same column and one
   slice assignment serves the batch. The cache has room to grow; a step copies nothing that is already there.
3. For plain Llama-type models on a CPU a step goes through `lean_decode`, which makes fewer calls.
4. A finished row leaves at once: a row from the end of the batch takes its place in the cache, and columns that are
   padding in every row fall away. Reading the cache is what bounds a step, so nothing in it may be without use.
5. Once an eighth of the places are free, waiting prompts are prefilled and gathered with the batch into a new cache.

Draws come from (seed, prompt index, sample index, position) alone, so a completion does not depend on the batch that
it was made in, up to ties that rounding decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from limbeck.config import checked
from limbeck.errors import ConfigError, ModelError
from limbeck.models.anatomy import causal_lm_of
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.models.cache import Source, empty_cache, gather_rows, shrink
from limbeck.models.lean import can_run
from limbeck.models.lean_decode import next_logits
from limbeck.models.parts import LogitForm
from limbeck.models.probe import ask
from limbeck.models.sampling import choose_tokens

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
PREFILL_TOKENS = 8192
"""Most padded prompt tokens in one forward pass: bounds the activations, not the speed."""


@checked
class SamplingConfig:
    """How completions are drawn."""

    max_new_tokens: int = 512
    """Longest completion in tokens; a row also ends where the model's context ends."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this share of the probability."""
    num_samples: int = 1
    """Completions of each prompt."""
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
    keys: Sequence[int] | None = None,
) -> list[list[Completion]]:
    """Complete every prompt `num_samples` times.

    Args:
      model: a causal LM; it is put into eval mode and back.
      prompts: token ids, none empty.
      config: limits, temperature and seed.
      stop_ids: tokens that end a completion.
      pad_id: any valid token id; padding is masked.
      advance: called with the number of completions that have just ended.
      keys: a number for each prompt that its draws come from; its position by default.
    Returns: for each prompt, in the order given, its samples.
    Raises: ConfigError for an empty prompt or one that fills the context; ModelError for a model with layers other
      than attention.
    """
    rows = _all_rows(prompts, config, _context_tokens(model), keys or range(len(prompts)))
    _refuse_other_layers(model)
    waiting = deque(sorted(rows, key=lambda row: len(row.prompt), reverse=True))
    device = next(model.parameters()).device
    batch: _Batch | None = None
    with _decoding(model), torch.inference_mode():
        is_lean = _is_lean(model)
        decoder = _Decoder(model, config, frozenset(stop_ids), pad_id, advance or (lambda _: None), device, is_lean)
        while waiting or batch is not None:
            free = config.batch_size - (0 if batch is None else len(batch.rows))
            if waiting and 8 * free >= config.batch_size:
                admitted = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                parts = [] if batch is None else [batch]
                batch = _gather(parts + [decoder.prefill(group) for group in _prefill_groups(admitted)])
            elif batch is not None:
                decoder.step(batch)
            batch = _retire(batch)
    done = [Completion(row.token_ids, row.stopped) for row in rows]
    return [done[start : start + config.num_samples] for start in range(0, len(done), config.num_samples)]


@dataclass(slots=True)
class _Row:
    """One completion in the making."""

    prompt_index: int
    prompt: Sequence[int]
    limit: int
    key: tuple[int, int, int]
    uniforms: np.ndarray | None = None
    token_ids: list[int] = field(default_factory=list)
    stopped: bool = False

    @property
    def is_finished(self) -> bool:
        return self.stopped or len(self.token_ids) >= self.limit

    def draw_uniforms(self) -> None:
        # A longer limit only appends draws: how a completion begins does not depend on max_new_tokens.
        self.uniforms = np.random.Generator(np.random.PCG64(self.key)).random(self.limit)


@dataclass(slots=True)
class _Batch:
    """Rows that are decoded together: R of them, their cache, and their left padding in its columns."""

    rows: list[_Row]
    cache: Cache
    padding: Tensor
    next_ids: Tensor


@dataclass(slots=True)
class _Decoder:
    """The model with what every forward pass needs."""

    model: nn.Module
    config: SamplingConfig
    stop_ids: frozenset[int]
    pad_id: int
    advance: Callable[[int], Any]
    device: torch.device
    is_lean: bool
    """Whether a step goes through `lean_decode`."""

    def prefill(self, rows: list[_Row]) -> _Batch:
        """Read the prompts, each once, and draw every row's first token. The first prompt is the longest."""
        prompts = [list(group) for _, group in groupby(rows, key=lambda row: row.prompt_index)]
        width = len(rows[0].prompt)
        ids = [[self.pad_id] * (width - len(group[0].prompt)) + list(group[0].prompt) for group in prompts]
        padding = torch.tensor([width - len(group[0].prompt) for group in prompts], device=self.device)
        cache = empty_cache()
        logits = self._forward(torch.tensor(ids, device=self.device), padding, cache)
        copies = torch.tensor([index for index, group in enumerate(prompts) for _ in group], device=self.device)
        if len(copies) > len(prompts):
            cache = gather_rows([Source(cache, copies, width)])
            logits, padding = logits[copies], padding[copies]
        if self.config.temperature > 0:
            for row in rows:
                row.draw_uniforms()
        return _Batch(rows, cache, padding, self._append(rows, logits))

    def step(self, batch: _Batch) -> None:
        """One more token for every row."""
        forward = self._lean_forward if self.is_lean else self._forward
        logits = forward(batch.next_ids, batch.padding, batch.cache)
        batch.next_ids = self._append(batch.rows, logits)

    def _forward(self, input_ids: Tensor, padding: Tensor, cache: Cache) -> Tensor:
        seen = cache.get_seq_length() if len(cache) else 0
        columns = torch.arange(seen + input_ids.shape[1], device=self.device)
        positions = (columns[seen:] - padding[:, None]).clamp(min=0)
        output = self.model(
            input_ids=input_ids,
            attention_mask=columns >= padding[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _lean_forward(self, input_ids: Tensor, padding: Tensor, cache: Cache) -> Tensor:
        return next_logits(causal_lm_of(self.model), input_ids, padding, cache)

    def _append(self, rows: list[_Row], logits: Tensor) -> Tensor:
        uniforms = None
        if self.config.temperature > 0:
            draws = [row.uniforms[len(row.token_ids)] for row in rows if row.uniforms is not None]
            uniforms = torch.tensor(draws, dtype=torch.float64, device=self.device)
        chosen = choose_tokens(logits, uniforms, self.config.temperature, self.config.top_p)
        ended = 0
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.token_ids.append(token)
            row.stopped = token in self.stop_ids
            if row.is_finished:
                row.uniforms = None
                ended += 1
        if ended:
            self.advance(ended)
        return chosen[:, None]


def _retire(batch: _Batch | None) -> _Batch | None:
    """The rows still alive, in place: the last of them move into the places of finished ones."""
    if batch is None or not any(row.is_finished for row in batch.rows):
        return batch
    alive = [index for index, row in enumerate(batch.rows) if not row.is_finished]
    if not alive:
        return None
    holes = [index for index in range(len(alive)) if batch.rows[index].is_finished]
    order = list(range(len(alive)))
    for hole, moved in zip(holes, alive[len(alive) - len(holes) :], strict=True):
        order[hole] = moved
    padding = batch.padding[order]
    empty = int(padding.min())
    shrink(batch.cache, holes, [order[hole] for hole in holes], len(alive), empty)
    return _Batch([batch.rows[index] for index in order], batch.cache, padding - empty, batch.next_ids[order])


def _gather(parts: list[_Batch]) -> _Batch:
    """One batch of all rows, right-aligned."""
    if len(parts) == 1:
        return parts[0]
    widths = [part.cache.get_seq_length() for part in parts]
    sources = [
        Source(part.cache, torch.arange(len(part.rows), device=part.padding.device), width)
        for part, width in zip(parts, widths, strict=True)
    ]
    return _Batch(
        [row for part in parts for row in part.rows],
        gather_rows(sources),
        torch.cat([part.padding + max(widths) - width for part, width in zip(parts, widths, strict=True)]),
        torch.cat([part.next_ids for part in parts]),
    )


def _all_rows(
    prompts: Sequence[Sequence[int]], config: SamplingConfig, context: int, keys: Sequence[int]
) -> list[_Row]:
    rows = []
    for index, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
        if not 0 < len(prompt) < context:
            raise ConfigError(
                f"prompt {index} has {len(prompt)} tokens; expected at least 1 and fewer than the {context} tokens of "
                "the model's context."
            )
        limit = min(config.max_new_tokens, context - len(prompt))
        rows += [_Row(index, prompt, limit, (config.seed, key, sample)) for sample in range(config.num_samples)]
    return rows


def _prefill_groups(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Cut rows, longest prompt first, so that the distinct prompts of a group fill PREFILL_TOKENS at most, padded."""
    group: list[_Row] = []
    distinct = 0
    for row in rows:
        is_new = not group or row.prompt_index != group[-1].prompt_index
        if is_new and group and (distinct + 1) * len(group[0].prompt) > PREFILL_TOKENS:
            yield group
            group, distinct = [], 0
        group.append(row)
        distinct += is_new
    if group:
        yield group


@contextmanager
def _decoding(model: nn.Module) -> Iterator[None]:
    """Eval mode, and an attention that reads the mask; both as before afterwards."""
    config: Any = causal_lm_of(model).config
    was_training, attention = model.training, config._attn_implementation
    model.eval()
    if attention == PACKED_ATTENTION:
        config._attn_implementation = ask(model).attention
    try:
        yield
    finally:
        model.train(was_training)
        config._attn_implementation = attention


def _is_lean(model: nn.Module) -> bool:
    """Whether the lean step computes what the model does: a plain float32 Llama on a CPU with a plain head."""
    lm = causal_lm_of(model)
    if not (hasattr(lm, "model") and can_run(lm.model)):
        return False
    return ask(model).is_lean and ask(model).form == LogitForm()


def _context_tokens(model: nn.Module) -> int:
    config: Any = causal_lm_of(model).config
    return getattr(config, "max_position_embeddings", None) or 2**31


def _refuse_other_layers(model: nn.Module) -> None:
    lm = causal_lm_of(model)
    others = set(getattr(lm.config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        raise ModelError(
            f"{type(lm).__name__} has {', '.join(sorted(others))} layers; the sampler keeps a cache for attention "
            "layers only."
        )
