"""`/v1/score` in SGLang's and vLLM's shapes: how likely labels follow items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field

from limbeck.engine.requests import Request, Scores, single_tokens
from limbeck.serve.api.shapes import (
    Body,
    Ids,
    Seconds,
    TextOrIds,
    Texts,
    Usage,
    Written,
    described,
    ids_of,
    new_id,
    now,
    read,
    time_limit,
    written,
)
from limbeck.serve.errors import Invalid, too_long
from limbeck.serve.service import Service

PAIRS = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"))
"""What the two sides are called."""


class LabelBody(Body):
    """Which tokens an item is scored by."""

    label_token_ids: Annotated[Ids, Field(min_length=1, max_length=1000)] | None = None
    labels: Annotated[list[str], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    """The same as text; each is one token, a space in front of it included."""


class ScoreBody(LabelBody):
    """Items behind a query (SGLang), or pairs of texts (vLLM, in four spellings)."""

    query: Written | None = None
    items: Texts | None = None
    apply_softmax: bool = False
    """Probabilities among the labels, not over the vocabulary."""
    item_first: bool = False
    return_label_mass: bool = False
    """Add the probability that a label follows at all, for each item."""
    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None


class SglangScores(BaseModel):
    """For each item, a number for each label."""

    object: Literal["scoring"] = "scoring"
    scores: list[list[float]]
    label_mass: list[float] | None = None
    model: str
    usage: Usage


class VllmScore(BaseModel):
    """Of one pair."""

    index: int
    object: Literal["score"] = "score"
    score: float


class VllmScores(BaseModel):
    """Probability of the first label among the labels, for each pair."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[VllmScore]
    usage: Usage


def router(service: Service) -> APIRouter:
    """The endpoints over a service."""
    api = APIRouter(tags=["scoring"])
    described_answer: Any = {200: {"model": SglangScores | VllmScores}}

    @api.post("/v1/score", openapi_extra=described(ScoreBody), responses=described_answer)
    @api.post("/score", include_in_schema=False)
    async def score(request: HttpRequest, timeout: Seconds = None) -> Response:
        until = time_limit(service, timeout)
        body = await read(service, request, ScoreBody)
        labels = await labels_of(service, body, is_relative=body.apply_softmax or body.query is None)
        requests = await _requests(service, body, labels)
        found = await run(service, requests, until)
        usage = usage_of(requests)
        size = sum(8 * scores.logits.numel() for scores in found)
        if body.query is not None:
            return await written(service, size, lambda: _sglang(service, body, found[0], usage))
        return await written(service, size, lambda: _vllm(service, found, usage))

    return api


async def _requests(service: Service, body: ScoreBody, labels: Sequence[int]) -> list[Request]:
    """One for a query, or one for each pair."""
    if body.query is None:
        left, right = _pair(body)
        _check_count(service, right)
        if len(left) not in (1, len(right)):
            raise Invalid(f"{len(left)} texts on the one side, {len(right)} on the other; give 1 and N, or N and N.")
        if len(left) == 1:
            return [await request_of(service, left[0], right, labels)]
        prefixes = await ids_of(service, left, "queries", special=True)
        items = await ids_of(service, right, "documents", special=False)
        return [Request(prefix, [item], labels) for prefix, item in zip(prefixes, items, strict=True)]
    if body.items is None:
        raise Invalid("items: needed beside query.", "items")
    _check_count(service, body.items)
    full = body.return_label_mass or not body.apply_softmax
    if body.item_first:
        (query,) = await ids_of(service, [body.query], "query", special=False)
        texts = await ids_of(service, body.items, "items", special=True)
        total = len(texts) * len(query) + sum(map(len, texts))
        if total > service.limits.body_values:
            limit = service.limits.body_values
            raise Invalid(f"{total} tokens with the query behind each item; the server's limit is {limit}.", "items")
        return [Request((), [[*text, *query] for text in texts], labels, full)]
    return [(await request_of(service, body.query, body.items, labels))._replace(full=full)]


def _sglang(service: Service, body: ScoreBody, scores: Scores, usage: Usage) -> SglangScores:
    chances = (scores.label_log_probs if body.apply_softmax else scores.log_probs).exp()
    mass = scores.label_mass.tolist() if body.return_label_mass else None
    return SglangScores(scores=chances.tolist(), label_mass=mass, model=service.name, usage=usage)


