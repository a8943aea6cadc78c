"""`limbeck traces show`: a trace with its segments coloured, its cut marked and its weights beside it.

The text is that of the tokens, so what is seen is what a model is given. Labels such as [cot] and "| cut here |" stand
in the text as well, because a pipe has no colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.models.load import load_tokenizer
from limbeck.traces.counts import tell
from limbeck.traces.fit import fit
from limbeck.traces.render import RenderConfig
from limbeck.traces.render_turns import samples_of
from limbeck.traces.rendering import notes_on
from limbeck.traces.sample import SEGMENT_NAMES, Sample
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.supervise import SupervisionConfig, token_weights
from limbeck.traces.trace import Trace
from limbeck.traces.truncate import ACROSS_TRACES, TruncationConfig, apply_cut, truncate

COLOURS = ("cyan", "yellow", "green")
"""Of prompt, cot and answer."""
TRAINED, CONTEXT, DROPPED = 0, 1, 2
"""State of a token after the cut: it may carry loss, it is only read, it is gone."""
STATE_STYLES = ("", "dim italic", "dim strike")
CUT_MARKS = ("| loss and text go on here |", "| loss cut here, text stays |", "| cut here |")


@checked
class ShowConfig:
    """Which traces are shown, and how they are rendered, cut and weighed."""

    traces: TraceConfig
    """Where the traces are read from."""
    tokenizer: str
    """Model directory, alias or hub id whose tokenizer and chat template are used."""
    num: int = 1
    """How many traces are shown, >= 1."""
    start: int = 0
    """Number of the first one, counted from 0."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How text becomes tokens."""
    truncation: TruncationConfig = field(default_factory=TruncationConfig)
    """The cut that is marked."""
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    """The weights that are listed."""
    show_tokens: bool = False
    """List every token with its id, segment and weights."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ConfigError(f"num: {self.num}; expected 1 or more")
        if self.start < 0:
            raise ConfigError(f"start: {self.start}; expected 0 or more")


class CutView(NamedTuple):
    """A whole sample of T tokens beside what a cut and a supervision make of it."""

    sample: Sample
    states: np.ndarray
    """int8 [T]: TRAINED, CONTEXT or DROPPED."""
    ce_weight: np.ndarray
    """float32 [T]; 0 where the token is dropped."""
    kd_weight: np.ndarray
    """float32 [T]."""


def run(config: ShowConfig) -> None:
    """Print the traces to standard output.

    Raises: ConfigError when the source has fewer traces, and what reading, loading and rendering raise.
    """
    limit = config.start + config.num
    is_alone = config.truncation.policy not in ACROSS_TRACES
    number = min(limit, config.traces.num_traces or limit) if is_alone else config.traces.num_traces
    traces, read = read_traces(replace(config.traces, num_traces=number))
    if config.start >= len(traces):
        raise ConfigError(f"start: {config.start}; {config.traces.source} has {len(traces)} traces, counted from 0.")
    tokenizer = load_tokenizer(config.tokenizer)
    tell([*read.lines(), *notes_on(traces[config.start :], tokenizer, config.render)])
    console, cut = Console(), config.truncation
    if not is_alone:
        cut = fit(cut, [sample for trace in traces for sample in samples_of(trace, tokenizer, config.render)])
    shown = [
        (trace, f"trace {index}" if len(found) == 1 else f"trace {index}, sequence {number} of {len(found)}", sample)
        for index, trace in enumerate(traces[config.start : limit], start=config.start)
        for found in [samples_of(trace, tokenizer, config.render)]
        for number, sample in enumerate(found, 1)
    ]
    for trace, name, sample in shown:
        view = view_cut(sample, cut, config.supervision)
        console.print(_heading(trace, name), soft_wrap=True)
        console.print(trace_text(view, tokenizer), soft_wrap=True)
        console.print()
        console.print(segment_table(view, config.supervision))
        console.print(landmarks(view), soft_wrap=True)
        if config.show_tokens:
            console.print(token_table(view, tokenizer))
        console.print()


def view_cut(sample: Sample, truncation: TruncationConfig, supervision: SupervisionConfig) -> CutView:
    """What becomes of every token of a whole sample."""
    cut = truncate(sample, truncation)
    states = np.full(len(sample), DROPPED, dtype=np.int8)
    states[cut.kept] = np.where(cut.supervised, TRAINED, CONTEXT)
    weights = []
    for kept_weight in token_weights(apply_cut(sample, cut), cut.loss_weight(), supervision):
        weight = np.zeros(len(sample), dtype=np.float32)
        weight[cut.kept] = kept_weight
        weights.append(weight)
    return CutView(sample, states, *weights)


def trace_text(view: CutView, tokenizer: Any) -> Text:
    """The text of all tokens, with a label where a segment begins and a mark where the cut begins or ends."""
    text = Text()
    segment, state = None, TRAINED
    for first, last in _runs(view):
        if (new_state := int(view.states[first])) != state:
            text.append(f" {CUT_MARKS[new_state]} ", style="bold red")
        if (new_segment := int(view.sample.segment_ids[first])) != segment:
            text.append(f"[{SEGMENT_NAMES[new_segment]}] ", style=f"bold reverse {COLOURS[new_segment]}")
        segment, state = new_segment, new_state
        style = f"{COLOURS[segment]} {STATE_STYLES[state]}".strip()
        text.append(_printable(_decode_span(view.sample.input_ids, first, last, tokenizer)), style=style)
    return text


def segment_table(view: CutView, supervision: SupervisionConfig) -> Table:
    """Token counts and loss weights of the three segments: the legend of the colours."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("segment", "tokens", "share", "kept", "CE weight", "CE tokens", "KD weight", "KD tokens"):
        table.add_column(name, justify="left" if name == "segment" else "right")
    ce, kd = supervision.weights()
    for index, name in enumerate(SEGMENT_NAMES):
        inside = view.sample.segment_ids == index
        table.add_row(
            Text(name, style=COLOURS[index]),
            str(int(inside.sum())),
            f"{inside.sum() / max(1, len(view.sample)):.3f}",
            str(int((inside & (view.states != DROPPED)).sum())),
            f"{getattr(ce, name):g}",
            str(int((inside & (view.ce_weight > 0)).sum())),
            f"{getattr(kd, name):g}",
            str(int((inside & (view.kd_weight > 0)).sum())),
        )
    return table


