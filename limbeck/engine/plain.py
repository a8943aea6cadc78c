"""The back end for any architecture: transformers' own forward, which is slower.

How much it can save is asked of the model, on two short random texts against their plain forward:

1. keys: every layer keeps keys and values of one shape. Texts are run together, their pasts aligned at the right, and
   keep them as `KeyValues`, so that prefixes are shared as everywhere.
2. cache: each text has the model's own cache, whatever is in it (states of mixers, windows), a token at a time.
3. whole: nothing can be gone on from. Each step reads the text from its start.

What stands behind a token are its logits, as transformers gives them.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from limbeck.engine.states import KeyValues, Segment, check_segment
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.models.parts import causal_lm_of
from limbeck.models.probe import ask

Way = Literal["keys", "cache", "whole"]
PASS_TOKENS = 8192
"""Most padded tokens in one forward pass: bounds the activations."""
PROBED_TOKENS = (23, 9)
TOLERANCE = 1e-3
"""Of logits, over the largest of them."""


class Text:
    """A text and the model's own cache of it, if it has one."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.cache: Any = None
        """Of all tokens."""


class PlainDecoder:
    """A causal language model by its own forward; see `Backend`."""

    def __init__(self, model: Any, max_tokens: int = 32768) -> None:
        self.model = causal_lm_of(model)
        self.config = self.model.config
        text = self.config.get_text_config()
        self.context: int = getattr(text, "max_position_embeddings", None) or 2**31
        self.max_tokens = min(max_tokens, self.context)
        self.embeddings: int = self.model.get_input_embeddings().weight.shape[0]
        self._known = frozenset(inspect.signature(self.model.forward).parameters)
        self.device = self.model.get_input_embeddings().weight.device
        logits, cache = self._call([[0, 0]], None)
        self.vocab_size: int = logits.shape[-1]
        self.dtype = logits.dtype
        layers = _layers_of(cache)
        self.layers, is_even = len(layers), len({layer.keys.shape for layer in layers}) == 1
        if is_even:
            self.dtype = layers[0].keys.dtype
            _, self.key_heads, _, self.head_size = layers[0].keys.shape
        if self.model not in _ways:
            ways: list[Way] = ["keys", "cache"] if is_even else ["cache"]
            # Where padding changes results, what a token's key is depends on the length of the text behind it.
            ways = ways if ask(self.model).pads else []
            _ways[self.model] = next(filter(self._agrees, ways), "whole")
        self.way = _ways[self.model]
        self.has_blocks = self.way == "keys"

    @property
    def is_int8(self) -> bool:
        """Never."""
        return False

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, where they are kept as such."""
        return 2 * self.dtype.itemsize * self.layers * self.key_heads * self.head_size if self.has_blocks else 0

    def states(self, tokens: int) -> Any:
        """Room for a text."""
        return KeyValues(self, tokens) if self.way == "keys" else Text()

    def behind(self, states: Any, room: int) -> Any:
        """Room for tokens behind a prompt, whose states are copied."""
        if not isinstance(states, KeyValues):
            return copy.deepcopy(states)
        found = KeyValues(self, states.room + room)
        found.put(0, states.keys, states.values)
        return found

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment], every_row: bool = False) -> Tensor:
        """Logits [S V] behind each segment, or behind each token; see `Backend`."""
        for segment in segments:
            check_segment(segment, self.max_tokens, self.embeddings)
        found: list[Tensor | None] = [None] * len(segments)
        for numbers in self._batches(segments):
            batch = [segments[number] for number in numbers]
            rows = self._run_together(batch, every_row) if self.way == "keys" else self._run_alone(batch, every_row)
            for number, row in zip(numbers, rows, strict=True):
                found[number] = row
        return torch.cat([rows for rows in found if rows is not None])

    def logits(self, hidden: Tensor) -> Tensor:
        """They are what `run` returns."""
        return hidden

    def label_logits(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Logits [S C] of C tokens."""
        return hidden[:, labels]

    def log_normalizers(self, hidden: Tensor) -> Tensor:
        """Log-sum-exp [S] of all logits."""
        return hidden.logsumexp(1)

    def _batches(self, segments: Sequence[Segment]) -> Iterator[list[int]]:
        """Segments of one length that do not wait for each other; what grows a text comes in order, and first."""
        ranks: dict[int, int] = {}
        groups: dict[tuple[bool, int, int], list[int]] = {}
        for number, segment in sorted(enumerate(segments), key=lambda pair: pair[1].start):
            rank = ranks.get(id(segment.prefix), 0)
            if segment.grows:
                ranks[id(segment.prefix)] = rank + 1
            groups.setdefault((not segment.grows, rank if segment.grows else 0, len(segment.tokens)), []).append(number)
        for _, numbers in sorted(groups.items()):
            width = max(segments[number].start + len(segments[number].tokens) for number in numbers)
            size = max(1, PASS_TOKENS // width)
            yield from (numbers[first : first + size] for first in range(0, len(numbers), size))

    def _run_together(self, batch: Sequence[Segment], every_row: bool) -> Iterator[Tensor]:
        logits, cache = self._call([segment.tokens for segment in batch], batch, every_row)
        own = len(batch[0].tokens)
        keys = torch.stack([layer.keys[:, :, -own:] for layer in cache.layers], 1)
        values = torch.stack([layer.values[:, :, -own:] for layer in cache.layers], 1)
        for row, segment in enumerate(batch):
            if segment.grows and segment.prefix is not None:
                segment.prefix.put(segment.start, keys[row], values[row])
        yield from logits

    def _run_alone(self, batch: Sequence[Segment], every_row: bool) -> Iterator[Tensor]:
        for tokens, text, start, grows in batch:
            text = Text() if text is None else text
            goes_on = text.cache is not None and grows and len(tokens) == 1 and start == len(text.tokens)
            whole = [*text.tokens[:start], *tokens]
            logits, cache = self._call([tokens if goes_on else whole], text.cache if goes_on else None, every_row)
            if grows:
                text.tokens, text.cache = whole, cache if self.way == "cache" else None
            yield logits[0, -len(tokens) :]

    @torch.inference_mode()
    def _call(
        self, ids: Sequence[Sequence[int]], past: Sequence[Segment] | Any | None, every_row: bool = False
    ) -> tuple[Tensor, Any]:
        """Logits [R n or 1 V] of R rows of n tokens behind what they have seen, and the cache."""
        given: dict[str, Any] = {"input_ids": torch.tensor(ids, device=self.device), "use_cache": True}
        if isinstance(past, Sequence):
            seen = torch.tensor([segment.start for segment in past], device=self.device)
            width = int(seen.max())
            columns = torch.arange(width + len(ids[0]), device=self.device)
            given["past_key_values"] = self._aligned(past, width)
            given["attention_mask"] = columns >= width - seen[:, None]
            given["position_ids"] = columns[width:] - (width - seen[:, None])
        elif past is not None:
            given["past_key_values"] = past
        if not every_row and "logits_to_keep" in self._known:
            given["logits_to_keep"] = 1
        with _decoding(self.model):
            output = self.model(**{name: value for name, value in given.items() if name in self._known})
        logits = output.logits.float()
        return logits if every_row else logits[:, -1:], getattr(output, "past_key_values", None)

    def _aligned(self, batch: Sequence[Segment], width: int) -> Cache:
        """What the rows have seen, its end at the right; zeros before it, since 0 times a stray NaN would be NaN."""
        layers = []
        for number in range(self.layers):
            layer = DynamicLayer()
            shape = (len(batch), self.key_heads, width, self.head_size)
            layer.keys, layer.values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
            for whole, name in ((layer.keys, "keys"), (layer.values, "values")):
                seen = [(row, s) for row, s in enumerate(batch) if s.prefix is not None and s.start]
                if seen:
                    torch._foreach_copy_(
                        [whole[row, :, width - s.start :] for row, s in seen],
                        [getattr(s.prefix, name)[number, :, : s.start] for _, s in seen],
                    )
            layers.append(layer)
        return Cache(layers=layers)

    def _agrees(self, way: Way) -> bool:
        """Whether two texts that are read in pieces, the one beside the other, have their plain logits."""
        self.way = way
        random = torch.Generator().manual_seed(0)
        texts = [torch.randint(self.embeddings, (length,), generator=random).tolist() for length in PROBED_TOKENS]
        try:
            truth = [self._call([text], None, every_row=True)[0][0] for text in texts]
            found = self._in_pieces(texts)
        except Exception:  # whatever the model says, it cannot be run in this way
            return False
        expected = torch.cat([torch.stack([rows[step - 6] for rows in truth]) for step in range(6)])
        gap = float((found - expected).abs().max())
        return gap <= TOLERANCE * max(float(rows.abs().max()) for rows in truth)

    def _in_pieces(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logits behind each text without its last five tokens, then behind each of those."""
        states = [self.states(len(text)) for text in texts]
        heads = [len(text) - 5 for text in texts]
        whole = list(zip(texts, states, heads, strict=True))
        found = [self.run([Segment(text[:head], state, 0, True) for text, state, head in whole])]
        for step in range(5):
            found.append(self.run([Segment([t[h + step]], s, h + step, True) for t, s, h in whole]))
        return torch.cat(found)


_ways: weakref.WeakKeyDictionary[Any, Way] = weakref.WeakKeyDictionary()
"""Of models that were asked: those of a training run are asked once."""


def _layers_of(cache: Any) -> list[Any]:
    """The layers of a cache of keys and values alone; none of another one."""
    layers = list(getattr(cache, "layers", ()))
    return layers if all(isinstance(layer, DynamicLayer) and layer.keys is not None for layer in layers) else []


@contextmanager
def _decoding(model: Any) -> Iterator[None]:
    """Eval mode, and an attention that reads the mask; both as before afterwards."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention == PACKED_ATTENTION:
        model.config._attn_implementation = ask(model).attention
    try:
        yield
    finally:
        model.train(was_training)
        model.config._attn_implementation = attention
