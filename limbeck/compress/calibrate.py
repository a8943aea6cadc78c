"""Calibration tokens: what the layers are shown while they are compressed.

Reasoning models lose least when they are calibrated on their own kind of text, so traces come first; any text will do.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.models.load import BUILT_IN
from limbeck.traces.render import RenderConfig
from limbeck.traces.render_turns import samples_of
from limbeck.traces.sources import BUILTIN_CHAIN, BUILTIN_RECHECK, TraceConfig, read_traces
from limbeck.traces.trained_on import made_of, trained_on


@checked
class CalibrationConfig:
    """Which text, and how much of it."""

    traces: TraceConfig | None = None
    """Traces, rendered whole. Null, with text null too: those that the model was distilled on, by its manifest."""
    text: Path | None = None
    """A UTF-8 text file instead, cut into windows."""
    sequences: int = 64
    """At most this many sequences, spread evenly over what there is."""
    sequence_length_tokens: int = 512
    """Longer traces are cut to this; windows of text have it."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How traces become tokens."""

    def __post_init__(self) -> None:
        if self.traces is not None and self.text is not None:
            raise ConfigError("calibration: set traces or text, not both")
        if self.sequences < 1 or self.sequence_length_tokens < 1:
            raise ConfigError("calibration: sequences and sequence_length_tokens must be 1 or more")


class Rows(NamedTuple):
    """Right-padded sequences; with causal attention padding changes nothing before it."""

    input_ids: Tensor
    """int64 [n T]."""
    valid: Tensor
    """bool [n T], False on padding."""

    @classmethod
    def of(cls, sequences: list[list[int]]) -> Rows:
        """Pad sequences of token ids with 0."""
        width = max(map(len, sequences))
        ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        valid = torch.zeros(len(sequences), width, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            valid[row, : len(sequence)] = True
        return cls(ids, valid)

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.valid.sum())


def calibration_rows(config: CalibrationConfig, tokenizer: Any, model: str) -> Rows:
    """The calibration tokens of a model.

    Raises: ConfigError when nothing says which text to take, or when there is none in it.
    """
    return split_rows(config, tokenizer, model, 0)[0]


def split_rows(config: CalibrationConfig, tokenizer: Any, model: str, held_out: int) -> tuple[Rows, Rows | None]:
    """Calibration tokens, and at most `held_out` sequences of the same text beside them; None where none is left.

    Raises: ConfigError as `calibration_rows`.
    """
    if config.text is not None:
        sequences = _windows(config, tokenizer)
    else:
        sequences = _rendered(config, tokenizer, config.traces or _own_traces(model, config.sequences + held_out))
    if not sequences:
        raise ConfigError("calibration: the traces or the text hold no tokens.")
    # Held-out ones are spread evenly too, so that both are of the same kind; some always stay for calibration.
    spare = min(held_out, len(sequences) // 4) if held_out else 0
    apart = np.linspace(0, len(sequences) - 1, spare).round().astype(int).tolist() if spare else []
    others = sorted(set(range(len(sequences))) - set(apart))
    chosen = np.linspace(0, len(others) - 1, min(config.sequences, len(others))).round().astype(int)
    rows = Rows.of([sequences[others[index]] for index in chosen])
    return rows, Rows.of([sequences[index] for index in apart]) if apart else None


def _rendered(config: CalibrationConfig, tokenizer: Any, source: TraceConfig) -> list[list[int]]:
    traces, _ = read_traces(source)
    found = [sample.input_ids for trace in traces for sample in samples_of(trace, tokenizer, config.render)]
    return [ids[: config.sequence_length_tokens].tolist() for ids in found if len(ids)]


def _windows(config: CalibrationConfig, tokenizer: Any) -> list[list[int]]:
    assert config.text is not None
    try:
        text = config.text.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"calibration.text: {config.text} does not exist.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"calibration.text: {config.text} is not UTF-8.") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    length = min(config.sequence_length_tokens, len(ids))
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, max(length, 1))] if ids else []


def _own_traces(model: str, sequences: int) -> TraceConfig:
    """The traces in the manifest of a distilled model or of one made from it; the built-in task for built-in models."""
    traces = next(trained_on(model), None)
    if traces is not None:
        return traces
    built_in = next((name for name in made_of(model) if name in BUILT_IN), None)
    if built_in is not None:
        source = BUILTIN_RECHECK if built_in.startswith("tiny-recheck") else BUILTIN_CHAIN
        return TraceConfig(source=source, num_traces=sequences)
    raise ConfigError(
        f"calibration: {model} has no manifest that names traces; set calibration.traces.source or calibration.text."
    )