def landmarks(view: CutView) -> Text:
    """Length before and after the cut, and where the first derivation and the ending stand."""
    sample, length = view.sample, len(view.sample)
    kept = int((view.states != DROPPED).sum())
    lines = [f"tokens: {length}, kept {kept} ({kept / max(1, length):.3f}), dropped {length - kept}"]
    end = sample.derivation_end
    lines.append(f"first derivation: {'not found' if end is None else _place(end - 1, view)}")
    name = "end marker" if sample.has_end_marker else "answer" if sample.ending_start < length else "ending"
    lines.append(f"{name}: {_place(sample.ending_start, view) if sample.ending_start < length else 'missing'}")
    for number, turn in enumerate(sample.turns, 1):
        weight = f", weight {turn.weight:g}" if turn.weight != 1 else ""
        lines.append(f"turn {number}: tokens {turn.start} to {turn.stop - 1}, answer from {turn.ending}{weight}")
    return Text("\n".join(lines))


def token_table(view: CutView, tokenizer: Any) -> Table:
    """One line a token: number, id, text, segment, state and weights."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("number", "id", "text", "segment", "state", "CE", "KD"):
        table.add_column(name, justify="left" if name in ("text", "segment", "state") else "right", no_wrap=True)
    for index, token in enumerate(view.sample.input_ids):
        segment, state = int(view.sample.segment_ids[index]), int(view.states[index])
        table.add_row(
            str(index),
            str(int(token)),
            Text(repr(tokenizer.decode([int(token)])), style=COLOURS[segment]),
            SEGMENT_NAMES[segment],
            ("kept", "context only", "dropped")[state],
            f"{view.ce_weight[index]:g}",
            f"{view.kd_weight[index]:g}",
        )
    return table


def _heading(trace: Trace, name: str) -> Text:
    verdict = {True: "right", False: "wrong", None: "not verified"}[trace.correct]
    parts = [name, trace.source, f"key {trace.key}", verdict]
    if trace.reference is not None:
        parts.append(f"reference {trace.reference}")
    return Text(_printable(" · ".join(part for part in parts if part)), style="bold")


def _place(index: int, view: CutView) -> str:
    state = ("kept", "kept without loss", "lost")[int(view.states[index])]
    return f"token {index} of {len(view.sample)} ({(index + 1) / len(view.sample):.3f}), {state}"


def _runs(view: CutView) -> Iterator[tuple[int, int]]:
    """Bounds of the longest stretches of one segment and one state."""
    code = view.sample.segment_ids.astype(np.int64) * len(STATE_STYLES) + view.states
    borders = np.flatnonzero(np.diff(code)) + 1
    return pairwise([0, *borders.tolist(), len(code)])


def _decode_span(input_ids: np.ndarray, first: int, last: int, tokenizer: Any) -> str:
    # Decoded from the beginning, since some tokenizers drop the space in front of whatever is decoded first.
    before = tokenizer.decode(input_ids[:first].tolist(), clean_up_tokenization_spaces=False) if first else ""
    return tokenizer.decode(input_ids[:last].tolist(), clean_up_tokenization_spaces=False)[len(before) :]


def _printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
