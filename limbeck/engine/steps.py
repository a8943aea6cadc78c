"""Steps of decoding: a token of each text, by compiled kernels or, where there are none, by a pass of the decoder.

By the kernels a token's numbers depend on its own text alone, in float32 as well as in int8, so that texts have the
same bits in any batch, and in speculative decoding those of plain. Without them that holds for int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from limbeck.engine.decoder import Decoder
from limbeck.engine.int8 import Int8Linear
from limbeck.engine.native.build import Missing
from limbeck.engine.native.decode import NativeDecoder, NativeLinear
from limbeck.engine.states import KeyValues, Segment
from limbeck.engine.weights import DenseLinear, Linear, Precision
from limbeck.errors import ConfigError, ModelError

Kernels = Literal["auto", "compiled", "torch"]


class Steps:
    """Over one decoder."""

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, head: Precision = "auto", kernels: Kernels = "auto") -> None:
        """Prepare weights.

        Args:
          head: precision of the head's product; auto: int8 where the linear layers are.
          kernels: auto: compiled ones where they can be had.
        Raises: ConfigError where compiled ones are asked for and cannot be had.
        """
        self.decoder = decoder
        self.missing: str | None = None
        """Why auto has no compiled kernels."""
        self._native: NativeDecoder | None = None
        use_int8 = head == "int8" or (head == "auto" and decoder.is_int8)
        weights = decoder.weights
        self._head: Linear | None = Int8Linear.rounded(weights.head, where="head") if use_int8 else None
        if kernels == "torch":
            return
        try:
            self._native = NativeDecoder(weights, decoder.heads, decoder.key_heads, decoder.head_size)
            self._head = NativeLinear(self._head or DenseLinear(weights.head, None))
        except Missing as error:
            if kernels == "compiled":
                raise ConfigError(f"generation: kernels compiled: {error}; take torch or auto.") from error
            self.missing = str(error)

    @property
    def are_compiled(self) -> bool:
        return self._native is not None

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment]) -> Tensor:
        """States [S D] behind the final norm.

        Args:
          segments: of one token each, which grows its prefix; several may follow one another in one text.
        Raises: ModelError for a token that has no place.
        """
        if self._native is None:
            return self.decoder.run(segments)
        for segment in segments:
            assert segment.prefix is not None and len(segment.tokens) == 1 and segment.grows
            if segment.start >= min(self.decoder.max_tokens, segment.prefix.room):
                raise ModelError(f"a token at position {segment.start}, beyond the text's room or the model's.")
        tokens = torch.tensor([segment.tokens[0] for segment in segments])
        return self._native.step(self.decoder.weights.embed(tokens), segments)

    def behind(self, states: KeyValues, room: int) -> KeyValues:
        """A place for tokens behind a prompt, whose states others may use as well."""
        return self.decoder.behind(states, room) if self._native is None else KeyValues(self.decoder, room, states)

    def logits(self, states: Tensor) -> Tensor:
        """All logits [S V]."""
        return self.decoder.logits(states, self._head)
