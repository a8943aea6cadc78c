"""Requests as text and tokens: instruction, member and history in front, shared by all candidates; then one candidate.

    prefix     Will the member like the item?            the same bytes, and the same tokens, for all candidates
               Member: age: 24, occupation: writer
               History:
               yes: Toy Story (1995), ...
    candidate  Item: Fargo (1996), Crime, Drama
               Answer:
    label       yes                                      one token, read or trained, never in the text of a pair

The whole text of a pair is tokenized, as a server would do it, and the prefix is found by characters. Where a token
crosses the border, or a candidate changes the tokens in front of it, the pair is refused, because no engine could then
share the prefix and score what was trained.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from limbeck.config import checked
from limbeck.errors import ConfigError, TemplateError
from limbeck.progress import track
from limbeck.ranking.interaction import Features, Interaction, Request

PREFIX_FIELDS = {"instruction", "query", "context", "member", "history"}
CANDIDATE_FIELDS = {"item"}
EVENT_FIELDS = {"label", "item"}


@checked
class FeaturizeConfig:
    """How a request is written; the braces of a template are filled in."""

    instruction: str = "Will the member like the item?"
    """What is asked."""
    prefix: str = "{instruction}\nMember: {member}\nHistory:{history}\n"
    """Shared part, of {instruction}, {query}, {context}, {member} and {history}; best ended by a newline, which few
    tokenizers join on."""
    event: str = "\n{label}: {item}"
    """One event of the history, of {label} and {item}."""
    candidate: str = "Item: {item}\nAnswer:"
    """What a candidate adds, of {item}; the label follows."""
    feature: str = "{name}: {value}"
    """One feature of a member or an item, of {name} and {value}."""
    separator: str = ", "
    """Between features."""
    names: tuple[str, ...] | None = None
    """Features of members, moments and items that are written, by name; null writes all."""
    empty: str = "none"
    """A member or a moment without features, a history without events."""
    labels: tuple[str, str] = (" yes", " no")
    """Text of a positive and a negative label; each is one token behind a candidate."""

    def __post_init__(self) -> None:
        _check_fields("prefix", self.prefix, PREFIX_FIELDS, set())
        _check_fields("candidate", self.candidate, CANDIDATE_FIELDS, CANDIDATE_FIELDS)
        _check_fields("event", self.event, EVENT_FIELDS, {"item"})
        _check_fields("feature", self.feature, {"name", "value"}, {"value"})
        if len(set(self.labels)) != 2 or not all(label.strip() for label in self.labels):
            raise ConfigError(f"labels: {list(self.labels)}; expected two different words")


class RequestText(NamedTuple):
    """A request as text."""

    prefix: str
    candidates: tuple[str, ...]
    """What each candidate adds."""


class Labels(NamedTuple):
    """Token ids of the two labels."""

    yes: int
    no: int


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRequest:
    """A request as tokens; a pair is `prefix` and one of `candidates`."""

    request_id: str
    prefix: np.ndarray
    """int32 [P]."""
    candidates: tuple[np.ndarray, ...]
    """int32 [I_n] of each of the N candidates, up to where the label follows."""
    labels: np.ndarray
    """bool [N]."""
    weights: np.ndarray | None = None
    """float [N]: what each counts in training on labels; None: 1."""
    teacher: np.ndarray | None = None
    """float [N]: log-odds of a scorer to distil from; NaN where it gave none."""
    grades: np.ndarray | None = None
    """float [N]: how relevant each is; None: the labels."""

    def pair(self, index: int) -> np.ndarray:
        """int32 [P + I]: the tokens of one candidate's pair."""
        return np.concatenate([self.prefix, self.candidates[index]])


def prefix_of(has_query: bool, has_context: bool, has_member: bool) -> str:
    """The template of a prefix for requests with these parts, a line each."""
    lines = [
        "{instruction}",
        *(["Query: {query}"] if has_query else []),
        *(["Context: {context}"] if has_context else []),
    ]
    if has_member or not has_query:
        lines += ["Member: {member}", "History:{history}"]
    return "\n".join([*lines, ""])


def write_request(request: Request, config: FeaturizeConfig, special: Sequence[str] = ()) -> RequestText:
    """Fill in the templates; the prefix is written once, so its bytes are equal by construction.

    Args:
      special: texts that a tokenizer reads as tokens of their own; in a value they are broken up by a blank.
    Raises: TemplateError for a query or a context that the prefix leaves out.
    """
    for name, value in (("query", request.query), ("context", request.context)):
        if value and f"{{{name}}}" not in config.prefix:
            raise TemplateError(
                f"request {request.request_id} has a {name}, and features.prefix does not write it; put {{{name}}} in."
            )

    def written(features: Features) -> str:
        return _features(features, config, special)

    events = [_event(event, config, written(event.item)) for event in request.history]
    prefix = config.prefix.format(
        instruction=config.instruction,
        query=one_line(request.query, special) or config.empty,
        context=written(request.context),
        member=written(request.member),
        history="".join(events) or f" {config.empty}",
    )
    added = [config.candidate.format(item=written(candidate.item)) for candidate in request.candidates]
    return RequestText(prefix, tuple(added))


