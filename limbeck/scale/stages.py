"""Every other stage before it runs: teacher cache, traces, evaluation, pruning, recovery, quantisation, moments.

Each function takes the config of the stage and, where its model does not exist yet, the transformers config that the
model will have (`pruned_shape` gives that of a pruned one). Lengths of what a model will write are assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from limbeck.compress.blocks import Group
from limbeck.compress.calibrate import CalibrationConfig, split_rows
from limbeck.compress.plan import count_work
from limbeck.compress.prune.stage import SOLVERS, PruneConfig, sizes_after
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.compress.recover import RecoverConfig
from limbeck.compress.rounds import plan_rounds
from limbeck.compress.shape_cost import whole_shape
from limbeck.compress.shrink import shrunk_config
from limbeck.distill.caching import CacheStageConfig
from limbeck.distill.data import Data, prepare
from limbeck.evaluate.perplexity import token_windows
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.ledger import backbone_forward_flops, decoding_flops, head_forward_flops
from limbeck.models.anatomy import Computed, backbone_of
from limbeck.models.generate import PREFILL_TOKENS, SamplingConfig
from limbeck.models.lean import has_plain_layers, plan_packed
from limbeck.models.load import load_tokenizer, vocabulary_size
from limbeck.scale.hardware import Hardware, measure
from limbeck.scale.memory import Way, forward_bytes, with_program, without_program
from limbeck.scale.prediction import Prediction, flops_of, total
from limbeck.scale.shapes import Dims, config_of, frozen_sizes, on_meta
from limbeck.scale.training import data_of, predict_run, set_up
from limbeck.teacher.build import cut_shards, share_prefixes
from limbeck.teacher.score import forward_groups
from limbeck.teacher.shard import Stored
from limbeck.traces.batch import make_example
from limbeck.traces.generation import GenerateConfig, read_prompts
from limbeck.traces.render import RenderConfig, render, render_prompt
from limbeck.traces.rendering import render_traces
from limbeck.traces.sample import Sample
from limbeck.traces.select import select_traces
from limbeck.traces.sources import read_problems, read_traces
from limbeck.traces.supervise import SupervisionConfig
from limbeck.traces.trace import Trace

HEAD_ROWS = 256
"""Rows of logits that scoring holds at once."""
DECODE_CALL_SECONDS = 1.5e-4
"""Time of one layer's decoding step beside its work, on a CPU."""


def predict_cache(
    config: CacheStageConfig,
    *,
    teacher: Any = None,
    tokenizer: Any = None,
    samples: Sequence[Sample] | None = None,
    hardware: Hardware | None = None,
) -> Prediction:
    """Cost of `limbeck teacher cache`, as of an empty directory; FLOPs as the ledger will count them.

    Args:
      config: the stage.
      teacher: transformers config of the teacher, where `config.teacher` does not exist yet.
      tokenizer: of the teacher; loaded when None.
      samples: rendered traces, where `config.traces` do not exist yet.
      hardware: this machine, measured, when None.
    """
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.teacher)
    if samples is None:
        traces, _ = select_traces(read_traces(config.traces)[0], config.select)
        samples = render_traces(traces, tokenizer, config.render, config.max_trace_tokens, config.traces.on_bad).samples
    supervision = SupervisionConfig(preset=config.segments)
    examples = [make_example(sample, config.truncation, supervision) for sample in samples]
    asked = [Stored(example.sample.input_ids, example.kd_weight > 0) for example in examples]
    shape = teacher if teacher is not None else config_of(config.teacher)
    return predict_stored(shape, asked, vocabulary_size(tokenizer), config.cache.mode == "hidden", hardware)


