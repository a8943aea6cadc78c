"""What a student does by itself before any training: does it stop, close its thought, and answer what it derived?

What a cut takes away it does not teach: the end of a trace stays as the student knows it, or as it is forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from limbeck.engine.complete import complete
from limbeck.engine.sampling import SamplingConfig
from limbeck.evaluate.answers import Verdict, answer_part, extract_answer
from limbeck.evaluate.checking import check_answers
from limbeck.ledger import Ledger, decoding_flops
from limbeck.models.anatomy import Sizes, context_tokens
from limbeck.progress import bar
from limbeck.traces.render import RenderConfig, render_prompt, stop_ids
from limbeck.traces.trace import Trace

ROOM = 1.25
"""A text may be so many times as long as the longest response that was looked at."""


class FreeRun(NamedTuple):
    """Shares of the texts that a student wrote, greedily; None where there is nothing to tell it by."""

    texts: int
    stopped: float
    """Ended its turn."""
    closed: float
    """Closed its thought."""
    copied: float
    """Stopped, with an answer that stands in its own thought as a derivation."""
    right: float | None
    """Answered right; None where no answer is known."""


def run_freely(
    model: Any, tokenizer: Any, traces: Sequence[Trace], render: RenderConfig, longest: int, sizes: Sizes
) -> tuple[FreeRun, Ledger]:
    """Let the student answer the prompts of some traces.

    Args:
      model, tokenizer: the student.
      traces: what it is asked; their references are the right answers.
      render: how prompts become tokens, and how a derivation is written.
      longest: tokens of the longest response that was looked at.
      sizes: of the model, for the FLOPs.
    """
    prompts, ledger = [render_prompt(tokenizer, trace.messages, render) for trace in traces], Ledger()
    room = context_tokens(model) - max(map(len, prompts))
    sampling = SamplingConfig(max_new_tokens=max(1, min(room, round(ROOM * longest))))
    with bar("student's own texts", len(prompts)) as progress, ledger.phase("sampling"):
        written = complete(model, prompts, sampling, stop_ids(tokenizer, render), advance=progress.advance)
    for prompt, (text,) in zip(prompts, written, strict=True):
        ledger.add_flops(sampling=decoding_flops(sizes, len(prompt), [len(text.token_ids)]))
    outputs = [tokenizer.decode(text.text_ids, clean_up_tokenization_spaces=False) for (text,) in written]
    stopped = [text.stopped for (text,) in written]
    answers = [
        _answer(tokenizer.decode(prompt), output, trace.reference, render) if ended else None
        for prompt, output, trace, ended in zip(prompts, outputs, traces, stopped, strict=True)
    ]
    copied = [is_copied(output, answer, render) for output, answer in zip(outputs, answers, strict=True)]
    closed = [render.end_marker in output for output in outputs]
    stops, closes, copies = (float(np.mean(flags)) for flags in (stopped, closed, copied))
    return FreeRun(len(outputs), stops, closes, copies, _right(answers, traces)), ledger


def is_copied(output: str, answer: str | None, render: RenderConfig) -> bool:
    """Whether the thought of an output derives its answer; an output without a thought has nothing to copy from."""
    thought = output.partition(render.end_marker)[0]
    if answer is None or render.end_marker not in output:
        return False
    pattern = render.derivation_pattern.replace("{answer}", re.escape(answer.strip()))
    return re.search(pattern, thought) is not None


def _answer(prompt: str, output: str, reference: str | None, render: RenderConfig) -> str | None:
    is_open = prompt.rstrip().endswith(render.start_marker)
    part = answer_part(output, render.start_marker, render.end_marker, is_open)
    return None if part is None else extract_answer(part, "auto", reference)


def _right(answers: Sequence[str | None], traces: Sequence[Trace]) -> float | None:
    known = [(a, trace.reference) for a, trace in zip(answers, traces, strict=True) if trace.reference is not None]
    if not known:
        return None
    return float(np.mean([verdict is Verdict.RIGHT for verdict in check_answers(known, "exact")]))
