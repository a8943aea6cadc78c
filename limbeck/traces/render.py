"""Trace -> Sample: the tokenizer's own template, with segments found from characters while the text is made.

1. The prompt is the chat template with its generation prompt, exactly what the model is given at inference.
2. The response is written after it: start marker, thought, end marker, blank line, answer, the template's turn end.
   A start marker that the template already wrote is not repeated; it belongs to the thought.
3. Both are tokenized with offsets, and the prompt's tokens are always those of `render_prompt`: no merge crosses from
   the prompt into the response. A token belongs to the segment of its last character, because that is the segment
   which has to predict it.

The template never sees the response, so a template that strips or injects a thought cannot move a boundary, and
markers quoted inside the prompt are only text. The sequence ends with the turn end: no generation prompt and no stray
newline follow a finished chat.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from limbeck.config import checked
from limbeck.errors import ConfigError, TemplateError
from limbeck.lazy import make_function
from limbeck.traces.boxed import last_box
from limbeck.traces.encoding import Encoded, Tokenizer, encode, encode_parts
from limbeck.traces.sample import ANSWER, COT, PROMPT, Sample
from limbeck.traces.trace import Trace

PROBED_CHARS = "probed_cot_chars"
"""Metadata of a trace: characters of its thought in the earliest prefix from which a teacher already answers right."""
ANY_OCCURRENCE = r"(?<![\w.])(?<!\d,){answer}(?!\w|[.,]\d)"
"""Derivation pattern that takes the first occurrence of the answer for its derivation."""
_SENTINEL = "limbeckSentinel"
_WITH_THOUGHT = {"enable_thinking": True, "thinking": True}
"""What switches the thought on in templates that have a switch (Qwen3, SmolLM3; DeepSeek V3.1, Granite)."""


@checked
class RenderConfig:
    """How text becomes tokens."""

    start_marker: str = "<think>"
    """Opens the thought. May be several tokens."""
    end_marker: str = "</think>"
    """Closes the thought. May be several tokens."""
    chat_template: Path | None = None
    """A Jinja chat template file to use instead of the tokenizer's own; needed for base models without one."""
    derivation_pattern: str = ANY_OCCURRENCE
    """Regular expression for the first derivation of the answer in the thought; {answer} is the escaped answer. One
    that says how a derivation is written ("So {answer}") also tells in evaluations what an output derived."""

    def __post_init__(self) -> None:
        if not self.start_marker or not self.end_marker or self.start_marker == self.end_marker:
            raise ConfigError("start_marker and end_marker must be two different, non-empty strings")
        if "{answer}" not in self.derivation_pattern:
            raise ConfigError("derivation_pattern must contain {answer}")
        try:
            re.compile(self.derivation_pattern.replace("{answer}", "0"))
        except re.error as error:
            raise ConfigError(f"derivation_pattern is no regular expression ({error})") from error

    @property
    def knows_derivations(self) -> bool:
        """Whether the pattern says how a derivation is written, so that any value may stand in it."""
        return self.derivation_pattern != ANY_OCCURRENCE


class MessagesRefused(TemplateError):
    """The chat template takes other chats, but not these messages."""


class _Response(NamedTuple):
    """What follows the prompt, with landmarks in characters of `text`."""

    text: str
    thought_start: int
    cot_end: int
    """Before the first character of the answer; 0 when there is no thought."""
    ending_start: int
    """Before the end marker, or before the answer when there is no thought; the end when the thought stays open."""


class LocatedSample(NamedTuple):
    """A sample with where its tokens end in the text of the thought."""

    sample: Sample
    ends: np.ndarray
    """int64 [T]: characters of the thought up to the end of each token; negative or 0 before it."""
    thought: str
    """The thought as it is written into the sequence."""


def render(trace: Trace, tokenizer: Tokenizer, config: RenderConfig) -> Sample:
    """Tokens and segments of one trace.

    Raises: TemplateError when the tokenizer has no offsets or no chat template, or when the template fails.
    """
    return render_located(trace, tokenizer, config).sample


