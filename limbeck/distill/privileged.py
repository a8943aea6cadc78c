"""Targets of a teacher that is shown more than the student: the same model that sees the solution, for instance.

The teacher reads its own prompt and then the tokens of the response, and what it says at these is stored under the
student's sequence. So a run reads the cache as any other, and the student learns to say without the solution what it
would say with it. On-policy self-distillation of this kind: OPSD (arXiv 2601.18734); here the responses are given.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from limbeck.errors import ConfigError, TraceFormatError
from limbeck.teacher.shard import Stored
from limbeck.traces.batch import Example
from limbeck.traces.render import RenderConfig, render_prompt
from limbeck.traces.sample import PROMPT
from limbeck.traces.trace import Trace

FIELDS = ("prompt", "reference", "thought", "answer")
"""What a text for the teacher may hold: the last words of the user, and parts of the trace."""


def check_privileged(text: str) -> None:
    """Refuse a text without the prompt or with unknown fields.

    Raises: ConfigError.
    """
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ConfigError(f"privileged: {error}; write braces that are no field twice") from error
    if "prompt" not in names or not names <= {*FIELDS}:
        accepted = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise ConfigError(f"privileged: holds {sorted(names)}; it needs {{prompt}} and may hold {accepted}")


def shown(trace: Trace, text: str) -> list[dict[str, Any]]:
    """The messages of the teacher: those of the trace, the last one as `text` has it.

    Raises: TraceFormatError where the trace lacks what the text shows, or has several turns or tools.
    """
    if trace.has_turns:
        raise TraceFormatError(f"{trace.source}: privileged is for one reply to a prompt, this has turns or tools.")
    parts = {"reference": trace.reference, "thought": trace.cot, "answer": trace.answer}
    for name, part in parts.items():
        if part is None and f"{{{name}" in text:
            raise TraceFormatError(f"{trace.source}: privileged shows the {name}, and this trace has none.")
    *before, last = trace.messages
    return [*map(dict, before), {**last, "content": text.format(prompt=last["content"], **parts)}]


def privileged(
    examples: Sequence[Example], traces: Mapping[str, Trace], tokenizer: Any, config: RenderConfig, text: str
) -> list[Stored]:
    """What a teacher with a prompt of its own is asked for each example.

    Args:
      examples: with their whole prompts, and no position of these.
      traces: by their keys.
      text: the teacher's prompt (`CacheConfig.privileged`).
    Raises: ConfigError where a cut or the segments take part of the prompt; TraceFormatError as `shown`.
    """
    found = []
    for example in examples:
        trace, sample, positions = traces[example.sample.trace_key], example.sample, example.kd_weight > 0
        own = np.array(render_prompt(tokenizer, trace.messages, config), dtype=np.int32)
        theirs = np.array(render_prompt(tokenizer, shown(trace, text), config), dtype=np.int32)
        # The start marker that a template writes belongs to the thought, in both.
        count = int(np.sum(sample.segment_ids == PROMPT))
        prefill = len(own) - count
        is_same = np.array_equal(sample.input_ids[:count], own[:count])
        if not is_same or positions[:count].any() or not np.array_equal(own[count:], theirs[len(theirs) - prefill :]):
            raise ConfigError(
                f"{trace.source}: a privileged teacher reads another prompt, so the student's must be whole and carry "
                "no loss: cut unit response or cot, and leave prompt out of segments."
            )
        found.append(Stored(sample.input_ids, positions, theirs[: len(theirs) - prefill], count))
    return found
