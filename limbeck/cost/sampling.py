"""What it costs to complete prompts, all to the same assumed length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.cost.hardware import Hardware, measure
from limbeck.cost.memory import Way, forward_bytes, with_program
from limbeck.cost.prediction import Prediction, flops_of
from limbeck.cost.shapes import Dims, frozen_sizes
from limbeck.engine.complete import PREFILL_TOKENS
from limbeck.engine.sampling import SamplingConfig
from limbeck.ledger import decoding_flops
from limbeck.models.anatomy import Computed

DECODE_CALL_SECONDS = 1.5e-4
"""Time of one layer's decoding step beside its work, on a CPU."""


def predict_sampling(
    stage: str,
    shape: Any,
    prompt_tokens: Sequence[int],
    new_tokens: int,
    sampling: SamplingConfig,
    hardware: Hardware | None = None,
    vocab_size: int | None = None,
) -> Prediction:
    """Cost of completing prompts, all to the same assumed length.

    Decoding reads the weights once a step and the cache of every sequence: seconds are those of the bytes or of the
    products, whichever take longer, and on a CPU of the calls.
    """
    hardware, sizes, dims = hardware or measure(), frozen_sizes(shape, vocab_size), Dims.of(shape)
    samples, batch = sampling.num_samples, min(sampling.batch_size, len(prompt_tokens) * sampling.num_samples)
    flops = sum(decoding_flops(sizes, length, [new_tokens] * samples) for length in prompt_tokens)
    width = max(prompt_tokens, default=0) + new_tokens
    cache_token = 8 * dims.keys * dims.layers
    steps = new_tokens * -(-len(prompt_tokens) * samples // max(1, batch))
    moved = steps * (4 * sizes.num_parameters + batch * cache_token * (width - new_tokens / 2))
    calls = 0.0 if hardware.is_accelerator else steps * dims.layers * DECODE_CALL_SECONDS
    way = Way(False, False, False, False, not hardware.is_accelerator)
    prefill = forward_bytes(dims, way, Computed.whole([min(PREFILL_TOKENS, sum(prompt_tokens))]))
    memory = {
        "weights": 4 * sizes.num_parameters,
        "cache": int(batch * width * cache_token),
        "workspace": prefill + 8 * batch * sizes.vocab_size,
    }
    return Prediction(
        stage,
        tokens=sum(prompt_tokens),
        new_tokens=new_tokens * samples * len(prompt_tokens),
        flops=flops_of(sampling=flops),
        memory=with_program(memory) if way.is_cpu else memory,
        seconds=max(flops / hardware.rate("float32"), moved / (hardware.bandwidth * hardware.efficiency)) + calls,
        notes=(f"{new_tokens} new tokens an output",),
    )
