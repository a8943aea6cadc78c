"""Steps of decoding: a token of each text, by compiled kernels or, where there are none, by a pass of the back end.

By the kernels a token's numbers depend on its own text alone, in float32 as well as in int8, so that texts have the
same bits in any batch, and in speculative decoding those of plain. Without them that holds for int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.engine.backend import Backend
from limbeck.engine.decoder import Decoder
from limbeck.engine.int8 import Int8Linear
from limbeck.engine.native.build import Missing
from limbeck.engine.native.decode import NativeDecoder, NativeLinear
from limbeck.engine.states import KeyValues, Segment
from limbeck.engine.weights import DenseLinear, Linear, Precision
from limbeck.errors import ConfigError, ModelError

Kernels = Literal["auto", "compiled", "torch"]


class Steps:
    """Over one back end."""

    @torch.inference_mode()
    def __init__(self, decoder: Backend, head: Precision = "auto", kernels: Kernels = "auto") -> None:
        """Prepare weights.

        Args:
          head: precision of the head's product; auto: int8 where the linear layers are.
          kernels: auto: compiled ones where they can be had.
        Raises: ConfigError where compiled ones, or an int8 head, are asked for and cannot be had.
        """
        self.decoder = decoder
        self.missing: str | None = None
        """Why auto has no compiled kernels."""
        self._native: NativeDecoder | None = None
        self._head: Linear | None = None
        if not isinstance(decoder, Decoder):
            if kernels == "compiled" or head == "int8":
                raise ConfigError("generation: transformers runs this model; it has neither compiled kernels nor int8.")
            self.missing = "transformers runs this model"
            return
        if head == "int8" or (head == "auto" and decoder.is_int8):
            self._head = Int8Linear.rounded(decoder.weights.head, where="head")
        if kernels != "torch":
            self._compile(decoder, must=kernels == "compiled")

    def _compile(self, decoder: Decoder, must: bool) -> None:
        try:
            self._native = NativeDecoder(decoder)
            self._head = NativeLinear(self._head or DenseLinear(decoder.weights.head, None))
        except Missing as error:
            if must:
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
            if segment.start >= min(self.decoder.max_tokens, segment.prefix.room):
                raise ModelError(f"a token at position {segment.start}, beyond the text's room or the model's.")
        return self._native.step(segments)

    def behind(self, states: Any, room: int) -> Any:
        """A place for tokens behind a prompt, whose states others may use as well."""
        if isinstance(self.decoder, Decoder) and self._native is not None:
            return KeyValues(self.decoder, room, states)
        return self.decoder.behind(states, room)

    def logits(self, states: Tensor) -> Tensor:
        """All logits [S V], on the CPU, where rules and draws are made."""
        if isinstance(self.decoder, Decoder):
            return self.decoder.logits(states, self._head).cpu()
        return self.decoder.logits(states).cpu()
