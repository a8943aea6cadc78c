"""Fields that completions and chats share, and the jobs that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field

from limbeck.engine.jobs import Constraint, Job, ThoughtBudget
from limbeck.engine.sampling import Sampling
from limbeck.serve.api.shapes import Body, TokenId
from limbeck.serve.errors import Invalid
from limbeck.serve.service import Service

SEED_MASK = (1 << 63) - 1
MAX_LOG_PROBS = 20

Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(BaseModel):
    """When a stream says how many tokens there were."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(BaseModel):
    """A schema with a name, as OpenAI's clients send it."""

    name: str = "schema"
    schema_: dict[str, Any] | bool = Field(True, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's way to ask for a form."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    choice: list[str] | None = None
    regex: str | None = None


class SamplingBody(Body):
    """How a text is drawn, and when it ends."""

    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    """Most tokens of the thought; then its closing marker is written in the model's place."""
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    best_of: int | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_running_usage(self) -> bool:
        """Whether every piece of a stream says it."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


def refuse_unsupported(body: SamplingBody) -> None:
    """Raises: Invalid for fields that would change the text and are not done here."""
    others = {
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "repetition_penalty": body.repetition_penalty not in (None, 1.0),
        "logit_bias": body.logit_bias,
        "best_of": body.best_of not in (None, body.n),
    }
    for name, is_asked in others.items():
        if is_asked:
            raise Invalid(f"{name}: not supported; leave it out.", name)
    if body.stream_options is not None and not body.stream:
        raise Invalid("stream_options: only with stream.", "stream_options")


class LogProbs(NamedTuple):
    """How many alternatives a job reports for each token; None reports no log-probs."""

    text: int | None
    prompt: int | None = None


def make_jobs(
    service: Service,
    body: SamplingBody,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    log_probs: LogProbs,
    opened: bool | None = None,
) -> list[Job]:
    """n jobs a prompt, in order; checked, so that the engine takes them.

    Args:
      opened: whether the prompt has opened a thought; None where texts have none to tell apart.
    Raises: Invalid, or LimbeckError for what the model cannot do.
    """
    count = body.n or 1
    if len(prompts) * count > service.limits.prompts:
        raise Invalid(f"{len(prompts) * count} texts; the server's limit is {service.limits.prompts}.", "n")
    if max_tokens > service.limits.new_tokens:
        raise Invalid(f"{max_tokens} tokens; the server's limit is {service.limits.new_tokens}.", "max_tokens")
    ends = frozenset(() if body.ignore_eos else service.vocabulary.ends) | frozenset(body.stop_token_ids or ())
    jobs = [
        Job(
            prompt=prompt,
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            sampling=_sampling(body, number),
            end_tokens=ends,
            top_log_probs=log_probs.text,
            prompt_log_probs=log_probs.prompt,
            constraint=_constraint(service, body, ends),
            thought=_thought(service, body, max_tokens, opened),
        )
        for prompt in prompts
        for number in range(count)
    ]
    for job in jobs:
        service.generator.check(job)
    return jobs


def _sampling(body: SamplingBody, number: int) -> Sampling:
    seed = None if body.seed is None else (body.seed + number) & SEED_MASK
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        seed=seed,
    )


def _constraint(service: Service, body: SamplingBody, ends: frozenset[int]) -> Constraint | None:
    """One for each job, since it keeps the state of its text."""
    form, structured = body.response_format, body.structured_outputs
    if form is not None and form.type == "json_object":
        return service.grammars.json_object(ends)
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise Invalid("json_schema: needed for the type json_schema.", "response_format")
        return service.grammars.json_schema(form.json_schema.schema_, ends)
    if structured is None:
        return None
    if structured.choice is not None:
        return service.grammars.choice(structured.choice, ends)
    if structured.regex is not None:
        return service.grammars.regex(structured.regex, ends)
    if isinstance(structured.json_, dict):
        return service.grammars.json_schema(structured.json_, ends)
    raise Invalid("give json (a schema as an object), choice or regex.", "structured_outputs")


def _thought(service: Service, body: SamplingBody, max_tokens: int, opened: bool | None) -> ThoughtBudget | None:
    """The limit that was asked for; with a form, also one that never binds, since a form starts behind it."""
    is_asked = body.thinking_token_budget is not None
    has_form = body.structured_outputs is not None or (
        body.response_format is not None and body.response_format.type != "text"
    )
    may_think = opened is not None and (opened or service.vocabulary.has_markers)
    if not is_asked and not (has_form and may_think):
        return None
    if is_asked and opened is None:
        raise Invalid("thinking_token_budget: only for chats.", "thinking_token_budget")
    budget = max_tokens if body.thinking_token_budget is None else body.thinking_token_budget
    words = service.vocabulary
    return ThoughtBudget(budget, () if opened else words.open_ids, words.close_ids)
