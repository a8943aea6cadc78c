"""Who computes: the back ends, the choice among them, and the one line that tells it.

1. `Decoder` reads a model's weights where they lie (`unsupported` gives the reason why not) and computes with torch, on
   any device. Its single tokens are computed by compiled kernels where there are any (`steps`).
2. `PlainDecoder` calls transformers' own forward, for any architecture.

Another engine is one more class with the methods of `Decoder`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from limbeck.engine.backend import Backend
from limbeck.engine.decoder import Decoder
from limbeck.engine.plain import PlainDecoder
from limbeck.engine.weights import Precision, stored_layers, unsupported, weights_of
from limbeck.errors import ModelError
from limbeck.models.load import load_model
from limbeck.models.quantized import Layer
from limbeck.progress import console


def load_decoder(name: str, precision: Precision = "auto", max_tokens: int = 32768) -> Backend:
    """A decoder from a Hugging Face directory, alias or hub id, dense or written by `limbeck quantize`."""
    stored = {} if precision == "float32" else stored_layers(name)
    return decoder_of(load_model(name), precision, max_tokens, stored)


def decoder_of(
    model: Any, precision: Precision = "float32", max_tokens: int = 32768, stored: Mapping[str, Layer] | None = None
) -> Backend:
    """The fastest decoder that computes what a model in memory does; it reads the model's weights where they are.

    Args:
      precision: of its products.
      max_tokens: longest text.
      stored: the quantised layers of its file.
    Raises: ModelError for int8 where only transformers can run the model.
    """
    reason = unsupported(model)
    if reason is None:
        return Decoder(weights_of(model, precision, max_tokens, stored))
    if precision == "int8":
        raise ModelError(f"precision int8: {reason}; take float32.")
    _tell(reason)
    return PlainDecoder(model, max_tokens)


@functools.cache
def _tell(reason: str) -> None:
    console.print(f"engine: transformers' own forward, which is slower: {reason}.", highlight=False)