def render_located(trace: Trace, tokenizer: Tokenizer, config: RenderConfig) -> LocatedSample:
    """As `render`, with the places of the tokens in the thought."""
    if trace.has_turns:
        raise TemplateError(f"{trace.source}: several turns or tools; this reads a prompt and one reply. Leave it out.")
    try:
        header = prompt_text(trace.messages, tokenizer, config)
    except MessagesRefused as error:
        raise MessagesRefused(f"{trace.source}: {error}" if trace.source else str(error)) from error
    prefill = prefill_of(header, tokenizer, config)
    response = _response(trace, prefill, turn_end(tokenizer, config), config)
    encoded, num_header = encode_parts(header, response.text, tokenizer)
    origin = len(header)
    segments = np.where(encoded.ends <= origin + response.cot_end, COT, ANSWER).astype(np.int8)
    segments[num_header:][encoded.ends[num_header:] <= origin] = COT if response.cot_end else ANSWER
    segments[:num_header] = np.where(encoded.ends[:num_header] <= origin - len(prefill), PROMPT, COT)
    ends = encoded.ends - (origin + response.thought_start)
    ending_start = int(np.searchsorted(encoded.ends, origin + response.ending_start, side="right"))
    chars = trace.metadata.get(PROBED_CHARS)
    sample = Sample(
        input_ids=encoded.input_ids,
        segment_ids=segments,
        ending_start=ending_start,
        probed_end=None if chars is None else min(tokens_until(ends, int(chars)), ending_start),
        derivation_end=derivation_end(trace, config, origin + response.thought_start, encoded),
        trace_key=trace.key,
        source=trace.source,
    )
    return LocatedSample(sample, ends, _thought(trace))


def tokens_until(ends: np.ndarray, chars: int) -> int:
    """Tokens of the shortest prefix that holds the first `chars` characters of the thought."""
    return int(np.searchsorted(ends, chars, side="left")) + 1


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], config: RenderConfig) -> list[int]:
    """Token ids of the prompt with the generation prompt: what a model is given to answer."""
    return encode(prompt_text(messages, tokenizer, config), tokenizer).input_ids.tolist()