def _vllm(service: Service, found: Sequence[Scores], usage: Usage) -> VllmScores:
    values = [value for scores in found for value in first_label(scores)]
    data = [VllmScore(index=index, score=value) for index, value in enumerate(values)]
    return VllmScores(id=new_id("score"), created=now(), model=service.name, data=data, usage=usage)


async def request_of(service: Service, query: TextOrIds, items: Sequence[TextOrIds], labels: Sequence[int]) -> Request:
    """Prefix and items are tokenised apart, so that the prefix's tokens do not depend on the item."""
    prefix = (await ids_of(service, [query], "query", special=True))[0]
    return Request(prefix, await ids_of(service, items, "items", special=False), labels)


async def run(service: Service, requests: Sequence[Request], until: float) -> list[Scores]:
    """Scores of requests.

    Raises: Invalid for what is too long for the model, Refusal when it cannot now.
    """
    for request in requests:
        _check(service, request)
    items = sum(len(request.items) for request in requests)
    found: dict[int, Any] = {}
    async with service.dispatcher.hand_in(requests, until) as ticket:
        async for outcome in ticket.outcomes():
            found[outcome.part] = outcome.value
    scores = [found[number] for number in range(len(requests))]
    service.metrics.scored_items.inc(items)
    service.metrics.prompt_tokens.inc(usage_of(requests).prompt_tokens)
    service.metrics.succeeded("score")
    for one in scores:
        for mass in [] if one.log_normalizers is None else one.label_mass.tolist():
            service.metrics.label_mass.observe(mass)
    return scores


def _check_count(service: Service, items: Sequence[TextOrIds]) -> None:
    """Before any of them is tokenised."""
    if len(items) > service.limits.items:
        raise Invalid(f"{len(items)} items; the server's limit is {service.limits.items}.", "items")


def _check(service: Service, request: Request) -> None:
    longest = len(request.prefix) + max(map(len, request.items), default=0)
    if longest > service.decoder.max_tokens:
        raise too_long(longest, 0, service.decoder.max_tokens, "a query with its longest item")
    if not request.prefix and not all(request.items):
        raise Invalid("An item without a token behind a query without a token: there is nothing to score.")
    service.budget.check(longest * service.decoder.bytes_per_token, f"a query and an item of {longest} tokens take")


def first_label(scores: Scores) -> list[float]:
    """Probability of the first label among the labels, for each item."""
    return scores.label_log_probs[:, 0].exp().tolist()


async def labels_of(service: Service, body: LabelBody, is_relative: bool) -> Sequence[int]:
    """Ids of the labels that a request is scored by.

    Args:
      is_relative: the scores are shares among the labels, of which there must be two then.
    Raises: Invalid, or ModelError for a text that is not one token.
    """
    if body.label_token_ids is not None and body.labels is not None:
        raise Invalid("labels and label_token_ids say the same; give one of them.", "labels")
    name, labels = await _asked_labels(service, body)
    if labels is None:
        raise Invalid("label_token_ids or labels: needed, since this model's tokenizer has no ' yes' and ' no'.")
    if len(set(labels)) < len(labels):
        raise Invalid(f"{name}: a label stands there twice; each counts once.", name)
    if is_relative and len(labels) < 2:
        raise Invalid(f"{name}: one label is certain among itself, whatever the item; give two or more.", name)
    if max(labels) >= service.decoder.vocab_size:
        raise Invalid(f"The vocabulary has 0 to {service.decoder.vocab_size - 1}.", "label_token_ids")
    return labels


async def _asked_labels(service: Service, body: LabelBody) -> tuple[str, Sequence[int] | None]:
    if body.labels is not None:
        return "labels", single_tokens(body.labels, await ids_of(service, body.labels, "labels", special=False))
    return "label_token_ids", service.labels if body.label_token_ids is None else body.label_token_ids


def _pair(body: ScoreBody) -> tuple[list[TextOrIds], list[TextOrIds]]:
    """The two sides, whatever they are called."""
    for names in PAIRS:
        left, right = (getattr(body, name) for name in names)
        if left is not None and right is not None:
            return left, right
    raise Invalid(f"Give query and items, or one of the pairs {'; '.join(map(', '.join, PAIRS))}.")


def usage_of(requests: Sequence[Request]) -> Usage:
    """Tokens of prefixes and items."""
    tokens = sum(len(request.prefix) + sum(map(len, request.items)) for request in requests)
    return Usage(prompt_tokens=tokens, total_tokens=tokens)
