"""Traces of several turns and with tools to samples: everything that the model wrote, each turn as it was generated.

1. The header of a turn is the chat template over all messages before it, with the generation prompt: what the model was
   given when it wrote the turn.
2. The turn is what the template writes for it as the last message: thought, text, calls of tools, end of turn. A
   thought that the template drops is written in front of the rest, between the markers. An end of turn that the
   template leaves to the next header (GLM) is the special token that this begins with.
3. A turn whose header begins with all of the sequence so far extends it: one sequence holds many turns. Where the
   template writes the past otherwise than it was generated (it drops earlier thoughts), another sequence begins, so no
   turn is trained without its thought, or behind a past that it has not seen.

What the template would leave out without a word (a call, an answer of a tool, a tool, text beside a call) is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from limbeck.traces.encoding import Encoded, Tokenizer, encode_pieces
from limbeck.traces.render import (
    MessagesRefused,
    RenderConfig,
    apply_template,
    derivation_end,
    prefill_of,
    prompt_text,
    render,
)
from limbeck.traces.sample import ANSWER, COT, PROMPT, Sample, Turn
from limbeck.traces.trace import Trace

Message = Mapping[str, Any]
_THOUGHTS = ("reasoning_content", "thinking")
"""Where templates look for a thought."""


class _Written(NamedTuple):
    """A trained turn; places are characters of its text."""

    text: str
    """From the start marker, or the first word, to the end of turn."""
    prefill: str
    """The beginning of it that the header writes already."""
    thought: int
    """Where the thought begins."""
    ending: int
    """Before the end marker, or before the answer where there is no thought."""
    cot_end: int
    """Before the first character of the answer; 0 without a thought."""
    weight: float = 1.0


class _Chat(NamedTuple):
    """A chat as the template is given it."""

    messages: list[dict[str, Any]]
    tools: tuple[Message, ...]
    tokenizer: Tokenizer
    config: RenderConfig

    def header(self, place: int) -> str:
        """All before a turn, ending in the assistant's header."""
        return prompt_text(self.messages[:place], self.tokenizer, self.config, self.tools)

    def text(self, count: int) -> str:
        """The first `count` messages, without a generation prompt."""
        return apply_template(self.tokenizer, self.messages[:count], self.config, False, self.tools)


