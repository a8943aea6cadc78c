"""`limbeck traces stats`: how long traces are, what they consist of, and what a cut would take from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, field, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from limbeck.config import checked
from limbeck.models.load import load_tokenizer
from limbeck.traces.counts import tell
from limbeck.traces.fit import fit
from limbeck.traces.render import RenderConfig
from limbeck.traces.rendering import render_traces
from limbeck.traces.sample import ANSWER, COT, SEGMENT_NAMES, Sample
from limbeck.traces.select import SelectConfig, select_traces
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.truncate import WITHOUT_FRACTION, TruncationConfig, truncate

LEAD_FRACTIONS = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1.0")
LOSSES = {
    "lost_token_fraction": "tokens",
    "lost_end_marker_fraction": "end marker",
    "lost_answer_fraction": "answer",
    "lost_end_of_turn_fraction": "end of turn",
    "lost_first_derivation_fraction": "first derivation",
}
"""Key of a loss and its name in the table."""


@checked
class StatsConfig:
    """Which traces are counted, and the cut whose losses are reported."""

    traces: TraceConfig
    """Where the traces are read from."""
    tokenizer: str
    """Model directory, alias or hub id whose tokenizer and chat template are used."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which of the traces are counted."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How text becomes tokens."""
    truncation: TruncationConfig = field(default_factory=TruncationConfig)
    """The cut whose losses are reported."""


def run(config: StatsConfig) -> dict[str, Any]:
    """The figures, ready for JSON.

    Raises: what reading, selecting, loading and rendering raise.
    """
    traces, read = read_traces(config.traces)
    traces, selected = select_traces(traces, config.select)
    tokenizer = load_tokenizer(config.tokenizer)
    samples, _, notes = render_traces(traces, tokenizer, config.render, on_bad=config.traces.on_bad)
    tell([*read.lines(), *selected.lines(), *notes])
    return {"read": asdict(read), "selected": asdict(selected), **trace_stats(samples, config.truncation)}


def _segment(samples: Sequence[Sample], lengths: np.ndarray, number: int) -> dict[str, float]:
    """How many tokens a segment has, in the mean, of all tokens, and of its sample in the mean."""
    tokens = np.array([int(np.sum(sample.segment_ids == number)) for sample in samples])
    return {
        "mean_tokens": float(tokens.mean()),
        "token_fraction": float(tokens.sum() / lengths.sum()),
        "mean_fraction": float((tokens / lengths).mean()),
    }


def trace_stats(samples: Sequence[Sample], truncation: TruncationConfig) -> dict[str, Any]:
    """Lengths, segments, position of the first derivation, and what cuts take away.

    Args:
      samples: whole samples, at least one.
      truncation: the cut of `cut`; `lead_fractions` repeats it with other fractions and no whole traces, as policy
        lead when it has none.
    Returns: JSON-ready figures. Shares are of traces that have the part in question, None when no trace has it; a
      position is the share of the sequence that ends with the derivation.
    """
    lengths = np.array([len(sample) for sample in samples])
    positions = [s.derivation_end / len(s) for s in samples if s.derivation_end is not None]
    policy = "lead" if truncation.policy in WITHOUT_FRACTION else truncation.policy
    base = replace(truncation, policy=policy, budget_tokens=None, whole_fraction=0.0)
    cut = fit(truncation, samples)
    return {
        "num_traces": len(samples),
        "tokens": {
            "total": int(lengths.sum()),
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        },
        "segments": {name: _segment(samples, lengths, i) for i, name in enumerate(SEGMENT_NAMES)},
        "first_derivation": {
            "found_fraction": len(positions) / len(samples),
            "mean_position": float(np.mean(positions)) if positions else None,
            "median_position": float(np.median(positions)) if positions else None,
        },
        "cut": {"truncation": asdict(cut), **cut_losses(samples, cut)},
        "lead_fractions": [
            {"lead_fraction": float(x), **cut_losses(samples, fit(replace(base, lead_fraction=x), samples))}
            for x in LEAD_FRACTIONS
        ],
    }


def cut_losses(samples: Sequence[Sample], truncation: TruncationConfig) -> dict[str, Any]:
    """What a cut takes from the tokens that may carry loss, as shares of tokens and of the traces that have the part.

    A part is lost when any token of it is: the end marker with its blank line, the answer without the end of turn,
    the last token, and the token that completes the first derivation.
    """
    kept_tokens = 0
    lost: dict[str, list[bool]] = {key: [] for key in list(LOSSES)[1:]}
    for sample in samples:
        cut = truncate(sample, truncation)
        trained = np.zeros(len(sample), dtype=bool)
        trained[cut.kept[cut.supervised]] = True
        kept_tokens += int(trained.sum())
        for key, part in _parts(sample).items():
            if len(part):
                lost[key].append(not bool(trained[part].all()))
    total = sum(len(sample) for sample in samples)
    shares = {key: float(np.mean(flags)) if flags else None for key, flags in lost.items()}
    return {"kept_tokens": kept_tokens, "lost_token_fraction": 1 - kept_tokens / total, **shares}


def print_stats(stats: dict[str, Any], console: Console) -> None:
    """The figures of `trace_stats` as two tables and a line."""
    tokens, derivation = stats["tokens"], stats["first_derivation"]
    console.print(
        f"{stats['num_traces']} traces, {tokens['total']} tokens; a trace has {tokens['mean']:.1f} in the mean, "
        f"{tokens['median']:g} in the median, {tokens['p95']:g} at the 95th percentile, {tokens['max']} at most",
        highlight=False,
        soft_wrap=True,
    )
    table = _table("segment", ["mean tokens", "share of tokens", "mean share"])
    for name, row in stats["segments"].items():
        table.add_row(name, f"{row['mean_tokens']:.1f}", *map(_share, (row["token_fraction"], row["mean_fraction"])))
    console.print(table)
    console.print(
        f"first derivation found in {_share(derivation['found_fraction'])} of the traces; it ends at "
        f"{_share(derivation['mean_position'])} of the sequence in the mean, {_share(derivation['median_position'])} "
        "in the median",
        highlight=False,
        soft_wrap=True,
    )
    table = _table("lost at", list(LOSSES.values()))
    for row in stats["lead_fractions"]:
        table.add_row(f"lead {row['lead_fraction']:g}", *(_share(row[key]) for key in LOSSES))
    table.add_section()
    table.add_row("this cut", *(_share(stats["cut"][key]) for key in LOSSES))
    console.print(table)


def _parts(sample: Sample) -> dict[str, np.ndarray]:
    """Indices of the tokens of each part that can be lost; empty where the sample does not have it."""
    tail = np.arange(sample.ending_start, len(sample))
    answer = tail[sample.segment_ids[tail] == ANSWER]
    return {
        "lost_end_marker_fraction": tail[sample.segment_ids[tail] == COT],
        "lost_answer_fraction": answer[:-1],
        "lost_end_of_turn_fraction": answer[-1:],
        "lost_first_derivation_fraction": np.array(
            [] if sample.derivation_end is None else [sample.derivation_end - 1], dtype=np.int64
        ),
    }


def _table(first: str, rest: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for name in rest:
        table.add_column(name, justify="right")
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
