"""The lean decoder: prefill passes over segments of tokens, each behind keys that other passes have left.

A pass takes any number of segments in one row of tokens. A segment attends to the keys before it and to itself, never
to another one, so positions restart at will and masked blocks are not computed. Segments that grow a prefix leave their
keys and values there, for later segments of the same pass as well.

Bits: with int8 linear layers, a segment's result depends on its tokens and on the keys before it only, not on what
else is in the pass. Each step holds that: int8 products are exact in integers, attention is a product a segment, and
all else goes row by row or element by element. In float32 the linear layers are BLAS products, which differ in their
last bits with the number of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.engine.attention import attend, attend_last
from limbeck.engine.int8 import Int8Linear
from limbeck.engine.states import KeyValues, Segment, check_segment
from limbeck.engine.weights import LayerWeights, Linear, Weights
from limbeck.models.ops import rotate_alike_, unit_of

SERIAL_ELEMENTS = 32767
"""torch splits larger element-wise work among threads, at places that are no multiple of its vectors; what is left
there goes through scalar code, whose exp differs in the last bit."""


class _Group(NamedTuple):
    """Segments of one length behind the same keys; their rows stand behind one another."""

    first: int
    """Row of the first token."""
    segments: int
    length: int
    like: Segment

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.segments * self.length)


class _Steps(NamedTuple):
    """Single tokens that grow a prefix each, as decoding has them: views of their keys and values, made once a pass.

    Each is a product of its own, over what it sees and no more; with small models the calls around it are what costs.
    """

    places: list[list[Tensor]]
    """For each layer where the tokens' keys go, [N_kv H] each, then where their values go."""
    seen: list[list[tuple[Tensor, Tensor]]]
    """For each layer keys and values [1 N_kv S H] up to each token's own."""

    def write(self, key: Tensor, value: Tensor, number: int) -> None:
        """Keep keys and values [n N_kv H] of a layer."""
        if self.seen[number]:
            torch._foreach_copy_(self.places[number], [*key.unbind(0), *value.unbind(0)])


class _Layout(NamedTuple):
    """Where the segments stand in the row of tokens."""

    tokens: Tensor
    positions: Tensor
    rows: Tensor
    """int64: rows to return, in the order of the segments."""
    steps: _Steps
    """Its tokens are the first rows."""
    groups: list[_Group]


