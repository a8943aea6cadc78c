"""Generation with continuous batching: every step reads a bit of the new prompts and draws a token for all others.

A job's tokens go through the decoder as segments that grow keys and values of their own: blocks of the prompt first,
cut where the prefix cache cuts, in passes of prompts alone; then one token at a time, in `steps`. So scoring and
generation find each other's prefixes, and with int8 layers a job has the same bits whatever runs beside it and whatever
the cache holds. With a drafter a step may bring a text several tokens; see `speculative`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from limbeck.config import checked
from limbeck.engine.backend import Backend
from limbeck.engine.context import Prompts, Span, plan_reading
from limbeck.engine.drafter import Drafter
from limbeck.engine.drawing import drawn_of
from limbeck.engine.jobs import Drawn, Job, Progress, check_job
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.run import Run
from limbeck.engine.speculative import Proposal, SpeculationStats
from limbeck.engine.steps import Kernels, Steps
from limbeck.engine.writing import settled, written
from limbeck.errors import ConfigError

HEAD_ROWS = 64
"""Rows of a prompt whose logits are made at once, for its log-probs."""

Computed = tuple[Span, Tensor]
"""A token's span and its state [D]."""


@checked
class GenerationConfig:
    """How many jobs run at once and what a step does."""

    kv_bytes: int = 1 << 30
    """Most bytes of keys and values of running jobs, those of the prefix cache apart. A job takes those of its prompt
    and `max_tokens` from its start on."""
    max_running: int = 32
    """Most jobs at once."""
    prefill_tokens: int = 256
    """Most tokens of new prompts in a step; more read a prompt faster and hold up those that are decoding. At least one
    block is read."""
    keeps_text: bool = False
    """Whether full blocks of generated text go to the prefix cache, so that the next turn of a chat finds them. Their
    keys come from decoding and differ in the last bits from those of a prompt, so that scores and texts that use them
    do."""
    head: Literal["auto", "float32", "int8"] = "auto"
    """Precision of the head's product; auto: int8 where the linear layers are. int8 reads a quarter of the bytes
    and makes a text independent of its batch to the bit."""
    kernels: Kernels = "auto"
    """Of decoding. compiled: C++ that is compiled here once; torch: torch's own operators; auto: compiled where there
    is a compiler and the model's parts are known to it."""

    def __post_init__(self) -> None:
        if min(self.kv_bytes, self.max_running, self.prefill_tokens) < 1:
            raise ConfigError("generation: kv_bytes, max_running and prefill_tokens must be 1 or more.")


