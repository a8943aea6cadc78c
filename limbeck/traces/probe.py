"""`limbeck traces probe`: for each trace, the earliest point at which the teacher already knows the answer.

1. Checkpoints are marked along the thought: ends of lines, ends of sentences, or every so many tokens.
2. The teacher reads prompt and thought once, over a key-value cache.
3. Behind each checkpoint the end marker is forced and the verified answer appended. These tails are laid side by side
   in one pass over that cache, each attending to the prefix before its checkpoint and to itself, so that a probe costs
   its own few tokens and no more. Tails go in chunks, earliest first, until one is sure enough.
4. The cut point is the first checkpoint whose answer has at least `min_probability`; it is stored in the trace's
   metadata as characters of the thought, so any tokenizer can use it: `truncation: {policy: probed}`.

Own method. Its relatives stop the *student* early by confidence; here a teacher marks training text, once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.checkpoint import Checkpoint, hash_path, output_directory, write_manifest
from limbeck.config import checked
from limbeck.engine.backend import Backend
from limbeck.engine.backends import decoder_of
from limbeck.engine.states import Segment
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger, backbone_forward_flops, head_forward_flops
from limbeck.models.anatomy import Computed, Sizes, sizes_of
from limbeck.models.load import load_model, load_tokenizer, model_hash, vocabulary_size
from limbeck.models.placement import here
from limbeck.progress import bar
from limbeck.stage import How
from limbeck.traces.counts import tell
from limbeck.traces.render import PROBED_CHARS, LocatedSample, RenderConfig, render_located, tokens_until
from limbeck.traces.select import SelectConfig, select_traces
from limbeck.traces.sources import TraceConfig, path_of, read_traces
from limbeck.traces.trace import Trace, write_jsonl

MARKS = {"lines": r"\n", "sentences": r"[.!?](?=\s|$)|\n"}


@checked
class ProbeConfig:
    """Which traces are probed, by whom, and when the teacher counts as sure."""

    traces: TraceConfig
    """Where the traces come from; only those not known to be wrong are probed."""
    teacher: str
    """Directory, alias or hub id of the model that is probed."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which traces are used."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How text becomes tokens."""
    checkpoints: Literal["lines", "sentences", "tokens"] = "lines"
    """Where the thought may be cut: behind lines, behind sentences, or anywhere every `every_tokens`."""
    every_tokens: int = 16
    """Least distance between checkpoints in tokens."""
    min_probability: float = 0.9
    """Probability of the whole verified answer from which on the teacher counts as sure, 0 < x < 1. Near 1, because a
    short answer can be a lucky guess before anything is derived."""
    answer_template: str = "{answer}"
    """What is forced behind the end marker; only the tokens of {answer} count. For mathematics, for example
    "The answer is \\boxed{answer}"."""
    tail_tokens: int = 1024
    """Most probe tokens in one forward pass."""

    def __post_init__(self) -> None:
        for name in ("every_tokens", "tail_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; found {getattr(self, name)}")
        if not 0 < self.min_probability < 1:
            raise ConfigError(f"min_probability must be in (0, 1); found {self.min_probability}")
        if self.answer_template.count("{answer}") != 1:
            raise ConfigError(f"answer_template must hold {{answer}} once; found {self.answer_template!r}")


class Tail(NamedTuple):
    """What is forced behind a checkpoint."""

    ids: list[int]
    """End marker, blank line, template and answer."""
    scored: range
    """Places of the answer's tokens in `ids`."""


