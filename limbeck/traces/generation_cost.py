"""`limbeck traces generate` before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from limbeck.cost.hardware import Hardware
from limbeck.cost.prediction import Prediction
from limbeck.cost.sampling import predict_sampling
from limbeck.cost.shapes import config_of
from limbeck.models.load import load_tokenizer, vocabulary_size
from limbeck.traces.generation import GenerateConfig, read_prompts
from limbeck.traces.render import RenderConfig, render, render_prompt
from limbeck.traces.trace import Trace


def predict_generate(
    config: GenerateConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    prompts: Sequence[Trace] | None = None,
    new_tokens: int | None = None,
    hardware: Hardware | None = None,
) -> Prediction:
    """Cost of `limbeck traces generate` with a model in this process; nothing is charged for a server.

    Args:
      config: the stage.
      model: transformers config, where `config.model` does not exist yet.
      prompts: where `config.prompts` cannot be read yet.
      new_tokens: mean length of an output; that of the source's own responses when None, or else the limit.
    """
    asked = read_prompts(config.prompts)[0] if prompts is None else list(prompts)
    if config.model is None:
        return Prediction("traces generate", notes=("a server samples; its cost is not this machine's",))
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.model)
    shape = model if model is not None else config_of(config.model)
    written = new_tokens or response_tokens(asked, tokenizer, config.render, config.sampling.max_new_tokens)
    lengths = [len(render_prompt(tokenizer, trace.messages, config.render)) for trace in asked]
    sampling = replace(config.sampling, batch_size=min(config.sampling.batch_size, config.group_prompts))
    return predict_sampling("traces generate", shape, lengths, written, sampling, hardware, vocabulary_size(tokenizer))


def response_tokens(traces: Sequence[Trace], tokenizer: Any, rendering: RenderConfig, limit: int) -> int:
    """Mean length of the responses that a source has itself; the limit where it has none."""
    known = [trace for trace in traces if trace.cot is not None and trace.answer is not None]
    if not known:
        return limit
    lengths = [
        len(render(trace, tokenizer, rendering)) - len(render_prompt(tokenizer, trace.messages, rendering))
        for trace in known[:64]
    ]
    return max(1, min(limit, round(float(np.mean(lengths)))))