class _Sequence:
    """Turns behind one another, with where each begins in the text."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.turns: list[tuple[int, _Written]] = []

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, header: str, turn: _Written) -> None:
        """Put a turn behind a header that begins with all that is there."""
        self.turns.append((len(header) - len(turn.prefill), turn))
        self.pieces += [header[len(self.text) :], turn.text[len(turn.prefill) :]]


def samples_of(trace: Trace, tokenizer: Tokenizer, config: RenderConfig) -> list[Sample]:
    """The samples of any trace: one, or several where the template rewrites earlier turns.

    Raises: as `render`; MessagesRefused where the template leaves out what the trace holds.
    """
    if not trace.has_turns:
        return [render(trace, tokenizer, config)]
    try:
        sequences = list(_sequences(trace, tokenizer, config))
        return [_sample(trace, one, one is sequences[-1], tokenizer, config) for one in sequences]
    except MessagesRefused as error:
        raise MessagesRefused(f"{trace.source}: {error}" if trace.source else str(error)) from error


def _sequences(trace: Trace, tokenizer: Tokenizer, config: RenderConfig) -> Iterator[_Sequence]:
    if not trace.cot_closed:
        raise MessagesRefused("a chat of several turns or with tools ends inside its thought")
    chat = _Chat([_for_template(m) for m in (*trace.messages, _reply(trace))], trace.tools, tokenizer, config)
    places = [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]
    weights = trace.turn_weights or (*[0.0] * (len(places) - 1), 1.0)
    if len(weights) != len(places) or not weights[-1]:
        raise MessagesRefused(f"turn_weights are {list(weights)}; expected {len(places)}, the last above 0")
    sequence = _Sequence()
    for place, weight in zip(places, weights, strict=True):
        if not weight:
            continue
        header = chat.header(place)
        _check_context(chat, place, header)
        if not header.startswith(sequence.text):
            yield sequence
            sequence = _Sequence()
        sequence.add(header, _written(chat, place, header)._replace(weight=weight))
    yield sequence


def _reply(trace: Trace) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": trace.answer or ""}
    if trace.tool_calls:
        message["tool_calls"] = list(trace.tool_calls)
    return message if trace.cot is None else {**message, "reasoning_content": trace.cot}


def _for_template(message: Message) -> dict[str, Any]:
    """A message with its thought under every key that templates read."""
    thought = message.get("reasoning_content")
    return dict(message) if thought is None else {**message, **dict.fromkeys(_THOUGHTS, thought)}


def _written(chat: _Chat, place: int, header: str) -> _Written:
    """The turn at `place` as the model writes it behind its header."""
    config, message = chat.config, chat.messages[place]
    prefill, thought = prefill_of(header, chat.tokenizer, config), message.get("reasoning_content", "").strip()
    base = header[: len(header) - len(prefill)]
    text = _as_last(chat, place, base)
    _check_turn(message, text, place)
    text = _closed(chat, place, text)
    start, end = re.escape(config.start_marker), re.escape(config.end_marker)
    opened = re.match(rf"\s*(?:{start})?\s*", text)
    assert opened is not None
    behind = text[opened.end() :]
    ended = re.match(rf"\s*{end}\s*", behind[len(thought) :]) if behind.startswith(thought) else None
    is_whole = thought or prefill or (ended and _stays(chat, place, base, text[: opened.end() + ended.end()]))
    if ended and is_whole and text.startswith(prefill):
        before_end = opened.end() + len(thought)
        ending = before_end + ended.group().index(config.end_marker)
        return _Written(text, prefill, opened.end(), ending, before_end + ended.end())
    given = message["content"] + json.dumps(message.get("tool_calls", []), ensure_ascii=False)
    if thought and text.count(thought) > given.count(thought):
        raise MessagesRefused(
            f"the thought of turn {place} stands between no {config.start_marker!r} and {config.end_marker!r}; set "
            "render.start_marker and end_marker to what the template writes around it"
        )
    said = text[ended.end() + opened.end() :] if ended and not thought else text
    if not thought and not prefill:
        return _Written(said, "", 0, 0, 0)
    lead_in = "" if prefill.endswith("\n") else "\n" if prefill else config.start_marker + "\n"
    cot = f"{prefill}{lead_in}{thought}\n"
    closing = f"{config.end_marker}\n\n"
    return _Written(cot + closing + said.lstrip("\n"), prefill, len(prefill + lead_in), len(cot), len(cot + closing))


def _as_last(chat: _Chat, place: int, base: str) -> str:
    """The turn as the template writes it at the end of a chat."""
    whole = chat.text(place + 1)
    if not whole.startswith(base):
        # With its answer there, gpt-oss's template drops the thoughts that led to it, which the model was given.
        chat = chat._replace(messages=[{"role": "user", "content": "?"}, chat.messages[place]])
        base, whole = chat.header(1), chat.text(2)
        base = base[: len(base) - len(prefill_of(base, chat.tokenizer, chat.config))]
        if not whole.startswith(base):
            raise MessagesRefused(f"the chat template writes turn {place} behind no header of the assistant")
    return whole[len(base) :].rstrip()


def _stays(chat: _Chat, place: int, base: str, empty: str) -> bool:
    """Whether an empty thought of a turn is there in later chats too, as GLM has it and Qwen3 has not."""
    later = chat._replace(messages=[*chat.messages[: place + 1], {"role": "user", "content": "?"}])
    return later.text(place + 2).startswith(base + empty)


def _closed(chat: _Chat, place: int, text: str) -> str:
    """The turn with its end: its own, or else the special token that the next header begins with, or EOS."""
    tokens = chat.tokenizer.added_tokens_decoder
    last = chat.tokenizer.encode(text, add_special_tokens=False)[-1:]
    if last and last[0] in tokens and tokens[last[0]].special:
        return text
    if place + 1 < len(chat.messages):
        # Thoughts come and go with what follows, so both are written without any.
        bare = chat._replace(messages=[{k: v for k, v in m.items() if k not in _THOUGHTS} for m in chat.messages])
        before, behind = bare.text(place + 1).rstrip(), bare.text(place + 2)
        names = "|".join(re.escape(str(token)) for token in tokens.values() if token.special)
        if behind.startswith(before) and (found := re.match(rf"\s*(?:{names})", behind[len(before) :])):
            return text + found.group()
    if not chat.tokenizer.eos_token:
        raise MessagesRefused(f"neither the chat template nor the tokenizer ends turn {place}; set eos_token")
    return text + chat.tokenizer.eos_token


def _check_turn(message: Message, text: str, place: int) -> None:
    """Refuse a template that drops the text of a turn or a call."""
    if message["content"].strip() not in text:
        raise MessagesRefused(f"the chat template drops the text of turn {place}, perhaps because it calls a tool")
    for call in message.get("tool_calls", ()):
        for name in (call["function"]["name"], *call["function"]["arguments"]):
            if name not in text:
                raise MessagesRefused(f"the chat template drops a call of turn {place} ({name}); give another template")


def _check_context(chat: _Chat, place: int, header: str) -> None:
    """Refuse a template that drops the tools, or an earlier call or answer."""
    for tool in chat.tools:
        if tool["function"]["name"] not in header:
            raise MessagesRefused(f"the chat template drops the tool {tool['function']['name']}; give another template")
    for number, message in enumerate(chat.messages[:place]):
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        said = message["content"].strip() if message["role"] == "tool" else ""
        forms = [said, *(json.dumps(said, ensure_ascii=ascii)[1:-1] for ascii in (True, False))]
        if not all(name in header for name in names) or not any(form in header for form in forms):
            raise MessagesRefused(f"the chat template drops message {number}, of the {message['role']}")


def _sample(trace: Trace, sequence: _Sequence, has_reply: bool, tokenizer: Tokenizer, config: RenderConfig) -> Sample:
    """A sequence as tokens; the one that ends in the reply has the derivation of its answer."""
    encoded = encode_pieces(sequence.pieces, tokenizer)
    segments = np.full(len(encoded.input_ids), PROMPT, dtype=np.int8)
    turns = [_mark(segments, encoded, base, turn) for base, turn in sequence.turns]
    base, last = sequence.turns[-1]
    end = derivation_end(trace, config, base + last.thought, encoded) if has_reply and last.cot_end else None
    return Sample(
        input_ids=encoded.input_ids,
        segment_ids=segments,
        ending_start=turns[-1].ending,
        derivation_end=end,
        trace_key=trace.key,
        source=trace.source,
        turns=() if len(turns) == 1 and turns[0].weight == 1 else tuple(turns),
    )


def _mark(segments: np.ndarray, encoded: Encoded, base: int, turn: _Written) -> Turn:
    """Give the tokens of a turn their segments; a token belongs to that of its last character."""

    def behind(chars: int) -> int:
        return int(np.searchsorted(encoded.ends, base + chars, side="right"))

    start, border, stop = behind(0), behind(turn.cot_end), behind(len(turn.text))
    segments[start:border], segments[border:stop] = COT, ANSWER
    return Turn(start, behind(turn.ending), stop, turn.weight)