def predict_stored(
    shape: Any, asked: Sequence[Stored], vocab_size: int, is_hidden: bool, hardware: Hardware | None = None
) -> Prediction:
    """Cost of storing what a teacher says at the positions asked for."""
    hardware, sizes, dims = hardware or measure(), frozen_sizes(shape, vocab_size), Dims.of(shape)
    is_lean = not hardware.is_accelerator and has_plain_layers(backbone_of(on_meta(shape).eval()))
    way = Way(is_lean, False, False, False, not hardware.is_accelerator)
    flops, tokens, largest = 0, 0, 0
    for shard in cut_shards(share_prefixes(asked)):
        for group in forward_groups(shard):
            lengths = [len(member.ids) for member in group]
            rows = np.nonzero(np.concatenate([member.positions for member in group]))[0] - 1
            computed = Computed.whole(lengths)
            if is_lean:
                ids = np.concatenate([member.ids for member in group]).astype(np.int64)
                plan = plan_packed(torch.from_numpy(ids), lengths, torch.from_numpy(rows))
                computed = Computed(len(plan.kept), len(rows), plan.attention_pairs)
            flops += backbone_forward_flops(sizes, computed)
            flops += 0 if is_hidden else head_forward_flops(sizes, len(rows))
            tokens += sum(lengths)
            largest = max(largest, forward_bytes(dims, way, computed) + 4 * len(rows) * dims.width)
    # Log-probabilities, what is sorted of them, and the logits they were made of.
    memory = {"teacher": 4 * sizes.num_parameters, "workspace": largest, "loss": 4 * 4 * HEAD_ROWS * sizes.vocab_size}
    return Prediction(
        "teacher cache",
        tokens=tokens,
        flops=flops_of(teacher=flops),
        memory=with_program(memory) if way.is_cpu else memory,
        seconds=flops / hardware.rate("float32"),
    )


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
    written = new_tokens or _response_tokens(asked, tokenizer, config.render, config.sampling.max_new_tokens)
    lengths = [len(render_prompt(tokenizer, trace.messages, config.render)) for trace in asked]
    sampling = replace(config.sampling, batch_size=min(config.sampling.batch_size, config.group_prompts))
    return predict_sampling("traces generate", shape, lengths, written, sampling, hardware, vocabulary_size(tokenizer))


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
    shape = model if model is not None else config_of(config.model)
    hardware, parts = hardware or measure(), []
    if config.problems is not None:
        asked = list(read_problems(config.problems)[0] if problems is None else problems)
        written = new_tokens or _response_tokens(asked, tokenizer, config.render, config.evaluate.max_new_tokens)
        lengths = [len(render_prompt(tokenizer, trace.messages, config.render)) for trace in asked]
        sampling, vocab = config.evaluate.sampling(), vocabulary_size(tokenizer)
        parts.append(predict_sampling("evaluate", shape, lengths, written, sampling, hardware, vocab))
    if config.perplexity is not None:
        windows = [len(window) for window in token_windows(config.perplexity, tokenizer, config.render)]
        sizes = frozen_sizes(shape, vocabulary_size(tokenizer))
        flops = sum(backbone_forward_flops(sizes, Computed.whole([n])) + head_forward_flops(sizes, n) for n in windows)
        memory = with_program({"weights": 4 * sizes.num_parameters, "loss": 12 * HEAD_ROWS * sizes.vocab_size})
        seconds = flops / hardware.rate("float32")
        parts.append(
            Prediction("evaluate", tokens=sum(windows), flops=flops_of(student=flops), memory=memory, seconds=seconds)
        )
    return total("evaluate", parts)


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


def pruned_shape(shape: Any, config: PruneConfig) -> Any:
    """The transformers config of a model after `limbeck prune`; which layers go does not change it.

    A budget's shape is found by search: here the neurons alone are cut, to the same number of parameters.
    """
    whole = whole_shape(shape)
    if config.budget is not None:
        return _within(shape, config)
    layers = range(len(whole.layers) - config.drop_layers)
    if config.method == "osscar":
        neurons, kv_groups = sizes_after(config, shape)
        return shrunk_config(shape, neurons=neurons, kv_groups=kv_groups, layers=layers)
    return shrunk_config(shape, layers=layers) if config.method == "depth" else shape


def predict_prune(
    config: PruneConfig, *, model: Any = None, tokenizer: Any = None, hardware: Hardware | None = None
) -> Prediction:
    """Cost of `limbeck prune`; arguments as for the other stages."""
    shape = model if model is not None else config_of(config.model)
    after = whole_shape(pruned_shape(shape, config))
    before = whole_shape(shape)
    changed = {
        role
        for role, is_cut in (
            ("mlp_out", after.neurons < before.neurons),
            ("attention_out", after.kv_groups < before.kv_groups),
        )
        if is_cut or config.method in SOLVERS
    }
    wants: Callable[[Group], bool] = (
        (lambda group: True) if config.method in SOLVERS else (lambda group: group.role in changed)
    )
    walks = config.moments is None and config.method != "magnitude"
    return _compression("prune", shape, config, wants, config.method, walks, tokenizer, hardware)


def predict_quantize(
    config: QuantizeConfig, *, model: Any = None, tokenizer: Any = None, hardware: Hardware | None = None
) -> Prediction:
    """Cost of `limbeck quantize`; arguments as for the other stages."""
    shape = model if model is not None else config_of(config.model)
    walks = config.moments is None and config.needs_data
    return _compression("quantize", shape, config, lambda group: True, config.method, walks, tokenizer, hardware)


