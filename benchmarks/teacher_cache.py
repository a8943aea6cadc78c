"""The teacher cache on smollm2-135m and gsm_symbolic traces: bytes, fidelity, speed, and the cost of a sweep.

Regime: teacher smollm2-135m, float32 on a CPU, responses (thought and answer) stored, the cache's defaults in each
mode. Bytes are everything in the directory over the positions stored. `kl_to_full_teacher_nats` is KL(full teacher ||
what the cache gives), over all positions, the stored tail spread evenly over the entries that are not stored; draws
exclude what was not drawn, so that their KL is infinite and given as null.

Loss and gradient: one step, forward KL on thought and answer, for a student that is the teacher with 10 % of noise on
every weight (0.6 nats away, as a base model is). Errors are relative to the same step with the live teacher and the
whole vocabulary; the gradient is that of all parameters, its error a ratio of norms. `..._over_live_entries` compares
with a live teacher that is reduced to the same entries in full precision: what storing alone costs.

Sweep: seconds of teacher and student for one epoch at lead fractions 0.2, 0.4, 0.6, 0.8 and 1.0 of the response: with a
cache that is written once, over a live teacher. The student is the first 4 layers of the teacher, so the teacher is 3.2
times its size; `teacher_share_of_live_seconds` is what a cache could save at most, but for the one pass that fills it.

Peer: plain top 50 as int32 ids and float16 log-probabilities with a float16 tail, from the same run. DistillKit's
packed format publishes 114 to 300 bytes a token. Bound: once sorted, about 11 bits tell which of 49,152 an entry is.

    python benchmarks/teacher_cache.py [--quick] [--threads 2] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _process import conditions, fresh, gsm_traces, markdown, publish, render_traces, save_models, set_up
from torch import Tensor

from limbeck.checkpoint import write_manifest
from limbeck.distill import train
from limbeck.distill.config import LossConfig
from limbeck.distill.microbatch import MicroBatch, StepLoss, Student, step_totals
from limbeck.distill.objective import Distillation
from limbeck.ledger import Ledger
from limbeck.models.anatomy import Head, head_of
from limbeck.models.load import load_model, load_tokenizer, vocabulary_size
from limbeck.teacher.build import build_cache, spec_of, stats
from limbeck.teacher.cache import MODES, CacheConfig, TeacherCache, seal
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.live import LiveTeacher
from limbeck.teacher.score import reconstruction_kl
from limbeck.teacher.several import Teacher
from limbeck.teacher.shard import Stored
from limbeck.teacher.topk import TopKTargets
from limbeck.traces.batch import Batch, Example, collate, make_example
from limbeck.traces.sample import Sample
from limbeck.traces.supervise import SupervisionConfig
from limbeck.traces.truncate import TruncationConfig

FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
RESPONSE, UNCUT = SupervisionConfig(preset="cot+answer"), TruncationConfig()
PLAIN = CacheConfig(top_k=50, min_probability=0.0)
BATCH = 8
STUDENT_LAYERS = 4


class LiveEntries:
    """A live teacher reduced to the entries that `config` keeps; `dtype` rounds their log-probabilities."""

    def __init__(self, teacher: LiveTeacher, config: CacheConfig, dtype: torch.dtype) -> None:
        self._teacher, self._config, self._dtype = teacher, config, dtype

    def targets(self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger) -> TopKTargets:
        dense = self._teacher.targets(batch, examples, rows, ledger)
        parts = [reduce(log_probs, self._config, self._dtype) for log_probs in _log_probs(dense)]
        return _stacked(parts)


def reduce(log_probs: Tensor, config: CacheConfig, dtype: torch.dtype) -> TopKTargets:
    """The entries that the cache would keep of [n V], as they are but for the rounding to `dtype`."""
    values, ids = log_probs.topk(config.top_k, dim=-1)
    dropped = values.exp() < config.min_probability
    dropped[:, 0] = False
    rest = log_probs.scatter(-1, ids, torch.where(dropped, values, -torch.inf)).logsumexp(-1)
    return TopKTargets(ids, values.masked_fill(dropped, -torch.inf).to(dtype).float(), rest.to(dtype).float())


def _log_probs(dense: DenseTargets) -> Iterator[Tensor]:
    for hidden in dense.hidden.split(256):
        yield torch.nn.functional.linear(hidden, dense.head_weight, dense.head_bias).log_softmax(-1)


def _stacked(parts: Sequence[TopKTargets]) -> TopKTargets:
    return TopKTargets(*(torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "log_probs", "log_tail")))


def asked(samples: Sequence[Sample]) -> list[Stored]:
    examples = [make_example(sample, UNCUT, RESPONSE) for sample in samples]
    return [Stored(example.sample.input_ids, example.kd_weight > 0) for example in examples]


def modes(models: Path, samples: Sequence[Sample], few: Sequence[Sample], threads: int) -> dict[str, Any]:
    """What every mode costs and loses; gradients are of the `few` samples."""
    torch.set_num_threads(threads)
    model = load_model(str(models / "teacher"), layout="packed")
    found: dict[str, Any] = {}
    for mode in MODES:
        found[mode] = write(mode, model, models, samples) | read(model, samples, models / mode)
    found["fidelity"] = fidelity(model, samples, models / "top_k")
    found["gradients"] = gradients(model, few, models)
    return found


def write(mode: str, model: Any, models: Path, samples: Sequence[Sample]) -> dict[str, Any]:
    """Fill a cache; seconds are those of scoring and writing, without loading."""
    name, out = str(models / "teacher"), models / mode
    config = CacheConfig(mode=mode)  # type: ignore[arg-type]
    spec = spec_of(model, name, "benchmark", vocabulary_size(load_tokenizer(name)), config)
    # A first, short pass through the model, so that its one-time costs are not in the figure.
    build_cache(model, spec, asked(samples[:1]), out.with_name("warm-up-" + mode))
    start = time.perf_counter()
    counts = build_cache(model, spec, asked(samples), out)
    seconds = time.perf_counter() - start
    write_manifest(out, stage="teacher cache", config=config, inputs={}, metrics=counts)
    seal(out)
    return stats(out) | {"write_tokens_per_second": counts["positions_scored"] / seconds}


def open_cache(directory: Path, teacher: Any) -> TeacherCache:
    weight, bias = head_of(teacher)
    return TeacherCache(directory, Head(weight, bias))


def read(model: Any, samples: Sequence[Sample], directory: Path) -> dict[str, Any]:
    """Positions a second, for batches in the order of the traces; the second of two passes."""
    cache = open_cache(directory, model)
    examples = [make_example(sample, UNCUT, RESPONSE) for sample in samples]
    groups = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    batches = [collate(group, "packed", 0) for group in groups]
    for _ in range(2):
        start = time.perf_counter()
        count = 0
        for batch, group in zip(batches, groups, strict=True):
            rows = batch.target_rows()
            count += len(cache.targets(batch, group, rows, Ledger()))
        seconds = time.perf_counter() - start
    return {"read_tokens_per_second": count / seconds}


def fidelity(model: Any, samples: Sequence[Sample], directory: Path) -> dict[str, Any]:
    """KL from the full teacher over all stored positions: to the cache, and to the plain top 50."""
    live = LiveTeacher(model)
    cache, sums, count = TeacherCache(directory), {"cache": 0.0, "plain": 0.0}, 0
    for sample in samples:
        group = [make_example(sample, UNCUT, RESPONSE)]
        batch = collate(group, "packed", 0)
        rows = batch.target_rows()
        full = torch.cat(list(_log_probs(live.targets(batch, group, rows, Ledger()))))
        sums["cache"] += float(reconstruction_kl(full, cache.targets(batch, group, rows, Ledger())).sum())
        sums["plain"] += float(reconstruction_kl(full, reduce(full, PLAIN, torch.float16)).sum())
        count += len(rows)
    return {name: value / count for name, value in sums.items()}


def gradients(model: Any, samples: Sequence[Sample], models: Path) -> dict[str, Any]:
    """Relative errors of one step's loss and gradient, by teacher."""
    live = LiveTeacher(model)
    teachers: dict[str, Teacher] = {mode: open_cache(models / mode, model) for mode in MODES}
    teachers["plain_top50"] = LiveEntries(live, PLAIN, torch.float16)
    exact = step(models, samples, live)
    entries = step(models, samples, LiveEntries(live, CacheConfig(), torch.float32))
    found: dict[str, Any] = {"student_kl_nats": exact[0]}
    for name, teacher in teachers.items():
        loss, gradient = step(models, samples, teacher)
        found[name] = {
            "loss_relative_error": abs(loss / exact[0] - 1),
            "gradient_relative_error": float((gradient - exact[1]).norm() / exact[1].norm()),
        }
        if name == "top_k":
            found[name]["loss_relative_error_over_live_entries"] = abs(loss / entries[0] - 1)
            error = (gradient - entries[1]).norm() / entries[1].norm()
            found[name]["gradient_relative_error_over_live_entries"] = float(error)
    return found