def prompt_text(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    config: RenderConfig,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The chat template over `messages` and the tools that they offer, ending in the assistant's header.

    A thought that the template closes in there, before the model wrote a word, is taken out: the trace has the thought.
    """
    header = apply_template(tokenizer, messages, config, True, tools)
    if header == apply_template(tokenizer, messages, config, False, tools):
        header += lent_header(tokenizer, config)
    start, end = re.escape(config.start_marker), re.escape(config.end_marker)
    closed = re.search(rf"(?:{start}\s*)?{end}\s*$", _generation_prompt(header, tokenizer, config))
    return header[: closed.start() - closed.end()] if closed else header


def bare_header(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, config: RenderConfig) -> str:
    """`prompt_text` without the start marker with which some templates open the thought."""
    header = prompt_text(messages, tokenizer, config)
    return header[: len(header) - len(prefill_of(header, tokenizer, config))]


def lent_header(tokenizer: Tokenizer, config: RenderConfig) -> str:
    """The assistant's header as the template writes it in a whole chat, where it has no generation prompt; else ""."""
    asked = [{"role": "user", "content": _SENTINEL}]
    open_chat = apply_template(tokenizer, asked, config, generation_prompt=False)
    if open_chat != apply_template(tokenizer, asked, config, generation_prompt=True):
        return ""
    answered = [*asked, {"role": "assistant", "content": _SENTINEL + "2"}]
    whole = apply_template(tokenizer, answered, config, generation_prompt=False)
    if not whole.startswith(open_chat) or _SENTINEL + "2" not in whole:
        return ""
    return whole[len(open_chat) : whole.index(_SENTINEL + "2")]


def turn_end(tokenizer: Tokenizer, config: RenderConfig) -> str:
    """What the template writes after an assistant's last word, up to and with the end-of-turn token."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
    text = apply_template(tokenizer, messages, config, generation_prompt=False)
    if _SENTINEL not in text:
        raise TemplateError(
            "the chat template drops the assistant's content; give another one as render.chat_template."
        )
    suffix = text.rsplit(_SENTINEL, 1)[1]
    eos = tokenizer.eos_token or ""
    if eos and eos in suffix:
        return suffix[: suffix.index(eos) + len(eos)]
    suffix = suffix.rstrip()
    if suffix and tokenizer.encode(suffix, add_special_tokens=False)[-1] in tokenizer.added_tokens_decoder:
        return suffix
    # Plain text cannot end a completion: its last token may occur anywhere.
    if not eos:
        raise TemplateError("neither the chat template nor the tokenizer has an end-of-turn token; set eos_token.")
    return suffix + eos


def stop_ids(tokenizer: Tokenizer, config: RenderConfig) -> tuple[int, ...]:
    """Token ids that end a completion: the last token of the template's turn end, and the tokenizer's EOS."""
    ids = {tokenizer.encode(turn_end(tokenizer, config), add_special_tokens=False)[-1]}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def _response(trace: Trace, prefill: str, end_of_turn: str, config: RenderConfig) -> _Response:
    """The response after a header that ends in `prefill`, the start marker and what follows it, or nothing."""
    answer = (trace.answer or "").strip("\n")
    if end_of_turn.strip() and answer.rstrip().endswith(end_of_turn.strip()):
        answer = answer.rstrip().removesuffix(end_of_turn.strip())
    ending = answer + end_of_turn if trace.cot_closed else ""
    if trace.cot is None and not prefill:
        return _Response(ending, thought_start=0, cot_end=0, ending_start=0)
    lead_in = "" if prefill.endswith("\n") else "\n" if prefill else config.start_marker + "\n"
    text = lead_in + _thought(trace)
    if not trace.cot_closed:
        return _Response(text, len(lead_in), cot_end=len(text), ending_start=len(text))
    text += "\n"
    cot = text + config.end_marker + "\n\n"
    return _Response(cot + ending, len(lead_in), cot_end=len(cot), ending_start=len(text))


def _thought(trace: Trace) -> str:
    return (trace.cot or "").strip("\n")


def prefill_of(header: str, tokenizer: Tokenizer, config: RenderConfig) -> str:
    """The start marker that the template wrote at the end of the header, with the space after it; "" without one."""
    opened = re.search(re.escape(config.start_marker) + r"\s*$", _generation_prompt(header, tokenizer, config))
    return opened.group() if opened else ""


def _generation_prompt(header: str, tokenizer: Tokenizer, config: RenderConfig) -> str:
    """The part of the header that follows the user's last word, so that words of the user are never taken for it."""
    text = apply_template(tokenizer, [{"role": "user", "content": _SENTINEL}], config, generation_prompt=True)
    suffix = text.rpartition(_SENTINEL)[2]
    return suffix if header.endswith(suffix) else ""


def derivation_end(trace: Trace, config: RenderConfig, thought_start: int, encoded: Encoded) -> int | None:
    """One past the token that completes the first derivation of the answer; the thought begins at a character."""
    answer = (_short_answer(trace.answer) if trace.reference is None else trace.reference) or ""
    if not answer.strip():
        return None
    pattern = config.derivation_pattern.replace("{answer}", re.escape(answer.strip()))
    match = re.search(pattern, _thought(trace))
    if match is None:
        return None
    return int(np.searchsorted(encoded.starts, thought_start + match.end(), side="left"))


def _short_answer(answer: str | None) -> str | None:
    """What an answer says: its last box, or all of it."""
    box = last_box(answer or "")
    return answer if box is None else box.content


def apply_template(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    config: RenderConfig,
    generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The chat template over `messages`, with the assistant's header behind them where asked.

    Raises: TemplateError without a template; MessagesRefused when it refuses these messages.
    """
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
            tools=list(tools) or None,
            **_WITH_THOUGHT,
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise MessagesRefused(f"the chat template refuses the messages ({' '.join(str(error).split())}).") from error


# `from limbeck.traces import render` is this module, and is called as the function.
make_function(__name__)
