"""`limbeck teacher cache` before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from limbeck.cost.hardware import Hardware, measure
from limbeck.cost.memory import HEAD_ROWS, Way, forward_bytes, with_program
from limbeck.cost.prediction import Prediction, flops_of
from limbeck.cost.shapes import Dims, config_of, frozen_sizes, on_meta
from limbeck.distill.caching import CacheStageConfig
from limbeck.ledger import backbone_forward_flops, head_forward_flops
from limbeck.models.anatomy import Computed, backbone_of
from limbeck.models.lean import has_plain_layers, plan_packed
from limbeck.models.load import load_tokenizer, vocabulary_size
from limbeck.teacher.build import cut_shards, share_prefixes
from limbeck.teacher.score import forward_groups
from limbeck.teacher.shard import Stored
from limbeck.traces.batch import make_example
from limbeck.traces.rendering import render_traces
from limbeck.traces.select import select_traces
from limbeck.traces.sources import read_traces
from limbeck.traces.supervise import SupervisionConfig


def predict_cache(config: CacheStageConfig, *, hardware: Hardware | None = None) -> Prediction:
    """Cost of `limbeck teacher cache`, as of an empty directory; FLOPs as the ledger will count them.

    Args:
      config: the stage.
      hardware: this machine, measured, when None.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    traces, _ = select_traces(read_traces(config.traces)[0], config.select)
    samples = render_traces(traces, tokenizer, config.render, config.max_trace_tokens, config.traces.on_bad).samples
    supervision = SupervisionConfig(preset=config.segments)
    examples = [make_example(sample, config.truncation, supervision) for sample in samples]
    asked = config.asked(examples, traces, tokenizer)
    vocab_size = vocabulary_size(tokenizer)
    translation = config.translated([example.sample for example in examples], asked, traces)
    if translation is not None:
        vocab_size, asked = len(translation.vocabularies.teacher.table), translation.read_for(asked)
    cache = config.cache
    width = Dims.of(config_of(cache.student)).width if cache.mode == "projected" else 0
    return predict_stored(config_of(config.teacher), asked, vocab_size, cache.mode == "hidden", hardware, width)


def predict_stored(
    shape: Any,
    asked: Sequence[Stored],
    vocab_size: int,
    is_hidden: bool,
    hardware: Hardware | None = None,
    projected_width: int = 0,
) -> Prediction:
    """Cost of storing what a teacher says at the positions asked for; `projected_width`: of the student's head."""
    hardware, sizes, dims = hardware or measure(), frozen_sizes(shape, vocab_size), Dims.of(shape)
    is_lean = not hardware.is_accelerator and has_plain_layers(backbone_of(on_meta(shape).eval()))
    way = Way(is_lean, False, False, False, not hardware.is_accelerator)
    flops, tokens, largest = 0, 0, 0
    for group in (group for shard in cut_shards(share_prefixes(asked)) for group in forward_groups(shard)):
        group = [member.as_read() for member in group]
        computed, rows = _computed(group, is_lean)
        flops += backbone_forward_flops(sizes, computed) + (not is_hidden) * head_forward_flops(sizes, rows)
        flops += 2 * rows * sizes.vocab_size * projected_width
        tokens += sum(len(member.ids) for member in group)
        largest = max(largest, forward_bytes(dims, way, computed) + 4 * rows * dims.width)
    # Log-probabilities, what is sorted of them, and the logits they were made of.
    memory = {"teacher": 4 * sizes.num_parameters, "workspace": largest, "loss": 4 * 4 * HEAD_ROWS * sizes.vocab_size}
    return Prediction(
        "teacher cache",
        tokens=tokens,
        flops=flops_of(teacher=flops),
        memory=with_program(memory) if way.is_cpu else memory,
        seconds=flops / hardware.rate("float32"),
    )


def _computed(group: Sequence[Stored], is_lean: bool) -> tuple[Computed, int]:
    """What the teacher computes for sequences that it reads together, and the rows that are stored."""
    lengths = [len(member.ids) for member in group]
    rows = np.nonzero(np.concatenate([member.positions for member in group]))[0] - 1
    if not is_lean:
        return Computed.whole(lengths), len(rows)
    ids = np.concatenate([member.ids for member in group]).astype(np.int64)
    plan = plan_packed(torch.from_numpy(ids), lengths, torch.from_numpy(rows))
    return Computed(len(plan.kept), len(rows), plan.attention_pairs), len(rows)
