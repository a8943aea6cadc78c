"""The two parts of any causal language model: its decoder and its output layer, whatever their names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.errors import ModelError

_SCALES = re.compile(r"(?=.*(logit|lm_head))(?=.*(scal|multipl)).*")
"""Config fields that may say by what the logits are multiplied or divided."""
_CAPS = re.compile(r"(?=.*logit)(?!.*(attn|attention|router|conf_)).*soft_?cap.*")
"""Config fields that may say where the logits are capped."""


class Head(NamedTuple):
    """The output projection: logits = cap(hidden @ weight.T (+ bias)), `hidden` as `anatomy.hidden_states` gives it."""

    weight: Tensor
    """[V D]."""
    bias: Tensor | None
    """[V]."""
    softcap: float | None = None
    """c of logits c tanh(logits / c)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[... V] of hidden states [... D]."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def rows(self, chosen: Tensor | slice) -> Head:
        """The head of some tokens alone."""
        return Head(self.weight[chosen], None if self.bias is None else self.bias[chosen], self.softcap)


class LogitForm(NamedTuple):
    """What a model does to its logits beside the product: a factor of the hidden states and a cap, from its config."""

    scale_field: str | None = None
    """Field of the config that the hidden states are multiplied with before the product."""
    divides: bool = False
    """Whether they are divided by it instead."""
    cap_field: str | None = None
    """Field of the config that holds the soft cap."""

    def scale(self, config: Any) -> float:
        """The factor in a given config."""
        if self.scale_field is None:
            return 1.0
        value = float(getattr(config, self.scale_field))
        return 1 / value if self.divides else value

    def softcap(self, config: Any) -> float | None:
        """The cap in a given config."""
        return None if self.cap_field is None else float(getattr(config, self.cap_field))


def logit_forms(config: Any) -> Iterator[LogitForm]:
    """All that the fields of a config could mean for the logits, the plain product first."""
    fields = _factors(text_config(config))
    caps = [None, *filter(_CAPS.fullmatch, fields)]
    scales = [name for name, value in fields.items() if _SCALES.fullmatch(name) and value != 1]
    for cap in caps:
        yield LogitForm(cap_field=cap)
        for scale in scales:
            yield LogitForm(scale, False, cap)
            yield LogitForm(scale, True, cap)


def _factors(config: Any) -> dict[str, float]:
    """Positive numbers among the fields and properties of a config whose names speak of logits."""
    computed = [name for name in dir(type(config)) if isinstance(getattr(type(config), name, None), property)]
    names = [name for name in (*config.to_dict(), *computed) if _SCALES.fullmatch(name) or _CAPS.fullmatch(name)]
    values: dict[str, Any] = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in values.items() if type(value) in (int, float) and value > 0}


def text_config(config: Any) -> Any:
    """The config of the text part; of a text model its own."""
    return config.get_text_config(decoder=True)


def causal_lm_of(model: Any) -> Any:
    """The transformers model inside, below a LoRA wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> Any:
    """The part that turns token ids into last hidden states.

    Raises: ModelError when the model has no such part or no output layer beside it.
    """
    lm = causal_lm_of(model)
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    if decoder is lm or decoder is output_layer_of(lm):
        decoder = getattr(lm, "model", None)
    if decoder is None or output_layer_of(lm) is None:
        raise ModelError(
            f"{type(lm).__name__} has no decoder with an output layer behind it, so it is no language model."
        )
    return decoder


def output_layer_of(model: Any) -> Any:
    """The linear layer of the logits; None where there is none."""
    layer = causal_lm_of(model).get_output_embeddings()
    return layer if isinstance(getattr(layer, "weight", None), Tensor) else None