def step(models: Path, samples: Sequence[Sample], teacher: Teacher) -> tuple[float, Tensor]:
    """Loss and gradient of all parameters."""
    student = load_model(str(models / "student"), layout="packed").train()
    examples = [make_example(sample, UNCUT, RESPONSE) for sample in samples]
    given = Student.of(student, load_tokenizer(str(models / "student")))
    wanted, value = StepLoss(LossConfig(), 1.0, step_totals(examples, "token_mean")), 0.0
    for start in range(0, len(examples), BATCH):
        group = examples[start : start + BATCH]
        batch = collate(group, "packed", 0)
        loss = Distillation()(MicroBatch(given, teacher, batch, group, wanted, Ledger()))
        assert loss is not None
        loss.total.backward()
        value += float(loss.kd_sum)
    return value, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def save_small_student(models: Path) -> dict[str, Any]:
    """The first layers of the teacher as the student of the sweep."""
    model = load_model(str(models / "teacher"))
    model.model.layers = model.model.layers[:STUDENT_LAYERS]
    model.config.num_hidden_layers = STUDENT_LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:STUDENT_LAYERS]
    model.save_pretrained(models / "small")
    load_tokenizer(str(models / "teacher")).save_pretrained(models / "small")
    return {}


def sweep(models: Path, samples: Sequence[Sample], threads: int) -> dict[str, Any]:
    """Seconds of every epoch with the cache and with the live teacher, in turn, and of filling the cache."""
    torch.set_num_threads(threads)
    teacher = load_model(str(models / "teacher"), layout="packed")
    live, cache = LiveTeacher(teacher), TeacherCache(models / "top_k")
    spec = cache.spec
    start = time.perf_counter()
    build_cache(teacher, spec, asked(samples), models / "swept")
    found: dict[str, Any] = {"write_seconds": time.perf_counter() - start, "cached": [], "live": []}
    for fraction in FRACTIONS:
        found["cached"].append(epoch(fraction, live, cache, models, samples, threads))
        found["live"].append(epoch(fraction, live, live, models, samples, threads))
    return found


