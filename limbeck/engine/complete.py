"""Many prompts at once: what rollouts, traces and evaluation write.

Draws come from (seed, prompt, sample, position) alone, so a completion does not depend on the batch that it was made
in, up to ties that rounding decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.engine import slots
from limbeck.engine.backends import decoder_of
from limbeck.engine.generation import GenerationConfig, Generator
from limbeck.engine.jobs import Job
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.sampling import SamplingConfig
from limbeck.errors import ConfigError

PREFILL_TOKENS = 8192
"""Most prompt tokens in one forward pass: bounds the activations, not the speed."""
CACHE_BYTES = 1 << 28
"""For what different prompts begin with."""
BLOCK_TOKENS = 64


@dataclass(slots=True)
class Completion:
    """What the model wrote after one prompt."""

    token_ids: list[int]
    """The new tokens, with the stop token when there is one."""
    stopped: bool
    """True when the last token is a stop token; False when the length limit ended it."""
    log_probs: list[float] = field(default_factory=list)
    """Of each token at the sampling temperature, before top-p, as the writer saw it; where they were asked for."""
    exact_log_probs: list[float] = field(default_factory=list)
    """The same under the model as it is, where the writer rounds."""

    @property
    def text_ids(self) -> list[int]:
        """The new tokens without the stop token: what to decode."""
        return self.token_ids[:-1] if self.stopped else self.token_ids


def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    stop_ids: Sequence[int],
    seed: int = 0,
    *,
    advance: Callable[[int], Any] = lambda _: None,
    keys: Sequence[int] | None = None,
    log_probs: bool = False,
) -> list[list[Completion]]:
    """Complete every prompt `num_samples` times.

    Args:
      model: a causal LM; its weights are read where they are.
      prompts: token ids, none empty.
      config: limits and temperature.
      stop_ids: tokens that end a completion.
      seed: of the draws.
      advance: called with the number of completions that have just ended.
      keys: a number for each prompt that its draws come from; its position by default.
      log_probs: whether those of the tokens are kept.
    Returns: for each prompt, in the order given, its samples.
    Raises: ConfigError for an empty prompt or one that fills the context; ModelError for int8 where the model has no
      such products.
    """
    if not prompts:
        return []
    generator = generator_for(model, config, max(map(len, prompts)))
    return write(generator, prompts, config, stop_ids, seed, advance=advance, keys=keys, log_probs=log_probs)


def generator_for(model: Any, config: SamplingConfig, longest: int) -> Generator:
    """What writes texts behind prompts of at most `longest` tokens; in int8, the weights are rounded now."""
    decoder = decoder_of(model, config.precision, longest + config.max_new_tokens)
    limits = GenerationConfig(max_running=config.batch_size, prefill_tokens=PREFILL_TOKENS)
    kept = (CACHE_BYTES, BLOCK_TOKENS) if decoder.has_blocks else (0, decoder.max_tokens)
    return Generator(decoder, PrefixCache(*kept, ""), limits)


def write(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    stop_ids: Sequence[int],
    seed: int,
    *,
    advance: Callable[[int], Any] = lambda _: None,
    keys: Sequence[int] | None = None,
    log_probs: bool = False,
) -> list[list[Completion]]:
    """`complete` with a generator that is there."""
    decoder = generator.decoder
    _check(prompts, decoder.context)
    numbers = range(len(prompts)) if keys is None else keys
    done = [[Completion([], False) for _ in range(config.num_samples)] for _ in prompts]
    waiting = deque(
        (_job(prompt, config, decoder.context, stop_ids, (seed, number, sample), log_probs), completion)
        for prompt, number, row in zip(prompts, numbers, done, strict=True)
        for sample, completion in enumerate(row)
    )
    if slots.takes(decoder, [job for job, _ in waiting]):
        _write_together(decoder, waiting, config.batch_size, advance)
        return done
    running: dict[int, Completion] = {}
    while waiting or running:
        free = config.batch_size - len(running)
        # Together, since reading a few prompts costs a pass over the weights.
        for _ in range(min(free, len(waiting)) if 8 * free >= config.batch_size else 0):
            job, found = waiting.popleft()
            running[generator.add(job)] = found
        if ended := _step(generator, running):
            advance(ended)
    return done


def _write_together(
    decoder: Any, waiting: Sequence[tuple[Job, Completion]], rows: int, advance: Callable[[int], Any]
) -> None:
    """All jobs on an accelerator, as many at once as there are slots."""
    room = slots.Slots(decoder, [job for job, _ in waiting], min(rows, len(waiting)))
    left = deque(enumerate(job for job, _ in waiting))
    while left or not room.is_idle:
        # Together, as above.
        if left and 8 * len(room.free) >= room.rows:
            room.fill([left.popleft() for _ in range(min(len(room.free), len(left)))])
        room.run()
        for text in room.ended():
            completion = waiting[text.number][1]
            completion.token_ids, completion.stopped, completion.log_probs = text.tokens, text.stopped, text.log_probs
            advance(1)


def _step(generator: Generator, running: dict[int, Completion]) -> int:
    """Go on with all texts; how many are over."""
    ended = 0
    for progress in generator.step():
        completion = running[progress.job]
        for drawn in progress.tokens:
            completion.token_ids.append(drawn.token)
            if drawn.log_prob is not None:
                completion.log_probs.append(drawn.log_prob)
        if progress.finish is not None:
            completion.stopped = progress.finish == "stop"
            del running[progress.job]
            ended += 1
    return ended


def _job(
    prompt: Sequence[int],
    config: SamplingConfig,
    context: int,
    stop_ids: Sequence[int],
    seed: tuple[int, ...],
    log_probs: bool,
) -> Job:
    return Job(
        prompt=prompt,
        max_tokens=min(config.max_new_tokens, context - len(prompt)),
        sampling=config.draws(*seed),
        end_tokens=frozenset(stop_ids),
        top_log_probs=0 if log_probs else None,
        log_prob_temperature=config.temperature or 1.0,
    )


def _check(prompts: Sequence[Sequence[int]], context: int) -> None:
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ConfigError(
                f"prompt {index} has {len(prompt)} tokens; expected at least 1 and fewer than the {context} tokens of "
                "the model's context."
            )
