"""Trace -> Sample: the tokenizer's own template, with segments found from characters while the text is made.

1. The prompt is the chat template with its generation prompt, exactly what the model is given at inference.
2. The response is written after it: start marker, thought, end marker, blank line, answer, the template's turn end.
   A start marker that the template already wrote is not repeated; it belongs to the thought.
3. The text is tokenized once with offsets. A token belongs to the segment of its last character, because that is the
   segment which has to predict it.

The template never sees the response, so a template that strips or injects a thought cannot move a boundary, and
markers quoted inside the prompt are only text. The sequence ends with the turn end: no generation prompt and no stray
newline follow a finished chat.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from limbeck.errors import ConfigError, TemplateError
from limbeck.traces.sample import ANSWER, COT, PROMPT, Sample
from limbeck.traces.trace import Trace

Tokenizer = Any
"""A fast Hugging Face tokenizer (PreTrainedTokenizerFast)."""

_SENTINEL = "limbeckSentinel"


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderConfig:
    """How text becomes tokens."""

    start_marker: str = "<think>"
    """Opens the thought. May be several tokens."""
    end_marker: str = "</think>"
    """Closes the thought. May be several tokens."""
    chat_template: Path | None = None
    """A Jinja chat template file to use instead of the tokenizer's own; needed for base models without one."""
    derivation_pattern: str = r"(?<![\w.]){answer}(?![\w]|\.\d)"
    """Regular expression for the first derivation of the answer in the thought; {answer} stands for the escaped answer."""

    def __post_init__(self) -> None:
        if not self.start_marker or not self.end_marker or self.start_marker == self.end_marker:
            raise ConfigError("start_marker and end_marker must be two different, non-empty strings")
        if "{answer}" not in self.derivation_pattern:
            raise ConfigError("derivation_pattern must contain {answer}")
        try:
            re.compile(self.derivation_pattern.replace("{answer}", "0"))
        except re.error as error:
            raise ConfigError(f"derivation_pattern is no regular expression ({error})") from error


def render(trace: Trace, tokenizer: Tokenizer, config: RenderConfig) -> Sample:
    """Tokens and segments of one trace.

    Raises: TemplateError when the tokenizer has no offsets or no chat template, or when the template fails.
    """
    header = prompt_text(trace.messages, tokenizer, config)
    opened = header.rstrip().endswith(config.start_marker)
    prompt_end = header.rindex(config.start_marker) if opened else len(header)
    text, cot_start, ending_start = header, len(header), None
    if trace.cot is not None or opened:
        thought = (trace.cot or "").strip("\n")
        lead_in = "" if opened and header.endswith("\n") else "\n" if opened else config.start_marker + "\n"
        cot_start = len(header) + len(lead_in)
        text += lead_in + thought
        if trace.cot_closed:
            text += "\n" if thought else ""
            ending_start = len(text)
            text += config.end_marker + "\n\n"
    cot_end = len(text)
    if trace.cot_closed:
        text += (trace.answer or "").strip("\n") + turn_end(tokenizer, config)
    encoded = _encode(text, tokenizer)
    ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
    segments = np.where(ends <= prompt_end, PROMPT, np.where(ends <= cot_end, COT, ANSWER)).astype(np.int8)
    # A special token that the tokenizer adds itself has the empty offset (0, 0) wherever it stands.
    segments = np.maximum.accumulate(segments)
    return Sample(
        input_ids=np.array(encoded["input_ids"], dtype=np.int32),
        segment_ids=segments,
        ending_start=len(ends) if ending_start is None else int(np.argmax(ends > ending_start)),
        derivation_end=_derivation_end(trace, config, cot_start, ends),
        trace_key=trace.key,
        source=trace.source,
    )


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], config: RenderConfig) -> list[int]:
    """Token ids of the prompt with the generation prompt: what a model is given to answer."""
    return list(_encode(prompt_text(messages, tokenizer, config), tokenizer)["input_ids"])


def prompt_text(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, config: RenderConfig) -> str:
    """The chat template over `messages`, ending in the assistant's header."""
    return _apply(tokenizer, messages, config, generation_prompt=True)


def turn_end(tokenizer: Tokenizer, config: RenderConfig) -> str:
    """What the template writes after an assistant's last word, up to and with the end-of-turn token."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
    text = _apply(tokenizer, messages, config, generation_prompt=False)
    if _SENTINEL not in text:
        raise TemplateError("the chat template drops the assistant's content; give another one as render.chat_template.")
    suffix = text.rsplit(_SENTINEL, 1)[1]
    eos = tokenizer.eos_token or ""
    if eos and eos in suffix:
        return suffix[: suffix.index(eos) + len(eos)]
    suffix = suffix.strip() or eos
    if not suffix:
        raise TemplateError("neither the chat template nor the tokenizer has an end-of-turn token; set eos_token.")
    return suffix


def stop_ids(tokenizer: Tokenizer, config: RenderConfig) -> tuple[int, ...]:
    """Token ids that end a completion: the last token of the template's turn end, and the tokenizer's EOS."""
    ids = {tokenizer.encode(turn_end(tokenizer, config), add_special_tokens=False)[-1]}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def _derivation_end(trace: Trace, config: RenderConfig, cot_start: int, ends: np.ndarray) -> int | None:
    answer = trace.reference if trace.reference is not None else trace.answer
    if not answer or trace.cot is None:
        return None
    pattern = config.derivation_pattern.replace("{answer}", re.escape(answer.strip()))
    match = re.search(pattern, trace.cot.strip("\n"))
    if match is None:
        return None
    return int(np.argmax(ends >= cot_start + match.end())) + 1


def _encode(text: str, tokenizer: Tokenizer) -> Mapping[str, Any]:
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateError(
            f"{type(tokenizer).__name__} has no character offsets; segments need a fast tokenizer (tokenizer.json)."
        )
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def _apply(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], config: RenderConfig, generation_prompt: bool
) -> str:
    template = None
    if config.chat_template is not None:
        if not config.chat_template.is_file():
            raise TemplateError(f"{config.chat_template}: no such chat template file.")
        template = config.chat_template.read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        raise TemplateError("the tokenizer has no chat template; give one as render.chat_template (a Jinja file).")
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise TemplateError(f"the chat template refuses the messages ({' '.join(str(error).split())}).") from error