def encode_requests(
    requests: Sequence[Request], tokenizer: Any, config: FeaturizeConfig
) -> tuple[list[EncodedRequest], Labels]:
    """Tokens of all requests, and of the labels.

    Args:
      tokenizer: fast, with offsets; it may put a token in front of every text.
    Raises: TemplateError when a label is not one token behind a candidate, or a prefix has other tokens in front of
      some candidates than of others.
    """
    special = special_texts(tokenizer)
    labels = label_tokens(write_request(requests[0], config, special), tokenizer, config)
    return [_encode(request, tokenizer, config, special) for request in track(requests, "tokenizing")], labels


def label_tokens(text: RequestText, tokenizer: Any, config: FeaturizeConfig) -> Labels:
    """The token ids of the labels, as they come out behind each candidate of a request.

    Raises: TemplateError.
    """
    found: list[set[int]] = [set(), set()]
    for added in text.candidates:
        pair = text.prefix + added
        without = _ids(tokenizer, pair)
        for label, ids in zip(config.labels, found, strict=True):
            labelled = _ids(tokenizer, pair + label)
            if labelled[:-1] != without:
                raise TemplateError(
                    f"label {label!r} is {_shown(tokenizer, labelled[len(without) - 1 :])} behind {added[-20:]!r}, not "
                    "one token after those of the pair; choose labels that the tokenizer has as words (with or without "
                    "a space in front), and a candidate template that ends before the space."
                )
            ids.add(labelled[-1])
    if any(len(ids) != 1 for ids in found) or found[0] == found[1]:
        raise TemplateError(f"labels {list(config.labels)} have the tokens {found}; expected one each, and two in all.")
    return Labels(found[0].pop(), found[1].pop())


def _encode(request: Request, tokenizer: Any, config: FeaturizeConfig, special: Sequence[str]) -> EncodedRequest:
    text = write_request(request, config, special)
    pairs = [text.prefix + added for added in text.candidates]
    first = tokenizer(pairs[0], return_offsets_mapping=True)
    length = _prefix_tokens(first["offset_mapping"], len(text.prefix))
    if length < len(first["input_ids"]) and first["offset_mapping"][length][0] < len(text.prefix):
        token = _shown(tokenizer, first["input_ids"][length : length + 1])
        raise TemplateError(
            f"request {request.request_id}: the token {token} is half of the prefix, half of the candidate; end the "
            "prefix template, or start the candidate template, with a newline."
        )
    # Equal tokens write equal text, so with the first candidate's the prefix of all of them ends where it does.
    prefix, encoded = first["input_ids"][:length], tokenizer(pairs)["input_ids"]
    for ids in encoded:
        if ids[:length] != prefix:
            place = next(i for i in range(length) if ids[i : i + 1] != prefix[i : i + 1])
            raise TemplateError(
                f"request {request.request_id}: the candidates change the tokens of the shared prefix, from token "
                f"{place} on ({_shown(tokenizer, prefix[place:][:4])} or {_shown(tokenizer, ids[place:][:4])}); end "
                "the prefix template, or start the candidate template, with a newline."
            )
    return EncodedRequest(
        request.request_id,
        np.array(prefix, dtype=np.int32),
        tuple(np.array(ids[length:], dtype=np.int32) for ids in encoded),
        np.array([candidate.label for candidate in request.candidates]),
        np.array([candidate.weight for candidate in request.candidates]),
        np.array([np.nan if c.teacher is None else c.teacher for c in request.candidates]),
        np.array([float(c.label) if c.grade is None else c.grade for c in request.candidates]),
    )


def _prefix_tokens(offsets: Sequence[tuple[int, int]], prefix_characters: int) -> int:
    """Number of tokens that end inside the prefix; a token put in front of the text has the span (0, 0)."""
    return sum(end <= prefix_characters for _, end in offsets)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _event(event: Interaction, config: FeaturizeConfig, item: str) -> str:
    return config.event.format(label=config.labels[0 if event.label else 1].strip(), item=item)


def _features(features: Features, config: FeaturizeConfig, special: Sequence[str]) -> str:
    parts = [
        config.feature.format(name=name, value=one_line(value, special))
        for name, value in features.items()
        if config.names is None or name in config.names
    ]
    return config.separator.join(parts) or config.empty


def one_line(value: str, special: Sequence[str] = ()) -> str:
    """A value as data: with line breaks or special tokens of its own it could write what the template writes."""
    text = " ".join(value.split())
    for token in special:
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text


def special_texts(tokenizer: Any) -> list[str]:
    """What the tokenizer reads as a token of its own wherever it stands, longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if len(token.content) > 1]
    return sorted(added, key=len, reverse=True)


def _check_fields(name: str, template: str, known: set[str], needed: set[str]) -> None:
    try:
        used = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ConfigError(f"template {name}: {error}; a brace that is meant as such is written twice") from error
    if used - known or needed - used:
        raise ConfigError(
            f"template {name}: has the fields {sorted(used)}; needed are {sorted(needed)}, possible {sorted(known)}"
        )


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    return str([tokenizer.decode([i]) for i in ids])
