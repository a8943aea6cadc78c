"""Time of a prompt and of a generated token, by number format and shape, from bytes and FLOPs.

    prefill    max(2 W U / f + 4 A p / f', b W / m)
    decoding   max(2 W B / f + 2 V D B / f', (b W + b' V D + B c k) / m)

W weights of the linear layers, V D those of the head, A layers x heads x head size; U tokens and p causal pairs of
query and key of a prompt, B sequences of c tokens; f FLOP/s of the format's products and f' of plain ones, m bytes a
second; b bytes a weight, b' a number that is not quantised, k of a token's keys and values.

Prompts of a ranking request share a prefix of P tokens, and each of N items has I of its own, so that U = P + N I and
p = P^2 / 2 + N (P I + I^2 / 2): the prefix is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from limbeck.cost.hardware import Hardware
from limbeck.cost.shapes import Dims
from limbeck.models.anatomy import Sizes

PREFILL_EFFICIENCY, DECODE_EFFICIENCY = 0.6, 0.7
"""Share of a table device's FLOP/s that prefill reaches, and of its bandwidth that decoding does; assumptions."""
GROUP_SIZE = 128
"""Weights that share a 16-bit scale in w4a16."""


class Format(NamedTuple):
    """How weights are stored and which products they take part in."""

    name: str
    bytes_a_weight: float
    products: str
    """Number format of the products: a key of `Hardware.flops`."""
    plain_bytes: float
    """Bytes a number of what is not quantised: embedding, head, keys and values."""
    needs: str
    """What it takes to get there."""


class Model(NamedTuple):
    """A model that is served."""

    sizes: Sizes
    dims: Dims

    @property
    def head_weights(self) -> int:
        """V D."""
        return self.dims.vocab * self.dims.width


class Requests(NamedTuple):
    """What one request asks for."""

    prefix_tokens: int
    """Computed once a request."""
    items: int
    item_tokens: int
    """Tokens of each item behind the prefix."""
    new_tokens: int
    """Tokens that are generated; 0: only the prompt is read."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens that are computed before the first new one."""
        return self.prefix_tokens + self.items * self.item_tokens

    @property
    def pairs(self) -> float:
        """Pairs of query and key, causal."""
        own = self.items * (self.prefix_tokens * self.item_tokens + self.item_tokens**2 / 2)
        return self.prefix_tokens**2 / 2 + own


class Times(NamedTuple):
    """Seconds of a request."""

    prefill: float
    step: float
    """Of one decoding step with all sequences of the batch."""
    batch: float
    """Sequences that are decoded together."""
    request: float
    """From arrival to the last token, on an idle queue."""
    requests_per_second: float
    """Most that one device answers."""
    is_prefill_bound_by_products: bool
    is_decode_bound_by_products: bool


def formats_of(hardware: Hardware) -> list[Format]:
    """The formats that speed up anything on a device, the plain one first."""
    plain = "bf16" if "bf16" in hardware.flops else "float32"
    size = 2.0 if plain == "bf16" else 4.0
    found = [Format(plain, size, plain, size, "nothing")]
    if "fp8" in hardware.flops:
        found.append(Format("fp8", 1.0, "fp8", size, "limbeck quantize --scheme fp8-dynamic; no calibration"))
    if "int8" in hardware.flops:
        how = "limbeck quantize --scheme w8a8 --equalization smoothquant"
        found.append(Format("w8a8", 1.0, "int8", size, how))
    how = "limbeck quantize --scheme w4a16, calibrated" + ("" if hardware.is_accelerator else "; run by llama.cpp")
    found.append(Format("w4a16", 0.5 + 2.0 / GROUP_SIZE, plain, size, how))
    return found


def weight_bytes(model: Model, form: Format) -> float:
    """Bytes of a model in a format; embedding and head stay plain."""
    rest = model.sizes.num_parameters - model.sizes.linear_weights
    return form.bytes_a_weight * model.sizes.linear_weights + form.plain_bytes * rest


def times_of(
    model: Model,
    form: Format,
    requests: Requests,
    hardware: Hardware,
    rate: float | None = None,
    batch: float | None = None,
) -> Times:
    """Times of one request and of the device.

    Args:
      rate: requests a second that arrive; with it, and no `batch`, as many sequences are decoded together as are under
        way at a time (Little's law).
      batch: sequences that are decoded together.
    """
    prefill, prefill_products = prefill_seconds(model, form, requests, hardware)
    if not requests.new_tokens:
        return Times(prefill, 0.0, 0.0, prefill, 1.0 / prefill, prefill_products, False)
    context = requests.prefix_tokens + requests.item_tokens + requests.new_tokens / 2
    together = batch if batch is not None else _under_way(model, form, requests, hardware, rate or 0.0, context)
    step, decode_products = step_seconds(model, form, together, context, hardware)
    request = prefill + requests.new_tokens * step
    served = 1.0 / (prefill + requests.new_tokens * step / together)
    return Times(prefill, step, together, request, served, prefill_products, decode_products)


def prefill_seconds(model: Model, form: Format, requests: Requests, hardware: Hardware) -> tuple[float, bool]:
    """Seconds of reading a request's tokens, and whether products bound them."""
    share = PREFILL_EFFICIENCY if hardware.is_accelerator else 1.0
    plain = hardware.flops.get("bf16", hardware.flops["float32"])
    products = 2.0 * model.sizes.linear_weights * requests.prompt_tokens / (share * _speed(form, hardware.flops))
    products += 4.0 * model.sizes.attention_width * requests.pairs / (share * plain)
    moved = weight_bytes(model, form) / (_bandwidth_share(hardware) * hardware.bandwidth)
    return max(products, moved), products >= moved


def step_seconds(model: Model, form: Format, batch: float, context: float, hardware: Hardware) -> tuple[float, bool]:
    """Seconds of a decoding step of `batch` sequences with `context` tokens each, and whether products bound them."""
    share = PREFILL_EFFICIENCY if hardware.is_accelerator else 1.0
    weights = model.sizes.linear_weights
    products = 2.0 * weights * batch / (share * _speed(form, hardware.flops))
    products += 2.0 * model.head_weights * batch / (share * hardware.flops.get("bf16", hardware.flops["float32"]))
    cache = batch * context * cache_bytes(model, form)
    read = form.bytes_a_weight * weights + form.plain_bytes * model.head_weights + cache
    moved = read / (_bandwidth_share(hardware) * hardware.bandwidth)
    return max(products, moved), products >= moved


def cache_bytes(model: Model, form: Format) -> float:
    """Bytes of keys and values a token, all layers."""
    return 2.0 * model.dims.keys * model.dims.layers * form.plain_bytes


def _under_way(
    model: Model, form: Format, requests: Requests, hardware: Hardware, rate: float, context: float
) -> float:
    """Sequences under way at a time: the least B >= 1 with B = rate x new tokens x step(B); many where none is."""
    batch = 1.0
    for _ in range(64):
        step, _ = step_seconds(model, form, batch, context, hardware)
        wanted = max(1.0, rate * requests.new_tokens * step)
        if wanted <= batch * 1.001:
            break
        batch = min(wanted, _MOST_TOGETHER)
    return batch


_MOST_TOGETHER = 1024.0


def _speed(form: Format, flops: Mapping[str, float]) -> float:
    return flops.get(form.products, flops["float32"])


def _bandwidth_share(hardware: Hardware) -> float:
    return DECODE_EFFICIENCY if hardware.is_accelerator else 1.0
