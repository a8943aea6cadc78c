"""Generation with continuous batching: every step reads a bit of the new prompts and draws a token for all others.

A job's tokens go through the decoder as segments that grow keys and values of their own: blocks of the prompt first,
cut where the prefix cache cuts, in passes of prompts alone; then one token at a time, in `steps`. So scoring and
generation find each other's prefixes, and with int8 layers a job has the same bits whatever runs beside it and whatever
the cache holds. With a drafter a step may bring a text several tokens; see `speculative`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from limbeck.config import checked
from limbeck.engine.backend import Backend
from limbeck.engine.budget import Budget
from limbeck.engine.context import Prompts
from limbeck.engine.drafter import Drafter
from limbeck.engine.isolation import Failed, each
from limbeck.engine.jobs import Drawn, Job, Progress, check_job
from limbeck.engine.passes import Computed, Passes
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.run import Run
from limbeck.engine.speculative import Proposal, SpeculationStats
from limbeck.engine.steps import Kernels, Steps
from limbeck.engine.writing import settled
from limbeck.errors import ConfigError


@checked
class GenerationConfig:
    """How many jobs run at once and what a step does."""

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
    stall_seconds: float = 2.0
    """A text in a form ends with an error where its next token takes longer to constrain."""

    def __post_init__(self) -> None:
        if min(self.max_running, self.prefill_tokens) < 1 or self.stall_seconds <= 0:
            raise ConfigError("generation: max_running and prefill_tokens must be 1 or more, stall_seconds above 0.")


class Generator:
    """Jobs under way over one decoder. One thread at a time."""

    def __init__(
        self,
        decoder: Backend,
        cache: PrefixCache,
        config: GenerationConfig | None = None,
        drafter: Drafter | None = None,
        budget: Budget | None = None,
    ) -> None:
        """Set up.

        Args:
          cache: that of the `Scorer` over the same decoder, or a new one.
          drafter: proposes tokens to it alone.
          budget: of keys, values and constraints of running jobs, which a job takes for its prompt and `max_tokens`
            from its start on; None: without limit.
        """
        self.decoder, self.cache, self.config = decoder, cache, config or GenerationConfig()
        self.drafter, self._budget = drafter, budget
        self.speculation = SpeculationStats() if drafter is None else drafter.stats
        self.steps = Steps(decoder, self.config.head, self.config.kernels)
        self._prompts = Prompts(decoder, cache)
        self._runs: dict[int, Run] = {}
        self._numbers = itertools.count()
        self._passes = Passes(self.steps, cache, self.config.prefill_tokens, self._runs)

    @property
    def running(self) -> int:
        """Jobs that have been added and are not over."""
        return len(self._runs)

    @property
    def taken_bytes(self) -> int:
        """By the running jobs."""
        return sum(self._bytes_of(run.job) for run in self._runs.values())

    @property
    def usage(self) -> float:
        """Share of the budget that they have."""
        return 0.0 if self._budget is None else self.taken_bytes / self._budget.total_bytes

    def add(self, job: Job) -> int:
        """Start a job; what the cache holds of its prompt stays there for it.

        Returns: the job's number.
        Raises: what `check` does; ConfigError where there is no room now.
        """
        number = self.begin(job)
        if number is None:
            raise ConfigError(
                f"generation: a job of {self._bytes_of(job)} bytes beside {self.running} jobs with {self.taken_bytes}; "
                f"the limit is {self.config.max_running} jobs. Finish some before."
            )
        return number

    def begin(self, job: Job) -> int | None:
        """`add`, but None where there is no room for the job now."""
        self.check(job)
        if self.running >= self.config.max_running:
            return None
        if self._budget is not None and not self._budget.take(self._bytes_of(job)):
            return None
        number, config = next(self._numbers), self.config
        try:
            prompt = self._prompts.take(job.prompt, not job.is_echoed)
        except Exception:
            self._give_back(job)
            raise
        self._runs[number] = Run(job, prompt, self.steps.behind, self.cache, config.keeps_text, config.stall_seconds)
        return number

    def _give_back(self, job: Job) -> None:
        if self._budget is not None:
            self._budget.give_back(self._bytes_of(job))

    def abort(self, number: int) -> None:
        """End a job at once; nothing more comes of it. One that is over already is no error."""
        run = self._runs.pop(number, None)
        if run is not None:
            run.release()
            self._prompts.release(run.prompt)
            self._give_back(run.job)
        if self.drafter is not None:
            self.drafter.abort(number)

    @torch.inference_mode()
    def step(self, failed: Failed[int] | None = None) -> list[Progress]:
        """One pass of the decoder for all that runs; what it brought, for those it brought something.

        Args:
          failed: told of each job that cannot go on, and why; it is over then, and the others have what they would have
            without it. None: what goes wrong is raised.
        """
        fail = None if failed is None else functools.partial(self._fail, failed)
        drafts, waiting = ({}, set()) if self.drafter is None else self._drafted(self.drafter, fail)
        self._passes.read(fail)
        writing = [number for number, run in self._runs.items() if not run.prompt.is_reading and number not in waiting]
        states = self._passes.compute(writing, fail)
        plain = [number for number in states if number not in drafts]
        for number in plain:
            for span, state in states[number]:
                self._runs[number].advance(span, state)
        return [*self._draw(plain, fail), *self._settle(drafts, states, fail)]

    def _fail(self, failed: Failed[int], number: int, error: Exception) -> None:
        self.abort(number)
        failed(number, error)

    def _drafted(self, drafter: Drafter, fail: Failed[int] | None) -> tuple[dict[int, list[Proposal]], set[int]]:
        """What the draft proposes; nothing where it fails, since texts can do without."""
        try:
            return self._proposed(drafter)
        except Exception:
            if fail is None:
                raise
            for number in self._runs:
                drafter.abort(number)
            return {}, set()

    def _proposed(self, drafter: Drafter) -> tuple[dict[int, list[Proposal]], set[int]]:
        """What the draft puts behind the texts that it helps, and the texts that have to wait for it."""
        helped = {number: run.job for number, run in self._runs.items() if drafter.helps(run.job, self.running)}
        drafter.read(helped, self.config.prefill_tokens)
        begun = {number: run for number, run in self._runs.items() if len(run.tokens) > len(run.job.prompt)}
        drafter.stats.skipped_tokens += len(begun.keys() - helped.keys())
        due = _due(begun, helped)
        ready = {number: run for number, run in due.items() if drafter.is_ready(number)}
        drafts = drafter.propose(ready)
        for number, proposals in drafts.items():
            self._runs[number].tokens += [proposal.token for proposal in proposals]
        return drafts, due.keys() - ready.keys()

    def check(self, job: Job) -> None:
        """Raises: what `add` raises for a job that could never run: ModelError for ids or lengths that the model does
        not have; ConfigError for limits that contradict each other, and where the job is beyond the budget."""
        check_job(job, self.decoder.max_tokens, self.decoder.embeddings, self.decoder.vocab_size)
        if self._budget is not None:
            self._budget.check(self._bytes_of(job), f"a text of {len(job.prompt) + job.max_tokens} tokens takes")

    def _bytes_of(self, job: Job) -> int:
        decoders = [self.decoder] if self.drafter is None else [self.decoder, self.drafter.decoder]
        form = 0 if job.constraint is None else job.constraint.size_bytes
        return form + (len(job.prompt) + job.max_tokens) * sum(decoder.bytes_per_token for decoder in decoders)

    def _draw(self, numbers: Sequence[int], fail: Failed[int] | None) -> list[Progress]:
        """Draw a token for each of these jobs and end those that are over."""
        ready = self._passes.ready(numbers, fail)
        tokens = self._passes.draw([number for number in ready if self._runs[number].job.max_tokens], fail)
        each(list(tokens), lambda number: self._runs[number].accept(tokens[number].token), fail)
        return [
            self._progress(number, [tokens[number]] if number in tokens else [])
            for number in ready
            if number in self._runs
        ]

    def _settle(
        self,
        drafts: Mapping[int, Sequence[Proposal]],
        states: Mapping[int, Sequence[Computed]],
        fail: Failed[int] | None,
    ) -> list[Progress]:
        """Take of each draft what the decoder would have written, and a token behind it."""
        rows = {number: [state for _, state in states[number]] for number in drafts if number in states}
        logits = self._passes.logits(rows, fail)
        found = each(list(logits), lambda n: self._settle_one(n, drafts[n], states[n], logits[n]), fail)
        return list(found.values())

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


def _due(begun: Mapping[int, Run], helped: Mapping[int, Job]) -> dict[int, Run]:
    """Texts that a draft helps, without those whose last token is computed already and which wait for a mask alone."""
    return {number: run for number, run in begun.items() if number in helped and run.next_spans()}
