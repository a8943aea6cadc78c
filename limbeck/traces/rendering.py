"""Many traces to samples, or prompts to token ids: refusals have a place, and what is left out is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import transformers

from limbeck.errors import ConfigError, TemplateError
from limbeck.models.load import load_tokenizer, locate, quiet
from limbeck.progress import track
from limbeck.traces.render import MessagesRefused, RenderConfig, lent_header, render_prompt
from limbeck.traces.render_turns import samples_of
from limbeck.traces.sample import Sample
from limbeck.traces.trace import Trace

OnBad = Literal["error", "skip", "keep"]


class Rendered(NamedTuple):
    """Samples of traces, in order."""

    samples: list[Sample]
    dropped: dict[str, int]
    """Reason: traces left out for it."""
    notes: list[str]
    """What a user should know, one line each."""


def _none_left(count: int, max_tokens: int | None, shortest: int | None) -> Exception:
    if shortest is not None:
        return ConfigError(f"max_trace_tokens {max_tokens} leaves out all traces; the shortest has {shortest} tokens.")
    return TemplateError(f"the chat template refuses the messages of all {count} traces.")


def render_traces(
    traces: Sequence[Trace],
    tokenizer: Any,
    config: RenderConfig,
    max_tokens: int | None = None,
    on_bad: OnBad = "error",
) -> Rendered:
    """Samples of the traces that the template takes and that are not too long.

    Args:
      max_tokens: longest sample; None sets no limit.
      on_bad: what to do where the template refuses the messages of a trace: stop, or leave the trace out.
    Raises: TemplateError, naming the place of a trace that is refused; ConfigError when all are too long.
    """
    samples: list[Sample] = []
    dropped: Counter[str] = Counter()
    shortest = None
    num_split = num_extra = 0
    for trace in track(traces, "rendering"):
        try:
            found = samples_of(trace, tokenizer, config)
        except MessagesRefused as error:
            if on_bad == "error":
                raise TemplateError(f"{error} Mend it, or set on_bad to skip.") from error
            dropped["messages that the chat template refuses"] += 1
            continue
        longest = max(map(len, found))
        if max_tokens is not None and longest > max_tokens:
            shortest = min(longest, shortest or longest)
            dropped[f"longer than {max_tokens} tokens"] += 1
            continue
        samples += found
        num_split, num_extra = num_split + (len(found) > 1), num_extra + len(found) - 1
    if traces and not samples:
        raise _none_left(len(traces), max_tokens, shortest)
    notes = [f"{count} of {len(traces)} traces are left out: {reason}" for reason, count in dropped.items()]
    if num_split:
        notes.append(
            f"{num_split} of {len(traces)} traces are several sequences ({num_extra} more), because the chat template "
            "writes their earlier turns otherwise later on; every turn is trained behind what the model was given"
        )
    return Rendered(samples, dict(dropped), [*notes, *notes_on(traces, tokenizer, config)])


def notes_on(traces: Sequence[Trace], tokenizer: Any, config: RenderConfig) -> list[str]:
    """What surprises in how a tokenizer takes some traces: special tokens in their text, a header that is lent."""
    notes = []
    header = lent_header(tokenizer, config)
    if header:
        notes.append(
            f"the chat template has no generation prompt; the assistant's header of its whole chats ({header!r}) is "
            "written behind the prompt, and whatever runs the model has to do the same"
        )
    found = [tokens for trace in traces if (tokens := _special_tokens(trace, tokenizer, config))]
    if found:
        names = ", ".join(sorted(set().union(*found))[:6])
        notes.append(
            f"{len(found)} of {len(traces)} traces hold special tokens of the tokenizer as text ({names}); the model "
            "reads them as the tokens themselves, and those of thought and answer are trained"
        )
    return notes


def fitting_prompts(
    traces: Sequence[Trace], model: str, config: RenderConfig, on_bad: OnBad = "error"
) -> tuple[list[Trace], list[str]]:
    """The traces whose prompts a model has room for, and what is to be said of the others.

    Args:
      model: directory, alias or hub id; only its tokenizer and config are read.
      on_bad: what to do with a prompt that is too long: stop, or leave it out.
    Raises: TemplateError or ConfigError, naming the place of a prompt that is refused or too long.
    """
    tokenizer, limit = load_tokenizer(model), position_limit(model)
    kept = []
    for trace in traces:
        length = len(render_prompt(tokenizer, trace.messages, config))
        if length < limit:
            kept.append(trace)
        elif on_bad == "error":
            raise ConfigError(
                f"{trace.source}: the prompt has {length} tokens; {model} has {limit} positions for prompt and answer. "
                "Shorten it, or set on_bad to skip to go on without it."
            )
    if not kept:
        raise ConfigError(f"all {len(traces)} prompts have as many tokens as {model} has positions ({limit}), or more.")
    left_out = len(traces) - len(kept)
    note = f"{left_out} of {len(traces)} prompts are left out: longer than the {limit} positions of {model}"
    return kept, [note] if left_out else []


def position_limit(model: str) -> int:
    """The positions of a model by its config, which is all that is read of it."""
    place = locate(model)
    with quiet():
        config = transformers.AutoConfig.from_pretrained(
            place.path, gguf_file=place.gguf_file, local_files_only=place.is_local
        )
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31


def _special_tokens(trace: Trace, tokenizer: Any, config: RenderConfig) -> set[str]:
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special -= {config.start_marker, config.end_marker}
    if not special:
        return set()
    texts = [*(message["content"] for message in trace.messages), trace.cot or "", trace.answer or ""]
    pattern = "|".join(re.escape(token) for token in special)
    return {found for text in texts for found in re.findall(pattern, text)}
