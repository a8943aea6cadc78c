"""Fields that completions and chats share, and the jobs that they ask for."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from limbeck.engine import constraints
from limbeck.engine.constraints import Form
from limbeck.engine.jobs import Job, ThoughtBudget
from limbeck.engine.sampling import Sampling
from limbeck.serve.api.shapes import Body, Count, Ids, Positive, Shape
from limbeck.serve.errors import Invalid, too_long
from limbeck.serve.forms import SOURCE_CHARACTERS, Compiled, source_of
from limbeck.serve.service import Service

SEED_MASK = (1 << 63) - 1
MAX_LOG_PROBS = 20
MAX_STOPS = 16
STOP_CHARACTERS = 1000


def _stops(value: Any) -> list[str]:
    """One stop string or several."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("give a text, or a list of texts")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"{len(stops)} texts; the limit is {MAX_STOPS}")
    if not all(0 < len(stop) <= STOP_CHARACTERS for stop in stops):
        raise ValueError(f"each text has 1 to {STOP_CHARACTERS} characters")
    return stops


_STOP: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": STOP_CHARACTERS}
Stops = Annotated[
    list[str],
    PlainValidator(_stops),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]}),
]


class StreamOptions(Shape):
    """When a stream says how many tokens there were."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Shape):
    """A schema with a name, as OpenAI's clients send it."""

    name: str = "schema"
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool = False


class ResponseFormat(Shape):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """The schema itself, as llama.cpp and Together take it."""

    @property
    def form(self) -> Form | None:
        """Raises: Invalid for a type without its schema."""
        if self.type == "text":
            return None
        if self.json_schema is not None and self.type == "json_schema":
            return constraints.json_schema(self.json_schema.schema_)
        if self.schema_ is None and self.type == "json_schema":
            raise Invalid("response_format: json_schema is needed for the type json_schema.", "response_format")
        return constraints.json_schema(self.schema_ or {"type": "object"})


class StructuredOutputs(Shape):
    """vLLM's way to ask for a form."""

    json_: Any = Field(None, alias="json")
    """A schema, or one as text."""
    json_object: bool = False
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    regex: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _knows_all(cls, data: Any) -> Any:
        names = ("json", "json_object", "choice", "regex")
        other = next((name for name in data if name not in names), None) if isinstance(data, dict) else None
        if other is not None:  # told here, for the first alone
            raise ValueError(f"{other[:40]!r} is none of {', '.join(names)}")
        return data

    @property
    def forms(self) -> list[Form]:
        """All that are asked for. Raises: Invalid for what is no schema."""
        found = []
        if self.json_ is not None:
            found.append(constraints.json_schema(_schema(self.json_)))
        if self.json_object:
            found.append(constraints.json_schema({"type": "object"}))
        if self.choice is not None:
            found.append(constraints.choice(self.choice))
        if self.regex is not None:
            found.append(constraints.regex(self.regex))
        return found


def _schema(value: Any) -> Any:
    try:
        schema = json.loads(value[: SOURCE_CHARACTERS + 1]) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict | bool):
        told = f"give a schema, as an object or as JSON in a text of at most {SOURCE_CHARACTERS} characters."
        raise Invalid(f"structured_outputs.json: {told}", "structured_outputs")
    return schema


