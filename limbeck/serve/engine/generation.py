"""Generation with continuous batching: every step reads a bit of the new prompts and draws a token for all others.

A job's tokens go through the decoder as segments that grow keys and values of their own: blocks of the prompt first,
cut where the prefix cache cuts, then one token at a time. So scoring and generation find each other's prefixes, and
with int8 layers a job has the same bits whatever runs beside it and whatever the cache holds. The head is one product a
step; where the layers are int8, it is too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.errors import ConfigError, ModelError
from limbeck.serve.engine.decoder import Decoder
from limbeck.serve.engine.drawing import draw_tokens, drawn_of
from limbeck.serve.engine.int8 import Int8Linear
from limbeck.serve.engine.jobs import Drawn, FinishReason, Job, Progress
from limbeck.serve.engine.prefix_cache import PrefixCache
from limbeck.serve.engine.run import Run

HEAD_ROWS = 64
"""Rows of a prompt whose logits are made at once, for its log-probs."""


@dataclass(frozen=True, kw_only=True, slots=True)
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

    def __post_init__(self) -> None:
        if min(self.kv_bytes, self.max_running, self.prefill_tokens) < 1:
            raise ConfigError("generation: kv_bytes, max_running and prefill_tokens must be 1 or more.")


class Generator:
    """Jobs under way over one decoder. One thread at a time."""

    def __init__(self, decoder: Decoder, cache: PrefixCache, config: GenerationConfig | None = None) -> None:
        """`cache`: that of the `Scorer` over the same decoder, or a new one."""
        self.decoder, self.cache, self.config = decoder, cache, config or GenerationConfig()
        is_int8 = isinstance(decoder.weights.blocks[0].qkv, Int8Linear)
        with torch.inference_mode():
            use_int8 = self.config.head == "int8" or (self.config.head == "auto" and is_int8)
            self._head = Int8Linear.rounded(decoder.weights.head, where="head") if use_int8 else None
        self._runs: dict[int, Run] = {}
        self._numbers = itertools.count()

    @property
    def running(self) -> int:
        """Jobs that have been added and are not over."""
        return len(self._runs)

    @property
    def kv_bytes(self) -> int:
        """Of keys and values, taken by the running jobs."""
        return sum(run.kv_bytes for run in self._runs.values())

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
        self._runs[number] = Run(job, self.decoder, self.cache, self.config.keeps_text)
        return number

    def abort(self, number: int) -> None:
        """End a job at once; nothing more comes of it. One that is over already is no error."""
        run = self._runs.pop(number, None)
        if run is not None:
            run.release()

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """One pass of the decoder for all that runs; what it brought, for those it brought something."""
        reading = self._plan_reading()
        pieces = [
            (number, span) for number, run in self._runs.items() for span in run.next_spans(reading.get(number, 0))
        ]
        segments = [self._runs[number].segment(span) for number, span in pieces]
        every_row = any(self._runs[number].is_echoed for number, _ in pieces)
        states = self.decoder.run(segments, every_row) if segments else torch.empty(0)
        lengths = [len(segment.tokens) if every_row else 1 for segment in segments]
        for (number, span), rows in zip(pieces, states.split(lengths), strict=True):
            run = self._runs[number]
            if run.is_echoed and run.is_reading:
                run.echo(self._echoed(run, span, rows))
            run.advance(span, rows[-1])
        return self._draw([number for number, run in self._runs.items() if not run.is_reading])

    def check(self, job: Job) -> None:
        """Raises: what `add` raises for a job that could never run."""
        longest, limit = len(job.prompt) + job.max_tokens, self.decoder.max_tokens
        if not job.prompt:
            raise ModelError("a job with an empty prompt; give one token or more, say the beginning-of-text token.")
        if longest > limit:
            raise ModelError(f"a prompt of {len(job.prompt)} and {job.max_tokens} more tokens; the limit is {limit}.")
        known, vocabulary = self.decoder.embeddings, self.decoder.vocab_size
        if not 0 <= min(job.prompt) <= max(job.prompt) < known:
            raise ModelError(f"token ids {min(job.prompt)} to {max(job.prompt)}; the model has 0 to {known - 1}.")
        markers = [] if job.thought is None else [*job.thought.open_ids, *job.thought.close_ids]
        wrong = [token for token in (*markers, *job.end_tokens) if not 0 <= token < vocabulary]
        if wrong:
            raise ModelError(f"end tokens or markers {wrong}; the model has 0 to {vocabulary - 1}.")
        if not 0 <= job.min_tokens <= job.max_tokens:
            raise ConfigError(f"min_tokens {job.min_tokens}, max_tokens {job.max_tokens}; 0 <= min <= max is needed.")
        if job.thought is not None and (job.thought.tokens < 0 or not job.thought.close_ids):
            raise ConfigError("a thought's budget must be 0 tokens or more, with a closing marker.")
        if min(job.top_log_probs or 0, job.prompt_log_probs or 0) < 0:
            raise ConfigError("top_log_probs and prompt_log_probs must be 0 or more.")
        _check_sampling(job)
        if self._bytes_of(job) > self.config.kv_bytes:
            raise ConfigError(
                f"a job of {longest} tokens takes {self._bytes_of(job)} bytes of keys and values; the limit is "
                f"{self.config.kv_bytes}. Raise kv_bytes or lower max_tokens."
            )

    def _bytes_of(self, job: Job) -> int:
        return (len(job.prompt) + job.max_tokens) * self.decoder.bytes_per_token

    def _plan_reading(self) -> dict[int, int]:
        """How many blocks of their prompts the jobs read in this step, first come, first served.

        A job waits where another one reads the block that it needs next, and finds it in the cache afterwards.
        """
        left = self.config.prefill_tokens
        blocks: dict[int, int] = {}
        under_way: set[bytes] = set()
        for number, run in self._runs.items():
            if not run.is_reading:
                continue
            run.take_cached()
            count = 0
            for key, length in run.missing_blocks():
                is_first = not blocks and count == 0
                if (length > left and not is_first) or (key in under_way and self.cache.budget_bytes):
                    break
                under_way.add(key)
                left, count = left - length, count + 1
            if count:
                blocks[number] = count
        return blocks

    def _draw(self, numbers: Sequence[int]) -> list[Progress]:
        """Draw a token for each of these jobs and end those that are over."""
        writing = [number for number in numbers if self._runs[number].job.max_tokens]
        drawn: dict[int, Drawn] = {}
        if writing:
            runs = [self._runs[number] for number in writing]
            logits = self.decoder.logits(torch.stack([run.state for run in runs]), self._head)
            drawn = dict(zip(writing, _drawn(runs, logits), strict=True))
        return [self._progress(number, drawn.get(number)) for number in numbers]

    def _progress(self, number: int, drawn: Drawn | None) -> Progress:
        run = self._runs[number]
        finish: FinishReason | None = "length"
        if drawn is not None:
            finish = run.accept(drawn.token)
        progress = Progress(number, [] if drawn is None else [drawn], run.take_echo(), finish, run.cached_tokens)
        if finish is not None:
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
                self.decoder.logits(states[first - start : min(first + HEAD_ROWS, stop) - start], self._head),
                top,
            )
        ]


def _drawn(runs: Sequence[Run], logits: Tensor) -> list[Drawn]:
    """A token for each row of logits [R V], with log-probs where they are asked for."""
    plain = logits
    if any(not run.rules.are_free for run in runs):
        logits = logits.clone()
        for run, row in zip(runs, logits, strict=True):
            run.rules.restrict_(row)
    uniforms = [run.uniform() for run in runs]
    tokens = draw_tokens(logits, [run.job.sampling for run in runs], uniforms)
    forced = [run.rules.forced for run in runs]
    tokens = [token if force is None else force for token, force in zip(tokens, forced, strict=True)]
    drawn = [Drawn(token, None, ()) for token in tokens]
    for row, run in enumerate(runs):
        if run.job.top_log_probs is not None:
            (drawn[row],) = drawn_of([tokens[row]], plain[row : row + 1], run.job.top_log_probs)
    return drawn


def _check_sampling(job: Job) -> None:
    sampling = job.sampling
    if not 0.0 <= sampling.temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or more; found {sampling.temperature}.")
    if sampling.top_k < 0 or not 0.0 < sampling.top_p <= 1.0 or not 0.0 <= sampling.min_p <= 1.0:
        raise ConfigError(
            f"top_k {sampling.top_k}, top_p {sampling.top_p}, min_p {sampling.min_p}; needed are top_k >= 0, "
            "0 < top_p <= 1 and 0 <= min_p <= 1."
        )
    if sampling.seed is not None and sampling.seed < 0:
        raise ConfigError(f"seed must be 0 or more; found {sampling.seed}.")