class Generator:
    """Jobs under way over one decoder. One thread at a time."""

    def __init__(
        self,
        decoder: Backend,
        cache: PrefixCache,
        config: GenerationConfig | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """`cache`: that of the `Scorer` over the same decoder, or a new one; `drafter`: proposes tokens to it alone."""
        self.decoder, self.cache, self.config = decoder, cache, config or GenerationConfig()
        self.drafter = drafter
        self.speculation = SpeculationStats() if drafter is None else drafter.stats
        self.steps = Steps(decoder, self.config.head, self.config.kernels)
        self._prompts = Prompts(decoder, cache)
        self._runs: dict[int, Run] = {}
        self._numbers = itertools.count()

    @property
    def running(self) -> int:
        """Jobs that have been added and are not over."""
        return len(self._runs)

    @property
    def kv_bytes(self) -> int:
        """Of keys and values, taken by the running jobs."""
        return sum(self._bytes_of(run.job) for run in self._runs.values())

    @property
    def kv_usage(self) -> float:
        """Share of the budget that is taken."""
        return self.kv_bytes / self.config.kv_bytes

    def fits(self, job: Job) -> bool:
        """Whether there is room for the job now."""
        return self.running < self.config.max_running and self.kv_bytes + self._bytes_of(job) <= self.config.kv_bytes

    def add(self, job: Job) -> int:
        """Start a job; what the cache holds of its prompt stays there for it.

        Returns: the job's number.
        Raises: ModelError for ids or lengths that the model does not have; ConfigError for limits that contradict each
        other, and where the job does not fit.
        """
        self.check(job)
        if not self.fits(job):
            raise ConfigError(
                f"generation: a job of {self._bytes_of(job)} bytes beside {self.running} jobs with {self.kv_bytes}; "
                f"the limits are {self.config.max_running} jobs and {self.config.kv_bytes} bytes. Ask `fits` before."
            )
        number = next(self._numbers)
        prompt = self._prompts.take(job.prompt, not job.is_echoed)
        self._runs[number] = Run(job, prompt, self.steps.behind, self.cache, self.config.keeps_text)
        return number

    def abort(self, number: int) -> None:
        """End a job at once; nothing more comes of it. One that is over already is no error."""
        run = self._runs.pop(number, None)
        if run is not None:
            run.release()
            self._prompts.release(run.prompt)
        if self.drafter is not None:
            self.drafter.abort(number)

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """One pass of the decoder for all that runs; what it brought, for those it brought something."""
        drafts, waiting = ({}, set()) if self.drafter is None else self._proposed(self.drafter)
        for number, proposals in drafts.items():
            self._runs[number].tokens += [proposal.token for proposal in proposals]
        self._read()
        writing = [number for number, run in self._runs.items() if not run.prompt.is_reading and number not in waiting]
        states = self._computed(writing)
        plain = [number for number in writing if number not in drafts]
        for number in plain:
            for span, state in states[number]:
                self._runs[number].advance(span, state)
        return [*self._draw(plain), *self._settle(drafts, states)]

    def _read(self) -> None:
        """Go on with the prompts, in one pass."""
        runs = {id(run.prompt): run for run in self._runs.values() if run.prompt.is_reading}
        pieces = plan_reading((run.prompt for run in runs.values()), self.config.prefill_tokens, self.cache)
        if not pieces:
            return
        every_row = any(runs[id(prompt)].job.is_echoed for prompt, _ in pieces)
        segments = [prompt.segment(span) for prompt, span in pieces]
        lengths = [len(segment.tokens) if every_row else 1 for segment in segments]
        for (prompt, span), rows in zip(pieces, self.decoder.run(segments, every_row).split(lengths), strict=True):
            run = runs[id(prompt)]
            if run.job.is_echoed:
                run.echo(self._echoed(run, span, rows))
            prompt.advance(span, rows[-1])

    def _computed(self, numbers: Sequence[int]) -> dict[int, list[Computed]]:
        """The states of these texts' last tokens that have none yet; none where a prompt has just ended."""
        spans = {number: self._runs[number].next_spans() for number in numbers}
        segments = [self._runs[number].segment(span) for number in numbers for span in spans[number]]
        states = iter(self.steps.run(segments) if segments else ())
        return {number: [(span, next(states)) for span in spans[number]] for number in numbers}

    def _proposed(self, drafter: Drafter) -> tuple[dict[int, list[Proposal]], set[int]]:
        """What the draft proposes for the texts that it helps, and the texts that have to wait for it."""
        helped = {number: run.job for number, run in self._runs.items() if drafter.helps(run.job, self.running)}
        drafter.read(helped, self.config.prefill_tokens)
        begun = {number: run for number, run in self._runs.items() if len(run.tokens) > len(run.job.prompt)}
        drafter.stats.skipped_tokens += len(begun.keys() - helped.keys())
        ready = {number: begun[number] for number in begun.keys() & helped.keys() if drafter.is_ready(number)}
        return drafter.propose(ready), (begun.keys() & helped.keys()) - ready.keys()

    def check(self, job: Job) -> None:
        """Raises: what `add` raises for a job that could never run."""
        check_job(job, self.decoder.max_tokens, self.decoder.embeddings, self.decoder.vocab_size)
        if self._bytes_of(job) > self.config.kv_bytes:
            tokens = len(job.prompt) + job.max_tokens
            raise ConfigError(
                f"a job of {tokens} tokens takes {self._bytes_of(job)} bytes of keys and values; "
                f"the limit is {self.config.kv_bytes}. Raise kv_bytes or lower max_tokens."
            )

    def _bytes_of(self, job: Job) -> int:
        decoders = [self.decoder] if self.drafter is None else [self.decoder, self.drafter.decoder]
        return (len(job.prompt) + job.max_tokens) * sum(decoder.bytes_per_token for decoder in decoders)

    def _draw(self, numbers: Sequence[int]) -> list[Progress]:
        """Draw a token for each of these jobs and end those that are over."""
        writing = [number for number in numbers if self._runs[number].job.max_tokens]
        tokens: dict[int, Drawn] = {}
        if writing:
            runs = [self._runs[number] for number in writing]
            logits = self.steps.logits(torch.stack([run.state for run in runs]))
            tokens = dict(zip(writing, written(runs, logits), strict=True))
            for number, drawn in tokens.items():
                self._runs[number].accept(drawn.token)
        return [self._progress(number, [tokens[number]] if number in tokens else []) for number in numbers]

    def _settle(
        self, drafts: Mapping[int, Sequence[Proposal]], states: Mapping[int, Sequence[Computed]]
    ) -> list[Progress]:
        """Take of each draft what the decoder would have written, and a token behind it."""
        if not drafts:
            return []
        rows = torch.stack([state for number in drafts for _, state in states[number]])
        parts = self.steps.logits(rows).split([len(states[number]) for number in drafts])
        return [
            self._settle_one(number, proposals, states[number], logits)
            for (number, proposals), logits in zip(drafts.items(), parts, strict=True)
        ]

    def _settle_one(
        self, number: int, proposals: Sequence[Proposal], states: Sequence[Computed], logits: Tensor
    ) -> Progress:
        run = self._runs[number]
        run.take_back(len(run.tokens) - len(proposals))
        tokens: list[Drawn] = []
        for (span, state), row, proposal in zip(states, logits, [*proposals, None], strict=True):
            run.advance(span, state)
            tokens.append(settled(run, row, proposal))
            run.accept(tokens[-1].token)
            if run.finish is not None or proposal is None or tokens[-1].token != proposal.token:
                break
        accepted = sum(drawn.token == proposal.token for drawn, proposal in zip(tokens, proposals, strict=False))
        assert self.drafter is not None
        self.drafter.settle(number, len(run.tokens), len(proposals), accepted)
        return self._progress(number, tokens, len(proposals), accepted)

    def _progress(self, number: int, tokens: Sequence[Drawn], proposed: int = 0, accepted: int = 0) -> Progress:
        run = self._runs[number]
        progress = Progress(number, tokens, run.take_echo(), run.finish, run.cached_tokens, proposed, accepted)
        if run.finish is not None:
            self.abort(number)
        return progress

    def _echoed(self, run: Run, span: tuple[int, int], states: Tensor) -> list[Drawn]:
        """Log-probs of the prompt's tokens behind those of a span."""
        prompt, top = run.job.prompt, run.job.prompt_log_probs or 0
        start, stop = span[0], min(span[1], len(prompt) - 1)
        return [
            drawn
            for first in range(start, stop, HEAD_ROWS)
            for drawn in drawn_of(
                prompt[first + 1 : min(first + HEAD_ROWS, stop) + 1],
                self.steps.logits(states[first - start : min(first + HEAD_ROWS, stop) - start]),
                top,
            )
        ]