class Decoder:
    """A causal language model for prefill."""

    def __init__(self, weights: Weights) -> None:
        config = weights.config
        self.weights, self.config = weights, config
        self.context: int = config.max_position_embeddings
        self.has_blocks = True
        self.layers = len(weights.blocks)
        self.dtype, self.device = weights.head.dtype, weights.head.device
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.epsilon: float = config.rms_norm_eps
        self.max_tokens = len(weights.ropes[0][0])
        self.vocab_size = len(weights.head)
        self.embeddings: int = weights.embed.num_embeddings
        """Token ids that may stand in a prompt."""

    @property
    def is_int8(self) -> bool:
        """Whether the linear layers are."""
        return isinstance(self.weights.blocks[0].qkv, Int8Linear)

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, all layers."""
        return 2 * self.dtype.itemsize * self.layers * self.key_heads * self.head_size

    def states(self, tokens: int) -> KeyValues:
        """Room for the keys and values of a text."""
        return KeyValues(self, tokens)

    def behind(self, states: KeyValues, room: int) -> KeyValues:
        """Room for tokens behind a prompt, whose states are copied: a step reads what lies in one piece."""
        found = KeyValues(self, states.room + room)
        found.put(0, states.keys, states.values)
        return found

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment], every_row: bool = False) -> Tensor:
        """One forward pass.

        Args:
          segments: in any order, but that a grown prefix is whole up to `start` by this pass or before.
          every_row: return every token's state, not the last one's of each segment.
        Returns: [S D] hidden states behind the final norm, in the order of the segments; [sum of lengths, D].
        Raises: ModelError for prompts beyond `max_tokens`, ids beyond the vocabulary, and empty segments.
        """
        layout = self._layout(segments, every_row)
        x = self.weights.embed(layout.tokens)
        turns = [(cos[layout.positions], sin[layout.positions]) for cos, sin in self.weights.ropes]
        last = len(self.weights.blocks) - 1
        for number, block in enumerate(self.weights.blocks):
            attended = self._attention(self.normed(x, block.attention_norm), block, number, turns[block.rope], layout)
            if number == last:  # behind its attention, only what is returned
                x, attended = x[layout.rows], attended[layout.rows]
            x = self.feed_forward(self.added(x, block.output(attended), block.attention_out_norm), block)
        return self.normed(x, self.weights.norm)

    def _layout(self, segments: Sequence[Segment], every_row: bool) -> _Layout:
        for segment in segments:
            check_segment(segment, self.max_tokens, self.embeddings)
        order = sorted(range(len(segments)), key=lambda i: (not _is_step(segments[i]), *_kind(segments[i])))
        ordered = [segments[i] for i in order]
        ids = [token for segment in ordered for token in segment.tokens]
        positions = itertools.chain.from_iterable(range(s.start, s.start + len(s.tokens)) for s in ordered)
        ends = dict(zip(order, itertools.accumulate(len(segment.tokens) for segment in ordered), strict=True))
        rows = itertools.chain.from_iterable(
            range(ends[i] - (len(segment.tokens) if every_row else 1), ends[i]) for i, segment in enumerate(segments)
        )
        steps = _steps_of(list(filter(_is_step, ordered)), len(self.weights.blocks))
        numbers = (torch.tensor(list(each), device=self.device) for each in (ids, positions, rows))
        tokens, places, returned = numbers
        return _Layout(tokens, places, returned, steps, _groups_of(ordered))

    def _attention(
        self, normed: Tensor, block: LayerWeights, number: int, turns: tuple[Tensor, Tensor], layout: _Layout
    ) -> Tensor:
        """[U D] -> [U N H flat], before the output product."""
        query, key, value = self.projected(normed, block, turns)
        seen = layout.steps.seen[number]
        first = slice(len(seen))
        # All keys of the pass are in place before anyone looks.
        layout.steps.write(key[first], value[first], number)
        for group in layout.groups:
            self._grow(group, key, value, number)
        attended = normed.new_empty(len(normed), self.heads, self.head_size)
        if seen:
            attended[first] = attend_last(query[first], seen, block.scale, block.window)
        for group in layout.groups:
            parts = [part[group.rows].unflatten(0, (group.segments, group.length)) for part in (query, key, value)]
            prefix, start = group.like.prefix, group.like.start
            past = None if prefix is None or start == 0 else prefix.past(number, start)
            found = attend(parts[0], parts[1], parts[2], past, block.scale, block.window)
            attended[group.rows] = found.flatten(0, 1)
        return attended.flatten(1)

    @staticmethod
    def _grow(group: _Group, key: Tensor, value: Tensor, number: int) -> None:
        prefix, start = group.like.prefix, group.like.start
        if group.like.grows and prefix is not None:
            prefix.keys[number, :, start : start + group.length] = key[group.rows].transpose(0, 1)
            prefix.values[number, :, start : start + group.length] = value[group.rows].transpose(0, 1)

    def projected(
        self, normed: Tensor, block: LayerWeights, turns: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [U N H], keys and values [U N_kv H] of normed states [U D], turned by their positions."""
        joint = block.qkv(normed).unflatten(1, (-1, self.head_size))
        query, key, value = joint.split([self.heads, self.key_heads, self.key_heads], 1)
        if block.query_norm is not None and block.key_norm is not None:
            query, key = self.normed(query, block.query_norm), self.normed(key, block.key_norm)
            rotate_alike_(query, *turns)
            rotate_alike_(key, *turns)
        else:
            rotate_alike_(joint[:, : self.heads + self.key_heads], *turns)
        return query, key, value

    def feed_forward(self, x: Tensor, block: LayerWeights) -> Tensor:
        """x and what the feed-forward part adds to it, [U D]."""
        gate, up = block.gate_up(self.normed(x, block.mlp_norm)).chunk(2, 1)
        size = max(1, SERIAL_ELEMENTS // gate.shape[1]) if gate.device.type == "cpu" else len(gate)
        for rows in gate.split(size):
            rows.copy_(self.weights.activation(rows))
        return self.added(x, block.down(gate.mul_(up)), block.mlp_out_norm)

    def added(self, x: Tensor, result: Tensor, norm: Tensor | None) -> Tensor:
        """x + result, which goes through a norm where there is one."""
        return x + (result if norm is None else self.normed(result, norm))

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """weight * x / sqrt(mean(x^2) + epsilon)."""
        return unit_of(x, self.epsilon)[0].mul_(weight)

    def label_logits(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Logits [S C] of C tokens. Sums go row by row, so a row's bits depend on that row alone.

        Args:
          hidden: [S D], from `run`; labels: int64 [C].
        """
        logits = torch.stack([(hidden * row).sum(1) for row in self.weights.head[labels]], 1)
        return self._finished(logits, labels)

    def log_normalizers(self, hidden: Tensor) -> Tensor:
        """Log-sum-exp [S] of all V logits."""
        return self.logits(hidden).logsumexp(1)

    def logits(self, hidden: Tensor, head: Linear | None = None) -> Tensor:
        """All logits [S V], by another product for the head where one is given."""
        product = torch.mm(hidden, self.weights.head.T) if head is None else head(hidden)
        return self._finished(product, slice(None))

    def _finished(self, logits: Tensor, labels: Tensor | slice) -> Tensor:
        logits = logits.float()
        bias, cap = self.weights.head_bias, self.weights.softcap
        if bias is not None:
            logits = logits + bias[labels]
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _groups_of(ordered: Sequence[Segment]) -> list[_Group]:
    """Those that are computed together, of segments in the order of the pass; without the steps at its front."""
    groups: list[_Group] = []
    end = 0
    for segment in ordered:
        if groups and _kind(groups[-1].like) == _kind(segment):
            groups[-1] = groups[-1]._replace(segments=groups[-1].segments + 1)
        elif not _is_step(segment):
            groups.append(_Group(end, 1, len(segment.tokens), segment))
        end += len(segment.tokens)
    return groups


def _kind(segment: Segment) -> tuple[int, int, int, bool]:
    """Segments of the same kind are computed together; those that grow a prefix are alone, each at its own start."""
    return len(segment.tokens), id(segment.prefix), segment.start, segment.grows


def _is_step(segment: Segment) -> bool:
    return segment.grows and segment.prefix is not None and len(segment.tokens) == 1


def _steps_of(segments: Sequence[Segment], layers: int) -> _Steps:
    keys, values, seen = [], [], []
    for prefix, start in ((segment.prefix, segment.start) for segment in segments):
        assert prefix is not None
        keys.append(prefix.keys[:, :, start].unbind(0))
        values.append(prefix.values[:, :, start].unbind(0))
        both = (states[:, None, :, : start + 1].unbind(0) for states in (prefix.keys, prefix.values))
        seen.append(list(zip(*both, strict=True)))
    numbers = range(layers)
    return _Steps(
        [[row[number] for row in (*keys, *values)] for number in numbers],
        [[row[number] for row in seen] for number in numbers],
    )
