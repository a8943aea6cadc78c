"""`/v1/score` in SGLang's and vLLM's shapes, the `/rerank` family in Cohere's, and prefixes sent ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from limbeck.engine.requests import Request, Scores, label_ids
from limbeck.serve.api.shapes import Body, Seconds, TextOrIds, TokenId, Usage, check_model, ids_of, new_id, now
from limbeck.serve.errors import Invalid
from limbeck.serve.service import Service

Texts = TextOrIds | list[TextOrIds]


class LabelBody(Body):
    """Which tokens an item is scored by."""

    label_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=1000)] | None = None
    labels: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
    """The same as text; each is one token, a space in front of it included."""


class ScoreBody(LabelBody):
    """Items behind a query (SGLang), or pairs of texts (vLLM, in four spellings)."""

    query: TextOrIds | None = None
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

    @api.post("/v1/score", response_model=SglangScores | VllmScores, response_model_exclude_none=True)
    @api.post("/score", response_model=SglangScores | VllmScores, include_in_schema=False)
    async def score(body: ScoreBody, timeout: Seconds = None) -> Any:
        check_model(service, body.model)
        if body.query is not None:
            return await _sglang(service, body, timeout)
        return await _vllm(service, body, timeout)

    return api


async def _sglang(service: Service, body: ScoreBody, timeout: float | None) -> SglangScores:
    assert body.query is not None
    if body.items is None:
        raise Invalid("items: needed beside query.", "items")
    items = _listed(body.items)
    labels = labels_of(service, body)
    if body.item_first:
        (query,) = await ids_of(service, [body.query], "query", special=False)
        texts = await ids_of(service, items, "items", special=True)
        request = Request((), [[*text, *query] for text in texts], labels)
    else:
        request = await request_of(service, body.query, items, labels)
    request = request._replace(full=body.return_label_mass or not body.apply_softmax)
    (scores,) = await run(service, [request], timeout)
    chances = (scores.label_log_probs if body.apply_softmax else scores.log_probs).exp()
    return SglangScores(
        scores=chances.tolist(),
        label_mass=scores.label_mass.tolist() if body.return_label_mass else None,
        model=service.name,
        usage=usage_of([request]),
    )


async def _vllm(service: Service, body: ScoreBody, timeout: float | None) -> VllmScores:
    left, right = _pair(body)
    if len(left) not in (1, len(right)):
        raise Invalid(f"{len(left)} texts on the one side, {len(right)} on the other; give 1 and N, or N and N.")
    labels = labels_of(service, body)
    if len(left) == 1:
        requests = [await request_of(service, left[0], right, labels)]
    else:
        prefixes = await ids_of(service, left, "queries", special=True)
        items = await ids_of(service, right, "documents", special=False)
        requests = [Request(prefix, [item], labels) for prefix, item in zip(prefixes, items, strict=True)]
    found = await run(service, requests, timeout)
    values = [value for scores in found for value in first_label(scores)]
    data = [VllmScore(index=index, score=value) for index, value in enumerate(values)]
    return VllmScores(id=new_id("score"), created=now(), model=service.name, data=data, usage=usage_of(requests))


async def request_of(service: Service, query: TextOrIds, items: list[TextOrIds], labels: Sequence[int]) -> Request:
    """Prefix and items are tokenised apart, so that the prefix's tokens do not depend on the item."""
    prefix = (await ids_of(service, [query], "query", special=True))[0]
    return Request(prefix, await ids_of(service, items, "items", special=False), labels)


async def run(service: Service, requests: Sequence[Request], timeout: float | None) -> list[Scores]:
    """Scores of requests.

    Raises: Invalid for what is too much or too long for the server, Refusal when it cannot now.
    """
    for request in requests:
        _check(service, request)
    items = sum(len(request.items) for request in requests)
    if items > service.limits.items:
        raise Invalid(f"{items} items; the server's limit is {service.limits.items}.", "items")
    found: dict[int, Any] = {}
    async with service.hand_in(requests, timeout) as ticket:
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


def _check(service: Service, request: Request) -> None:
    longest = len(request.prefix) + max(map(len, request.items), default=0)
    if longest > service.decoder.max_tokens:
        raise Invalid(f"{longest} tokens; the model reads {service.decoder.max_tokens}.")
    if not request.prefix and not all(request.items):
        raise Invalid("An item without a token behind a query without a token: there is nothing to score.")


def first_label(scores: Scores) -> list[float]:
    """Probability of the first label among the labels, for each item."""
    return scores.label_log_probs[:, 0].exp().tolist()


def labels_of(service: Service, body: LabelBody) -> Sequence[int]:
    """Ids of the labels that a request is scored by.

    Raises: Invalid, or ModelError for a text that is not one token.
    """
    if body.label_token_ids is not None and body.labels is not None:
        raise Invalid("labels and label_token_ids say the same; give one of them.", "labels")
    if body.labels is not None:
        return label_ids(service.tokenizer, body.labels)
    labels = service.labels if body.label_token_ids is None else body.label_token_ids
    if labels is None:
        raise Invalid("label_token_ids or labels: needed, since this model's tokenizer has no ' yes' and ' no'.")
    if max(labels) >= service.decoder.vocab_size:
        raise Invalid(f"The vocabulary has 0 to {service.decoder.vocab_size - 1}.", "label_token_ids")
    return labels


def _listed(texts: Texts) -> list[TextOrIds]:
    """One text, or ids of one, as a list of one."""
    if isinstance(texts, str) or (texts and isinstance(texts[0], int)):
        return [texts]
    return [*texts]


def _pair(body: ScoreBody) -> tuple[list[TextOrIds], list[TextOrIds]]:
    """The two sides, whatever they are called."""
    pairs = {
        "text_1, text_2": (body.text_1, body.text_2),
        "data_1, data_2": (body.data_1, body.data_2),
        "queries, documents": (body.queries, body.documents),
        "queries, items": (body.queries, body.items),
    }
    for left, right in pairs.values():
        if left is not None and right is not None:
            return _listed(left), _listed(right)
    raise Invalid(f"Give query and items, or one of the pairs {'; '.join(pairs)}.")


def usage_of(requests: Sequence[Request]) -> Usage:
    """Tokens of prefixes and items."""
    tokens = sum(len(request.prefix) + sum(map(len, request.items)) for request in requests)
    return Usage(prompt_tokens=tokens, total_tokens=tokens)
