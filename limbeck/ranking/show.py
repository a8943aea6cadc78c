"""`limbeck rank show`: requests as a model reads them, with their tokens, the border of the prefix and the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from limbeck.config import completed_by
from limbeck.errors import ConfigError
from limbeck.models.load import load_tokenizer
from limbeck.ranking import evaluate
from limbeck.ranking.data import RankingDataConfig, features_of, read_requests
from limbeck.ranking.featurize import FeaturizeConfig, encode_requests, special_texts, write_request
from limbeck.ranking.interaction import Request


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Data and features of a trained scorer, or of the data that is named."""
    if isinstance(tree.get("model"), str):
        return evaluate.completed(tree)
    data, features = tree.get("data"), tree.get("features") or {}
    if not isinstance(data, Mapping) or not isinstance(features, Mapping) or "prefix" in features:
        return tree
    return {**tree, "features": {**features_of(data), **features}}


@completed_by(completed)
class ShowRequestsConfig:
    """Which requests are shown."""

    model: str | None = None
    """Scorer whose data, features and tokenizer are used; null shows the text of `data` alone."""
    data: RankingDataConfig | None = None
    """What is ranked; null takes what the model was trained on."""
    features: FeaturizeConfig = field(default_factory=FeaturizeConfig)
    """How requests become text."""
    part: Literal["train", "validation", "test"] = "train"
    """Part of the split."""
    start: int = 0
    """Number of the first request, counted from 0 in the order of time."""
    num: int = 1
    """How many requests are shown, >= 1."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.start < 0:
            raise ConfigError(f"num {self.num}, start {self.start}; expected num of 1 or more and start of 0 or more")
        if self.data is None:
            raise ConfigError("rank show: name data, or as `model` the output of rank train")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownCandidate:
    """What a candidate adds to the prefix."""

    item_id: str
    text: str
    label: bool
    label_text: str
    """What follows the text, where it is trained."""
    grade: float | None
    tokens: Sequence[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRequest:
    """A request; tokens are missing where no model is named."""

    request_id: str
    member_id: str
    time: float
    events: int
    """Of the history."""
    prefix: str
    prefix_tokens: Sequence[str] | None
    candidates: Sequence[ShownCandidate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Some requests of a part."""

    requests: Sequence[ShownRequest]
    total: int

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def from_recipe(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Data and features of a recipe of rank train."""
    known = {"model", "data", "features", "part", "start", "num"}
    return {name: value for name, value in tree.items() if name in known}


def run(config: ShowRequestsConfig) -> Shown:
    """The requests that are asked for. Raises: what reading does; ConfigError when `start` is beyond the last."""
    assert config.data is not None
    part = getattr(read_requests(config.data)[0], config.part)
    if config.start >= len(part):
        raise ConfigError(f"start: {config.start}; the {config.part} part has {len(part)} requests, counted from 0.")
    tokenizer = None if config.model is None else load_tokenizer(config.model)
    chosen = part[config.start : config.start + config.num]
    return Shown(requests=[_shown(request, config.features, tokenizer) for request in chosen], total=len(part))


def _shown(request: Request, features: FeaturizeConfig, tokenizer: Any) -> ShownRequest:
    text = write_request(request, features, special_texts(tokenizer) if tokenizer is not None else ())
    tokens: list[list[str] | None] = [None] * (1 + len(text.candidates))
    if tokenizer is not None:
        (encoded,), _ = encode_requests([request], tokenizer, features)
        tokens = [[tokenizer.decode([i]) for i in ids] for ids in (encoded.prefix, *encoded.candidates)]
    candidates = [
        ShownCandidate(
            item_id=candidate.item_id,
            text=written,
            label=candidate.label,
            label_text=features.labels[0 if candidate.label else 1],
            grade=candidate.grade,
            tokens=own,
        )
        for candidate, written, own in zip(request.candidates, text.candidates, tokens[1:], strict=True)
    ]
    return ShownRequest(
        request_id=request.request_id,
        member_id=request.member_id,
        time=request.time,
        events=len(request.history),
        prefix=text.prefix,
        prefix_tokens=tokens[0],
        candidates=candidates,
    )


def print_requests(shown: Shown) -> None:
    """The requests for people, on standard output: tokens in turns of two shades, a line where the prefix ends."""
    console = Console()
    for request in shown.requests:
        heading = f"request {request.request_id}, member {request.member_id}, time {request.time:g}"
        console.print(Text(f"{heading}, {request.events} events of history", style="bold"), soft_wrap=True)
        console.print(_tokens(request.prefix, request.prefix_tokens), end="", soft_wrap=True)
        console.print(Text(f"──── prefix ends{_count(request.prefix_tokens)}", style="cyan"), soft_wrap=True)
        for candidate in request.candidates:
            written = _tokens(candidate.text, candidate.tokens)
            written.append(candidate.label_text, style="bold green" if candidate.label else "bold red")
            grade = "" if candidate.grade is None else f", grade {candidate.grade:g}"
            console.print(written + Text(f"   [{candidate.item_id}{grade}{_count(candidate.tokens)}]"), soft_wrap=True)
    console.print(f"{len(shown.requests)} of {shown.total} requests", highlight=False)


def _tokens(text: str, tokens: Sequence[str] | None) -> Text:
    if tokens is None or "".join(tokens) != text:
        return Text(text)
    return Text.assemble(*((token, "on grey23" if place % 2 else "on grey11") for place, token in enumerate(tokens)))


def _count(tokens: Sequence[str] | None) -> str:
    return "" if tokens is None else f", {len(tokens)} tokens"
