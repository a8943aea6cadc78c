"""The texts that an export is compared on."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any

from limbeck.compress.export.certificate import Probes
from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.traces.render import RenderConfig, render
from limbeck.traces.sources import TraceConfig, read_traces

BUILT_IN_TEXT = (
    "The old clock on the wall had stopped at ten past four, and nobody had thought of winding it again.",
    "To add 348 and 1275, first add 300 to 1275, which gives 1575; then add 48, which gives 1623.\nSo 348+1275=1623.",
    "def mean(values):\n    return sum(values) / len(values)  # fails for an empty list\n",
    "Ein kleiner Satz, une phrase courte, y una frase más: naïve café, 東京, 3.14159, (a+b)*c != d.",
)
"""Prose, numbers, code, and other scripts: what tokenizers and engines disagree about."""


@checked
class CertificateConfig:
    """What the certificate compares log-probabilities on."""

    traces: TraceConfig | None = None
    """Traces, rendered whole. Null, with text null too: a few built-in sentences."""
    text: Path | None = None
    """A UTF-8 text file instead, a probe a paragraph."""
    sequences: int = 4
    """At most this many probes."""
    sequence_length_tokens: int = 32
    """Longer probes are cut to this; llama.cpp is asked once a token."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How traces become tokens."""

    def __post_init__(self) -> None:
        if self.traces is not None and self.text is not None:
            raise ConfigError("probe: set traces or text, not both")
        if self.sequences < 1 or self.sequence_length_tokens < 2:
            raise ConfigError("probe: sequences must be 1 or more, sequence_length_tokens 2 or more")


def probes_of(config: CertificateConfig, tokenizer: Any, longest: int) -> Probes:
    """Tokenize the probe set.

    Args:
      longest: tokens that the export may read.
    Raises: ConfigError when nothing of two tokens is in it.
    """
    limit = min(config.sequence_length_tokens, longest)
    if config.traces is not None:
        origin, (texts, sequences) = config.traces.source, _of_traces(config, config.traces, tokenizer)
    else:
        origin = "built-in sentences" if config.text is None else config.text.name
        texts = (list(BUILT_IN_TEXT) if config.text is None else _paragraphs(config.text))[: config.sequences]
        sequences = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ids = [sequence[:limit] for sequence in sequences if len(sequence) > 1][: config.sequences]
    if not ids or limit < 2:
        raise ConfigError("probe: no text of two tokens or more; set probe.text or probe.traces.source.")
    return Probes(origin, ids, {text: tokenizer.encode(text, add_special_tokens=False) for text in texts})


def _of_traces(config: CertificateConfig, source: TraceConfig, tokenizer: Any) -> tuple[list[str], list[list[int]]]:
    """Answers as texts, and whole traces as tokens."""
    traces, _ = read_traces(source)
    texts = [trace.answer for trace in traces if trace.answer][: config.sequences]
    return texts, [render(trace, tokenizer, config.render).input_ids.tolist() for trace in traces]


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"probe.text: {path} is missing or not UTF-8.") from error
    return [part for part in text.split("\n\n") if part.strip()]