def epoch(
    fraction: float, live: Teacher, teacher: Teacher, models: Path, samples: Sequence[Sample], threads: int
) -> dict[str, Any]:
    """Seconds of one epoch at a lead fraction of the response, and those of the teacher in it."""
    cut = TruncationConfig(lead_fraction=fraction, unit="response")
    examples = [make_example(sample, cut, RESPONSE) for sample in samples]
    batches = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    # The warm-up is on prompts, which are not in the cache.
    run = set_up(models / "small", live, samples[:BATCH], batches, threads)
    train._step(run, 0)
    run = run._replace(teacher=teacher)
    teacher_seconds = run.ledger.seconds["teacher"]
    start = time.perf_counter()
    for number in range(1, len(run.steps)):
        train._step(run, number)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "teacher_seconds": run.ledger.seconds["teacher"] - teacher_seconds}


def measure(quick: bool, threads: int, scratch: Path) -> dict[str, Any]:
    """All measurements."""
    fresh(save_models, scratch, 0.1)
    fresh(save_small_student, scratch)
    samples = render_traces(gsm_traces(6 if quick else 128), scratch / "teacher")
    few, swept = (samples[:2], samples[:4]) if quick else (samples[:32], samples[:48])
    return fresh(modes, scratch, samples, few, threads) | {"sweep": fresh(sweep, scratch, swept, threads)}


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """The keys of the claims: names end in the mode."""
    keys: dict[str, Any] = {}
    kl = {"top_k": found["fidelity"]["cache"], "sampled": None, "hidden": 0.0}
    for mode in MODES:
        row = found[mode] | found["gradients"][mode] | {"kl_to_full_teacher_nats": kl[mode]}
        for name in (
            "bytes_per_token",
            "kl_to_full_teacher_nats",
            "write_tokens_per_second",
            "read_tokens_per_second",
            "loss_relative_error",
            "gradient_relative_error",
        ):
            keys[f"{name}_{mode}"] = row[name]
    for name in ("loss_relative_error", "gradient_relative_error"):
        keys[f"{name}_top_k_over_live_entries"] = found["gradients"]["top_k"][f"{name}_over_live_entries"]
        keys[f"{name}_plain_top50"] = found["gradients"]["plain_top50"][name]
    keys["bytes_per_token_plain_top50"] = 50 * (4 + 2) + 2
    keys["kl_to_full_teacher_nats_plain_top50"] = found["fidelity"]["plain"]
    keys["bytes_per_token_distillkit_published"] = [114, 300]
    swept = found["sweep"]
    live = sum(answer["seconds"] for answer in swept["live"])
    cached = sum(answer["seconds"] for answer in swept["cached"]) + swept["write_seconds"]
    keys["sweep_cost_over_live_teacher"] = cached / live
    keys["teacher_share_of_live_seconds"] = sum(answer["teacher_seconds"] for answer in swept["live"]) / live
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in keys.items()}


def table_of(keys: dict[str, Any]) -> str:
    """One row a form."""
    names = ["bytes_per_token", "kl_to_full_teacher_nats", "loss_relative_error", "gradient_relative_error"]
    names += ["write_tokens_per_second", "read_tokens_per_second"]
    rows = []
    for form in (*MODES, "plain_top50"):
        values = [keys.get(f"{name}_{form}") for name in names]
        rows.append([form, *("-" if value is None else f"{value:.4g}" for value in values)])
    return markdown(["form", *(name.replace("_", " ") for name in names)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="6 traces, about a minute")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="directory for teacher_cache.md and teacher_cache.json")
    options = parser.parse_args()
    header = conditions(options.threads, ("torch", "transformers"))
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options.quick, options.threads, Path(scratch))
    keys = summarise(found)
    publish("teacher_cache", __doc__, header, table_of(keys), keys, found, options.out)


if __name__ == "__main__":
    main()
