"""Who computes: the back ends, the choice among them, and the one line that tells it.

1. `Decoder` reads a model's weights where they lie (`unsupported` gives the reason why not) and computes with torch, on
   any device. Its single tokens are computed by compiled kernels where there are any (`steps`).
2. `PlainDecoder` calls transformers' own forward, for any architecture.

Another engine is one more class with the methods of `Decoder`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.engine.backend import Backend
from limbeck.engine.decoder import Decoder
from limbeck.engine.plain import PlainDecoder
from limbeck.engine.states import Segment
from limbeck.engine.weights import Precision, stored_layers, unreadable, weights_of
from limbeck.errors import ModelError
from limbeck.models.load import load_model
from limbeck.models.parts import LogitForm, causal_lm_of
from limbeck.models.probe import agrees, ask
from limbeck.models.quantized import QuantizedLayer
from limbeck.progress import console


def load_decoder(name: str, precision: Precision = "auto", max_tokens: int = 32768) -> Backend:
    """A decoder from a Hugging Face directory, alias or hub id, dense or written by `limbeck quantize`."""
    stored = {} if precision == "float32" else stored_layers(name)
    if precision == "int8" or stored:  # which are computed on a CPU alone
        return decoder_of(load_model(name, torch.float32, device="cpu"), precision, max_tokens, stored)
    return decoder_of(load_model(name), precision, max_tokens)


def decoder_of(
    model: Any,
    precision: Precision = "float32",
    max_tokens: int = 32768,
    stored: Mapping[str, QuantizedLayer] | None = None,
) -> Backend:
    """The fastest decoder that computes what a model in memory does; it reads the model's weights where they are.

    Args:
      precision: of its products.
      max_tokens: longest text.
      stored: the quantised layers of its file.
    Raises: ModelError for int8 where only transformers can run the model.
    """
    reason = unsupported(model)
    if precision == "int8" and model.device.type != "cpu":
        raise ModelError(f"precision int8: is computed on a CPU, and the model is on {model.device}; take float32.")
    if reason is None:
        return Decoder(weights_of(model, precision, max_tokens, stored))
    if precision == "int8":
        raise ModelError(f"precision int8: {reason}; take float32.")
    _tell(reason)
    return PlainDecoder(model, max_tokens)


def unsupported(model: Any) -> str | None:
    """Why the lean decoder does not run a model; None where it does, which its miniature is asked."""
    reason = unreadable(model)
    if reason is not None:
        return reason
    try:
        form = ask(model).form
    except ModelError as error:
        return str(error)
    answer = agrees(model, _question(), lambda small, sequences: _lean_logits(small, sequences, form))
    return None if answer.agrees else f"{type(causal_lm_of(model)).__name__}: in the lean decoder: {answer.reason}"


def _lean_logits(model: Any, sequences: Sequence[Tensor], form: LogitForm) -> list[Tensor]:
    """Logits [T V] of each sequence, read in blocks."""
    decoder, found = Decoder(weights_of(model, form=form)), []
    for sequence in sequences:
        ids = sequence.flatten().tolist()
        states = decoder.states(len(ids))
        blocks = [Segment(ids[start : start + 64], states, start, grows=True) for start in range(0, len(ids), 64)]
        found.append(decoder.logits(decoder.run(blocks, every_row=True)))
    return found


@functools.cache
def _question() -> str:
    """What is asked, by the code that answers."""
    sources = [(Path(__file__).parent / f"{name}.py").read_bytes() for name in ("attention", "decoder", "weights")]
    return f"engine {hashlib.blake2b(b''.join(sources), digest_size=8).hexdigest()}"


@functools.cache
def _tell(reason: str) -> None:
    console.print(f"engine: transformers' own forward, which is slower: {reason}.", highlight=False)