def predict_recover(
    config: RecoverConfig,
    *,
    model: Any = None,
    teacher: Any = None,
    tokenizer: Any = None,
    samples: Sequence[Sample] | None = None,
    hardware: Hardware | None = None,
) -> Prediction:
    """Cost of `limbeck recover`: every round's pruning and its training, on the shape that the round has.

    Args:
      config: the stage.
      model: transformers config of the unpruned model, where it does not exist yet; `teacher`: the same of a teacher.
      tokenizer, samples, hardware: as for `predict_distill`.
    """
    hardware = hardware or measure()
    shape = model if model is not None else config_of(config.prune.model)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.prune.model)
    data: Data = prepare(config.distill, tokenizer) if samples is None else data_of(config.distill, samples)
    if teacher is None and config.distill.teacher.model == config.prune.model:
        teacher = shape
    parts = []
    student = shape
    for planned in plan_rounds(config.prune, config.distill, config.rounds, config=shape, data=data):
        parts.append(predict_prune(planned.prune, model=student, tokenizer=tokenizer, hardware=hardware))
        student = pruned_shape(student, planned.prune)
        vocab = vocabulary_size(tokenizer)
        setup = set_up(planned.distill, data, vocab, student, teacher, hardware.is_accelerator)
        parts.append(predict_run(setup, hardware))
    # All rounds share a process, and a comparison of the unpruned model comes before the first.
    return total("recover", [replace(part, memory=without_program(part.memory)) for part in parts])


def _compression(
    stage: str,
    shape: Any,
    config: PruneConfig | QuantizeConfig,
    wants: Callable[[Group], bool],
    solver: str,
    walks: bool,
    tokenizer: Any,
    hardware: Hardware | None,
) -> Prediction:
    hardware = hardware or measure()
    held_out = config.gate.sequences
    padded, tokens, apart = _calibration(config.calibration, config.model, tokenizer, held_out) if walks else (0, 0, 0)
    dense = config.dense_targets
    model = on_meta(shape)
    layers = backbone_of(model).layers
    work = count_work(layers, shape, padded, tokens, wants, solver, dense_targets=dense, walks=walks)  # type: ignore[arg-type]
    compared = 2 * 2.0 * apart * sum(parameter.numel() for parameter in model.parameters())
    notes = [f"products of {tokens:,} calibration tokens and of the solver, which the ledger does not count"]
    if solver in SOLVERS or stage == "quantize":
        notes.append("solvers by their factors in compress/plan.py")
    return Prediction(
        stage,
        solver_flops=int(work.flops + compared),
        memory=with_program({"workspace": work.peak_bytes}),
        seconds=(work.flops + compared) / hardware.rate("float32"),
        notes=tuple(notes),
    )


def _calibration(config: CalibrationConfig, model: str, tokenizer: Any, held_out: int) -> tuple[int, int, int]:
    """Calibration tokens with and without padding, and tokens of the comparison."""
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
    rows, apart = split_rows(config, tokenizer, model, held_out)
    return rows.input_ids.numel(), rows.tokens, 0 if apart is None else apart.input_ids.numel()


def _within(shape: Any, config: PruneConfig) -> Any:
    """The config with fewer neurons that meets a budget of parameters or bytes; unchanged for one of milliseconds."""
    budget = config.budget
    assert budget is not None
    if budget.metric == "milliseconds":
        return shape
    target = budget.target / (4 if budget.metric == "bytes" else 1)
    dims, parameters = Dims.of(shape), frozen_sizes(shape).num_parameters
    surplus = max(0.0, parameters - target) / (3 * dims.width * dims.layers)
    neurons = max(budget.multiple_of, int((dims.neurons - surplus) // budget.multiple_of * budget.multiple_of))
    return shrunk_config(shape, neurons=min(neurons, dims.neurons))


def _response_tokens(traces: Sequence[Trace], tokenizer: Any, rendering: RenderConfig, limit: int) -> int:
    """Mean length of the responses that a source has itself; the limit where it has none."""
    known = [trace for trace in traces if trace.cot is not None and trace.answer is not None]
    if not known:
        return limit
    lengths = [
        len(render(trace, tokenizer, rendering)) - len(render_prompt(tokenizer, trace.messages, rendering))
        for trace in known[:64]
    ]
    return max(1, min(limit, round(float(np.mean(lengths)))))