def run(config: ProbeConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write the traces with their cut points, `traces.jsonl`, and a manifest into `out`."""
    traces, read = read_traces(config.traces)
    traces, selected = select_traces(traces, config.select)
    tell([*read.lines(), *selected.lines()])
    model, tokenizer, ledger = load_model(config.teacher), load_tokenizer(config.teacher), Ledger(here().device)
    decoder, sizes = decoder_of(model), sizes_of(model, vocabulary_size(tokenizer))
    probed: list[Trace] = []
    shares: list[float] = []
    with output_directory(out, overwrite=how.overwrite) as working:
        with bar("probing", len(traces)) as progress, ledger.phase("teacher"):
            for trace in traces:
                found = probe_trace(decoder, tokenizer, trace, config, sizes, ledger)
                shares += [] if found is None else [found[1]]
                metadata = {k: v for k, v in trace.metadata.items() if k != PROBED_CHARS}
                probed.append(
                    replace(trace, metadata=metadata if found is None else metadata | {PROBED_CHARS: found[0]})
                )
                progress.advance(1)
        write_jsonl(probed, working / "traces.jsonl")
        counts = {"traces": len(traces), "with_cut_point": len(shares)}
        metrics = {"mean_kept_fraction": float(np.mean(shares)) if shares else None}
        source = path_of(config.traces.source)
        write_manifest(
            working,
            stage="traces probe",
            config=config,
            inputs={"teacher": model_hash(config.teacher)} | ({"traces": hash_path(source)} if source.exists() else {}),
            ledger=ledger.as_dict(),
            metrics=counts | metrics,
            counts=counts,
        )
    return Checkpoint(out)


def probe_trace(
    decoder: Backend, tokenizer: Any, trace: Trace, config: ProbeConfig, sizes: Sizes, ledger: Ledger
) -> tuple[int, float] | None:
    """Characters of the thought up to the cut point, and that prefix's share of the sequence; None without one."""
    answer = (trace.reference if trace.reference is not None else trace.answer) or ""
    if trace.correct is False or not all(map(str.strip, (answer, trace.cot or ""))):
        return None
    located = render_located(trace, tokenizer, config.render)
    marks = checkpoints(located, config)
    if not marks:
        return None
    tails = [_tail(tokenizer, config, answer.strip(), _ends_line(located, mark)) for mark in marks]
    ids = located.sample.input_ids[: marks[-1]].tolist()
    ledger.count(tokens=len(ids), sequences=1)
    threshold = float(np.log(config.min_probability))
    for number, log_prob in enumerate(answer_log_probs(decoder, ids, marks, tails, config.tail_tokens, sizes, ledger)):
        if log_prob >= threshold:
            return int(located.ends[marks[number] - 1]), marks[number] / len(located.sample)
    return None


def checkpoints(located: LocatedSample, config: ProbeConfig) -> list[int]:
    """Lengths in tokens of the prefixes that are probed, increasing; the last is the whole thought."""
    sample, ends = located.sample, located.ends
    first = int(np.searchsorted(ends, 0, side="right"))
    if config.checkpoints == "tokens":
        wanted = list(range(first + config.every_tokens, sample.ending_start, config.every_tokens))
    else:
        places = [match.end() for match in re.finditer(MARKS[config.checkpoints], located.thought)]
        wanted = sorted({tokens_until(ends, place) for place in places if place > 0})
    marks: list[int] = []
    for mark in wanted:
        if mark < sample.ending_start and mark - (marks[-1] if marks else first) >= config.every_tokens:
            marks.append(mark)
    return [*marks, sample.ending_start]


def answer_log_probs(
    decoder: Backend,
    ids: Sequence[int],
    marks: Sequence[int],
    tails: Sequence[Tail],
    tail_tokens: int,
    sizes: Sizes,
    ledger: Ledger,
) -> Iterator[float]:
    """Log-probability of the answer behind each checkpoint, one after the other; what is not asked for is not computed.

    Args:
      decoder: of the teacher.
      ids: prompt and thought, T tokens.
      marks: prefix lengths, the last T at most.
      tails: what is forced behind each.
    """
    states = decoder.states(len(ids))
    decoder.run([Segment(ids, states, 0, grows=True)])
    ledger.add_flops(teacher=backbone_forward_flops(sizes, Computed(len(ids), 1, len(ids) ** 2)))
    lengths = [len(tail.ids) for tail in tails]
    for group in _groups(lengths, tail_tokens):
        rows = decoder.run([Segment(tails[i].ids, states, marks[i]) for i in group], every_row=True)
        scored = sum(len(tails[i].scored) for i in group)
        pairs = sum(lengths[i] * (marks[i] + lengths[i]) for i in group)
        products = 2 * sizes.linear_weights * len(rows) + 4 * sizes.attention_width * pairs
        ledger.add_flops(teacher=products + head_forward_flops(sizes, scored))
        ledger.count(supervised_tokens=scored)
        yield from _log_probs(decoder, rows, [tails[i] for i in group])


def _log_probs(decoder: Backend, rows: Tensor, tails: Sequence[Tail]) -> Iterator[float]:
    """Of the scored tokens of each tail, of states [T D] behind all tokens of all tails."""
    starts = np.cumsum([0, *(len(tail.ids) for tail in tails)])
    places = torch.tensor([int(s) + i for s, tail in zip(starts, tails, strict=False) for i in tail.scored])
    flat = torch.tensor([token for tail in tails for token in tail.ids])
    logits = decoder.logits(rows[(places - 1).to(rows.device)])
    values = torch.log_softmax(logits, -1).gather(1, flat[places, None].to(logits.device))[:, 0].double().cpu()
    yield from (float(v.sum()) for v in values.split([len(tail.scored) for tail in tails]))


def _tail(tokenizer: Any, config: ProbeConfig, answer: str, behind_newline: bool) -> Tail:
    before, after = config.answer_template.split("{answer}")
    lead = ("" if behind_newline else "\n") + config.render.end_marker + "\n\n" + before
    encoded = tokenizer(lead + answer + after, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    start = next(i for i, end in enumerate(ends) if end > len(lead))
    stop = next(i for i, end in enumerate(ends) if end >= len(lead + answer)) + 1
    return Tail(list(encoded["input_ids"])[:stop], range(start, stop))


def _ends_line(located: LocatedSample, mark: int) -> bool:
    return (located.thought + "\n")[: int(located.ends[mark - 1])].endswith("\n")


def _groups(lengths: Sequence[int], limit: int) -> list[range]:
    """Consecutive tails of `limit` tokens together, at least one each."""
    groups: list[range] = []
    start = total = 0
    for number, length in enumerate(lengths):
        if number > start and total + length > limit:
            groups.append(range(start, number))
            start, total = number, 0
        total += length
    return [*groups, range(start, len(lengths))]
