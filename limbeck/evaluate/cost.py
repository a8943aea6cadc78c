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
from limbeck.traces.render import RenderConfig, render_prompt
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
    if config.problems is not None:
        asked = list(read_problems(config.problems)[0] if problems is None else problems)
        written = new_tokens or response_tokens(asked, tokenizer, config.render, config.evaluate.max_new_tokens)
        lengths = _lengths(asked, tokenizer, config.render)
        sampling, vocab = config.evaluate, vocabulary_size(tokenizer)
        parts.append(predict_sampling("evaluate", shape, lengths, written, sampling, hardware, vocab))
    if config.benchmark is not None:
        lengths = _lengths(benchmark_task(config.benchmark).problems, tokenizer, config.render)
        written = new_tokens or config.evaluate.max_new_tokens
        sampling, vocab = config.evaluate, vocabulary_size(tokenizer)
        parts.append(predict_sampling("evaluate", shape, lengths, written, sampling, hardware, vocab))
    if config.perplexity is not None:
        windows = [len(window) for window in token_windows(config.perplexity, tokenizer, config.render)]
        parts.append(_perplexity(frozen_sizes(shape, vocabulary_size(tokenizer)), windows, hardware))
    return total("evaluate", parts)


def _lengths(asked: Sequence[Trace | Problem], tokenizer: Any, config: RenderConfig) -> list[int]:
    """Tokens of the prompts."""
    return [len(render_prompt(tokenizer, one.messages, config)) for one in asked]


def _perplexity(sizes: Sizes, windows: Sequence[int], hardware: Hardware) -> Prediction:
    """Of windows of so many tokens."""
    flops = sum(backbone_forward_flops(sizes, Computed.whole([n])) + head_forward_flops(sizes, n) for n in windows)
    memory = with_program({"weights": 4 * sizes.num_parameters, "loss": 12 * HEAD_ROWS * sizes.vocab_size})
    seconds = flops / hardware.rate("float32")
    return Prediction("evaluate", tokens=sum(windows), flops=flops_of(student=flops), memory=memory, seconds=seconds)
