"""The stage `traces complete`: the teacher's beginning of each trace, finished by the student; what is right stays.

1. Traces are cut by a policy, as a run would cut them.
2. The student writes on from every cut, `num_samples` times; what it has written goes to a journal at once.
3. The answers are checked. The first right completion makes the trace whole again: the teacher's beginning, the
   student's rest. Where none is right, the beginning stays as a thought without an end, or the trace goes.

A run on these traces trains on both parts, and its ledger has what the completions cost (`distill.output`). The teacher
is asked about the student's part as about any text, so a cache is made of these traces, not of the old ones.

Source: P-ALIGN (arXiv 2601.10064). Differs: the cut is any policy of `truncation` and not a search by the student for
the shortest sufficient beginning, and the cost is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from limbeck.checkpoint import STATE_PREFIX, Checkpoint, hash_path, output_directory, write_manifest
from limbeck.config import checked, config_hash, to_dict
from limbeck.cost.hardware import Hardware
from limbeck.cost.prediction import Prediction
from limbeck.cost.sampling import predict_sampling
from limbeck.cost.shapes import config_of
from limbeck.engine.complete import complete
from limbeck.engine.sampling import SeededSampling
from limbeck.errors import ConfigError, TraceFormatError
from limbeck.evaluate.answers import AnswerStyle, Verdict, extract_answer
from limbeck.evaluate.checking import CheckName, check_answers
from limbeck.ledger import Ledger, decoding_flops
from limbeck.models.anatomy import Sizes, sizes_of
from limbeck.models.load import load_model, load_tokenizer, model_hash, vocabulary_size
from limbeck.progress import bar
from limbeck.stage import How
from limbeck.traces.counts import tell
from limbeck.traces.fit import fit
from limbeck.traces.generation import TRACES_FILE
from limbeck.traces.journal import Journal
from limbeck.traces.render import RenderConfig, stop_ids
from limbeck.traces.rendering import render_traces
from limbeck.traces.sample import PROMPT, Sample
from limbeck.traces.select import SelectConfig, select_traces
from limbeck.traces.sources import TraceConfig, path_of, read_traces
from limbeck.traces.thought import Markers, split_thought
from limbeck.traces.trace import Trace, write_jsonl
from limbeck.traces.truncate import TruncationConfig, truncate

JOURNAL_FILE = STATE_PREFIX + "journal.jsonl"


@checked
class CompleteConfig:
    """Which traces are cut, and who finishes them."""

    traces: TraceConfig
    """Where the traces come from; those without a reference answer cannot be checked, so they stay cut."""
    student: str
    """Directory, alias or hub id of the model that finishes them."""
    truncation: TruncationConfig
    """Where they are cut; the end must go: keep_ending and mask_only have no meaning here."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which of the traces are used."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How text becomes tokens."""
    sampling: SeededSampling = field(default_factory=SeededSampling)
    """Completions a trace, temperature, top-p, length and seed."""
    failed: Literal["cut", "drop"] = "cut"
    """Traces without a right completion: keep their beginning as it was cut, or leave them out."""
    checker: CheckName = "math"
    """How answers are compared: math (math-verify) or exact (text or number)."""
    answer_style: AnswerStyle = "auto"
    """Where the answer stands after the thought."""
    group_traces: int = 64
    """Traces that are finished between two writes to the journal: what an interruption can cost."""

    def __post_init__(self) -> None:
        cut = self.truncation
        if cut.keep_ending or cut.mask_only or cut.policy in ("middle", "tail", "random_span"):
            raise ConfigError("truncation must leave the beginning of a trace and nothing behind it")
        if self.group_traces < 1:
            raise ConfigError(f"group_traces must be at least 1; found {self.group_traces}")


class CutTrace(NamedTuple):
    """A trace, its tokens and where they are cut."""

    trace: Trace
    sample: Sample
    kept: int
    """Tokens up to the cut."""

    @property
    def is_open(self) -> bool:
        """Whether there is a thought to finish: the cut lies behind the prompt and before the ending."""
        return int(np.sum(self.sample.segment_ids == PROMPT)) < self.kept < self.sample.ending_start


def run(config: CompleteConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `traces.jsonl` and a manifest into `out`; started again after an interruption, it goes on."""
    model, tokenizer, ledger = load_model(config.student), load_tokenizer(config.student), Ledger()
    cuts = cut_traces(config, tokenizer)
    to_finish = [cut for cut in cuts if cut.is_open]
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as working:
        job = config_hash({"config": to_dict(config), "traces": [cut.trace.key for cut in cuts]})
        with Journal(working / JOURNAL_FILE, job) as journal, ledger.phase("sampling"):
            _fill(config, to_finish, model, tokenizer, journal)
            _charge(config, to_finish, sizes_of(model, vocabulary_size(tokenizer)), journal, ledger)
        chosen = right_completions(config, to_finish, tokenizer, journal)
        finished = list(_joined(config, cuts, chosen, tokenizer))
        if not finished:
            raise ConfigError(f"no completion of {len(cuts)} traces is right; keep more, or set failed to cut")
        write_jsonl(finished, working / TRACES_FILE)
        counts = {"traces": len(cuts), "cut": len(to_finish), "right": len(chosen), "written": len(finished)}
        source = path_of(config.traces.source)
        write_manifest(
            working,
            stage="traces complete",
            config=config,
            inputs={"student": model_hash(config.student)} | ({"traces": hash_path(source)} if source.exists() else {}),
            ledger=ledger.as_dict(),
            metrics=counts,
            counts=counts,
        )
    (out / JOURNAL_FILE).unlink()
    return Checkpoint(out)