class SamplingBody(Body):
    """How a text is drawn, and when it ends."""

    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: Count | None = None
    min_tokens: Count = 0
    stop: Stops = Field(default_factory=list)
    stop_token_ids: Annotated[Ids, Field(max_length=64)] = Field(default_factory=list)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    thinking_token_budget: Count | None = None
    """Most tokens of the thought; then its closing marker is written in the model's place."""
    best_of: Positive | None = None

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_running_usage(self) -> bool:
        """Whether every piece of a stream says it."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def form(self) -> Form | None:
        """The form of the answer. Raises: Invalid for more than one, or one that is none."""
        forms = [] if self.structured_outputs is None else self.structured_outputs.forms
        if self.structured_outputs is not None and not forms:
            raise Invalid("structured_outputs: give json, json_object, choice or regex.", "structured_outputs")
        asked = None if self.response_format is None else self.response_format.form
        forms += [] if asked is None else [asked]
        if len(forms) > 1:
            raise Invalid("response_format, structured_outputs: more than one form; give one.", "structured_outputs")
        return forms[0] if forms else None


def refuse_contradictions(body: SamplingBody) -> None:
    """Raises: Invalid for fields that do not go together."""
    if body.best_of not in (None, body.n):
        raise Invalid("best_of: not supported; use n.", "best_of")
    if body.stream_options is not None and not body.stream:
        raise Invalid("stream_options: only with stream.", "stream_options")


class LogProbs(NamedTuple):
    """How many alternatives a job reports for each token; None reports no log-probs."""

    text: int | None
    prompt: int | None = None

    def of(self, prompts: Sequence[Sequence[int]], count: int, max_tokens: int) -> int:
        """How many a reply can have."""
        text = 0 if self.text is None else len(prompts) * count * max_tokens * (self.text + 1)
        return text + (0 if self.prompt is None else sum(map(len, prompts)) * count * (self.prompt + 1))


async def make_jobs(
    service: Service,
    body: SamplingBody,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    log_probs: LogProbs,
    until: float,
    opened: bool | None = None,
) -> list[Job]:
    """n jobs a prompt, in order; checked, so that the engine takes them.

    Args:
      until: when the request's time is over.
      opened: whether the prompt has opened a thought; None where texts have none to tell apart.
    Raises: Invalid, Refusal when the time is over, or LimbeckError for what the model cannot do.
    """
    _check_size(service, body, prompts, max_tokens, log_probs)
    ends = frozenset(() if body.ignore_eos else service.vocabulary.ends) | frozenset(body.stop_token_ids)
    compiled = await _compiled(service, body, until)
    job = functools.partial(
        Job,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        end_tokens=ends,
        top_log_probs=log_probs.text,
        prompt_log_probs=log_probs.prompt,
        thought=_thought(service, body, max_tokens, opened, compiled),
    )
    jobs = [
        job(
            prompt=prompt,
            sampling=_sampling(body, number),
            constraint=None if compiled is None else service.forms.constraint(compiled, ends),
        )
        for prompt in prompts
        for number in range(body.n)
    ]
    for one in jobs[:: body.n]:
        service.generator.check(one)
    return jobs


async def _compiled(service: Service, body: SamplingBody, until: float) -> Compiled | None:
    """The form that is asked for. Raises: as `make_jobs`."""
    if body.response_format is None and body.structured_outputs is None:
        return None

    def asked() -> tuple[Form, str] | None:
        form = body.form
        return None if form is None else (form, source_of(form))

    found = await service.threads.run(body.size_bytes, asked)
    return None if found is None else await service.forms.compiled(*found, until)


def check_count(service: Service, texts: int) -> None:
    """Raises: Invalid for more texts than a request may ask for."""
    if texts > service.limits.prompts:
        raise Invalid(f"{texts} texts; the server's limit is {service.limits.prompts}.", "n")


def _check_size(
    service: Service,
    body: SamplingBody,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    log_probs: LogProbs,
) -> None:
    limits, found = service.limits, log_probs.of(prompts, body.n, max_tokens)
    check_count(service, len(prompts) * body.n)
    longest = max(map(len, prompts))
    if longest + max_tokens > service.decoder.max_tokens:
        name = "messages" if "messages" in type(body).model_fields else "prompt"
        raise too_long(longest, max_tokens, service.decoder.max_tokens, name)
    if max_tokens > limits.new_tokens:
        raise Invalid(f"{max_tokens} tokens; the server's limit is {limits.new_tokens}.", "max_tokens")
    if found > limits.log_probs:
        raise Invalid(f"Up to {found} log-probs; the server's limit is {limits.log_probs}.", "logprobs")


def _sampling(body: SamplingBody, number: int) -> Sampling:
    seed = None if body.seed is None else (body.seed + number) & SEED_MASK
    top_k = max(0, body.top_k)
    return Sampling(temperature=body.temperature, top_k=top_k, top_p=body.top_p, min_p=body.min_p, seed=seed)


def _thought(
    service: Service, body: SamplingBody, max_tokens: int, opened: bool | None, form: Compiled | None
) -> ThoughtBudget | None:
    """The limit that was asked for; with a form, also one that never binds, since a form starts behind it."""
    is_asked = body.thinking_token_budget is not None
    may_think = opened is not None and (opened or service.vocabulary.has_markers)
    if not is_asked and not (form is not None and may_think):
        return None
    if is_asked and opened is None:
        raise Invalid("thinking_token_budget: only for chats.", "thinking_token_budget")
    budget = max_tokens if body.thinking_token_budget is None else body.thinking_token_budget
    words = service.vocabulary
    return ThoughtBudget(budget, () if opened else words.open_ids, words.close_ids)
