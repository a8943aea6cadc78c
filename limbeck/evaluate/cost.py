"""`limbeck evaluate` before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.cost.hardware import Hardware, measure
from limbeck.cost.memory import HEAD_ROWS, with_program
from limbeck.cost.prediction import Prediction, flops_of, total
from limbeck.cost.sampling import predict_sampling
from limbeck.cost.shapes import config_of, frozen_sizes
from limbeck.evaluate.benchmark_data import benchmark_task
from limbeck.evaluate.perplexity import token_windows
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.evaluate.tasks import Problem
from limbeck.ledger import backbone_forward_flops, head_forward_flops
from limbeck.models.anatomy import Computed, Sizes
from limbeck.models.load import load_tokenizer, vocabulary_size
from limbeck.traces.generation_cost import response_tokens
from limbeck.traces.render import render_prompt
from limbeck.traces.sources import read_problems
from limbeck.traces.trace import Trace


def predict_evaluate(
    config: EvaluateStageConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    problems: Sequence[Trace] | None = None,
    new_tokens: int | None = None,
    hardware: Hardware | None = None,
) -> Prediction:
    """Cost of `limbeck evaluate`; arguments as for `predict_generate`."""
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.model)
    shape = model or config_of(config.model)
    hardware, parts = hardware or measure(), []
    asked, written = _asked(config, tokenizer, problems)
    if asked:
        lengths = [len(render_prompt(tokenizer, one.messages, config.render)) for one in asked]
        vocab = vocabulary_size(tokenizer)
        written = new_tokens or written
        parts.append(predict_sampling("evaluate", shape, lengths, written, config.evaluate, hardware, vocab))
    if config.perplexity is not None:
        windows = [len(window) for window in token_windows(config.perplexity, tokenizer, config.render)]
        parts.append(_perplexity(frozen_sizes(shape, vocabulary_size(tokenizer)), windows, hardware))
    return total("evaluate", parts)


def _asked(
    config: EvaluateStageConfig, tokenizer: Any, problems: Sequence[Trace] | None
) -> tuple[Sequence[Trace | Problem], int]:
    """What is asked, and how many tokens are written to it at the most, or on average where solutions tell."""
    limit = config.evaluate.max_new_tokens
    if config.benchmark is not None:
        return benchmark_task(config.benchmark).problems, limit
    if config.problems is None:
        return (), 0
    asked = list(read_problems(config.problems)[0] if problems is None else problems)
    return asked, response_tokens(asked, tokenizer, config.render, limit)


def _perplexity(sizes: Sizes, windows: Sequence[int], hardware: Hardware) -> Prediction:
    """Of windows of so many tokens."""
    flops = sum(backbone_forward_flops(sizes, Computed.whole([n])) + head_forward_flops(sizes, n) for n in windows)
    memory = with_program({"weights": 4 * sizes.num_parameters, "loss": 12 * HEAD_ROWS * sizes.vocab_size})
    seconds = flops / hardware.rate("float32")
    return Prediction("evaluate", tokens=sum(windows), flops=flops_of(student=flops), memory=memory, seconds=seconds)