def predict_complete(
    config: CompleteConfig, *, student: Any = None, tokenizer: Any = None, hardware: Hardware | None = None
) -> Prediction:
    """Cost of the stage, every completion as long as what was cut away, in the mean."""
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.student)
    cuts = [cut for cut in cut_traces(config, tokenizer) if cut.is_open]
    rest = [len(cut.sample) - cut.kept for cut in cuts]
    written = max(1, min(config.sampling.max_new_tokens, round(float(np.mean(rest))))) if rest else 1
    shape = student if student is not None else config_of(config.student)
    lengths = [cut.kept for cut in cuts]
    vocab = vocabulary_size(tokenizer)
    return predict_sampling("traces complete", shape, lengths, written, config.sampling, hardware, vocab)


def cut_traces(config: CompleteConfig, tokenizer: Any) -> list[CutTrace]:
    """The traces that are read and selected, with their cuts."""
    traces, read = read_traces(config.traces)
    traces, selected = select_traces(traces, config.select)
    samples, _, notes = render_traces(traces, tokenizer, config.render, on_bad=config.traces.on_bad)
    tell([*read.lines(), *selected.lines(), *notes])
    by_key = {trace.key: trace for trace in traces}
    policy = fit(config.truncation, samples)
    return [CutTrace(by_key[sample.trace_key], sample, len(truncate(sample, policy).kept)) for sample in samples]


def _fill(config: CompleteConfig, cuts: Sequence[CutTrace], model: Any, tokenizer: Any, journal: Journal) -> None:
    """Have every completion in the journal; a group is always sampled as a whole, with a seed of its own."""
    stops = stop_ids(tokenizer, config.render)
    with bar("completing", len(cuts)) as progress:
        for number, group in _groups(cuts, config.group_traces):
            if not all((cut.trace.key, s) in journal for cut in group for s in range(config.sampling.num_samples)):
                prompts = [cut.sample.input_ids[: cut.kept].tolist() for cut in group]
                seed = config.sampling.seed * 2**32 + number
                found = complete(model, prompts, config.sampling, stops, seed)
                journal.add(
                    {
                        (cut.trace.key, sample): asdict(completion)
                        for cut, row in zip(group, found, strict=True)
                        for sample, completion in enumerate(row)
                    }
                )
            progress.advance(len(group))


def _groups(cuts: Sequence[CutTrace], size: int) -> Iterator[tuple[int, Sequence[CutTrace]]]:
    return ((start // size, cuts[start : start + size]) for start in range(0, len(cuts), size))


def _charge(config: CompleteConfig, cuts: Sequence[CutTrace], sizes: Sizes, journal: Journal, ledger: Ledger) -> None:
    """Every completion, whether it was of use or not."""
    for cut in cuts:
        written = [
            len(journal.records[cut.trace.key, sample]["token_ids"]) for sample in range(config.sampling.num_samples)
        ]
        ledger.count(rollout_tokens=sum(written))
        ledger.add_flops(sampling=decoding_flops(sizes, cut.kept, written))


def right_completions(
    config: CompleteConfig, cuts: Sequence[CutTrace], tokenizer: Any, journal: Journal
) -> dict[str, Trace]:
    """By key of the trace that was cut, the trace with its first right completion; traces without one are left out."""
    tried = [
        (cut, trace)
        for cut in cuts
        for sample in range(config.sampling.num_samples)
        if (trace := _completed(config, cut, journal.records[cut.trace.key, sample], tokenizer)) is not None
    ]
    answers = [
        (extract_answer(trace.answer or "", config.answer_style, trace.reference), trace.reference)
        for _, trace in tried
    ]
    found: dict[str, Trace] = {}
    for (cut, trace), verdict in zip(tried, check_answers(answers, config.checker), strict=True):
        if verdict is Verdict.RIGHT:
            found.setdefault(cut.trace.key, replace(trace, correct=True))
    return found


def _completed(config: CompleteConfig, cut: CutTrace, record: dict[str, Any], tokenizer: Any) -> Trace | None:
    """The trace with this completion; None where that has no end."""
    if not record["stopped"]:
        return None
    prompt = int(np.sum(cut.sample.segment_ids == PROMPT))
    ids = [*cut.sample.input_ids[prompt : cut.kept].tolist(), *record["token_ids"][:-1]]
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    markers = Markers(config.render.start_marker, config.render.end_marker)
    try:
        thought = split_thought(text, markers)
    except TraceFormatError:
        return None
    if thought.problem is not None or thought.cot is None or not thought.answer:
        return None
    return replace(
        cut.trace,
        cot=thought.cot,
        answer=thought.answer,
        metadata={**cut.trace.metadata, "completed_from_tokens": cut.kept},
    )


def _joined(
    config: CompleteConfig, cuts: Sequence[CutTrace], chosen: dict[str, Trace], tokenizer: Any
) -> Iterator[Trace]:
    """What is written, in the order of the traces: completed, as they were, or cut."""
    for cut in cuts:
        if not cut.is_open:
            yield cut.trace
        elif cut.trace.key in chosen:
            yield chosen[cut.trace.key]
        elif config.failed == "cut":
            yield beginning(cut, tokenizer, config.render)


def beginning(cut: CutTrace, tokenizer: Any, render: RenderConfig) -> Trace:
    """The trace up to its cut, its thought left open."""
    prompt = int(np.sum(cut.sample.segment_ids == PROMPT))
    text = tokenizer.decode(cut.sample.input_ids[prompt : cut.kept], clean_up_tokenization_spaces=False)
    thought = text.removeprefix(render.start_marker).lstrip("\n")
    return replace(cut.trace, cot=thought, answer=None, cot_closed=False)
