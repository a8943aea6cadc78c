"""The model that proposes tokens, with a context of its own for every text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from limbeck.engine.backend import Backend
from limbeck.engine.backends import load_decoder
from limbeck.engine.budget import Budget
from limbeck.engine.context import Behind, Context, Prompt, Prompts, Span, plan_reading
from limbeck.engine.decoder import Decoder
from limbeck.engine.drawing import distribution_of, invert_cumulative
from limbeck.engine.jobs import Job
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.run import Run
from limbeck.engine.speculative import Proposal, SpeculationStats, SpeculativeConfig
from limbeck.engine.states import Segment
from limbeck.engine.steps import Kernels, Steps
from limbeck.errors import ConfigError, ModelError
from limbeck.models.load import load_tokenizer

SELF = "self"
CACHE_BYTES = 1 << 28


class _Text(Context):
    """A job's text in the draft."""

    def __init__(self, job: Job, prompt: Prompt, behind: Behind, cache: PrefixCache) -> None:
        super().__init__(prompt, job.max_tokens, behind, cache)
        self.sampling = job.sampling
        # Numbers of its own: a proposal must not depend on the number that settles it.
        seed = job.sampling.seed
        self.random = np.random.Generator(np.random.PCG64(None if seed is None else [seed, 1]))

    def propose(self, logits: Tensor) -> Proposal:
        """Draw a token and write it."""
        if self.sampling.is_greedy:
            proposal = Proposal(int(logits.argmax()), None)
        else:
            distribution = distribution_of(logits, self.sampling)
            cumulative = distribution.cumsum(0, dtype=torch.float64)
            token = int(invert_cumulative(cumulative[None], cumulative[-1:] * self.random.random()))
            proposal = Proposal(token, distribution)
        self.tokens.append(proposal.token)
        return proposal


class Drafter:
    """Texts under way in the draft. They follow those of the generator, by its numbers."""

    def __init__(
        self,
        decoder: Backend,
        config: SpeculativeConfig,
        block_tokens: int = 64,
        kernels: Kernels = "auto",
        budget: Budget | int = CACHE_BYTES,
    ) -> None:
        """`budget`: bytes of keys and values that are kept for later prompts, or what they are shared with."""
        self.decoder, self.config = decoder, config
        self.cache = PrefixCache(budget, block_tokens, "draft")
        self.stats = SpeculationStats()
        self._steps = Steps(decoder, kernels=kernels)
        self._prompts = Prompts(decoder, self.cache)
        self._texts: dict[int, _Text] = {}

    def helps(self, job: Job, running: int) -> bool:
        """Whether a job is written with drafts beside so many others."""
        is_short = len(job.prompt) + job.max_tokens <= self.decoder.max_tokens
        depends_on_draft = not job.sampling.is_greedy and job.sampling.seed is not None
        return is_short and job.max_tokens > 1 and (running <= self.config.max_running or depends_on_draft)

    def read(self, jobs: Mapping[int, Job], most_tokens: int) -> None:
        """Go on with the prompts of these jobs."""
        for number in jobs.keys() - self._texts.keys():
            prompt = self._prompts.take(jobs[number].prompt)
            self._texts[number] = _Text(jobs[number], prompt, self._steps.behind, self.cache)
        prompts = {
            id(text.prompt): text.prompt for text in map(self._texts.__getitem__, jobs) if text.prompt.is_reading
        }
        self._compute(self.decoder.run, plan_reading(prompts.values(), most_tokens, self.cache))

    def is_ready(self, number: int) -> bool:
        """Whether the job's prompt is read."""
        return not self._texts[number].prompt.is_reading

    def propose(self, runs: Mapping[int, Run]) -> dict[int, list[Proposal]]:
        """What may come next in the texts: `num_tokens` tokens, or as many as have room before the last one."""
        for number, run in runs.items():
            known = len(self._texts[number].tokens)
            self._texts[number].tokens += run.tokens[known:]
        found: dict[int, list[Proposal]] = {number: [] for number in runs}
        for place in range(self.config.num_tokens):
            texts = {number: self._texts[number] for number, run in runs.items() if place < run.left_tokens - 1}
            if not texts:
                break
            for number, proposal in zip(texts, self._next(list(texts.values())), strict=True):
                found[number].append(proposal)
        return {number: proposals for number, proposals in found.items() if proposals}

    def _next(self, texts: Sequence[_Text]) -> list[Proposal]:
        """One more token of every text."""
        self._compute(self._steps.run, [(text, span) for text in texts for span in text.next_spans()])
        logits = self._steps.logits(torch.stack([text.state for text in texts]))
        return [text.propose(row) for text, row in zip(texts, logits, strict=True)]

    def settle(self, number: int, text_tokens: int, proposed: int, accepted: int) -> None:
        """Proposals have been looked at. `text_tokens`: length of the text now, the token behind them included."""
        self._texts[number].take_back(text_tokens - 1)
        self.stats.count(proposed, accepted)

    def abort(self, number: int) -> None:
        """Forget a text."""
        text = self._texts.pop(number, None)
        if text is not None:
            text.release()
            self._prompts.release(text.prompt)

    @staticmethod
    def _compute(run: Callable[[Sequence[Segment]], Tensor], pieces: Sequence[tuple[Prompt | Context, Span]]) -> None:
        if pieces:
            states = run([text.segment(span) for text, span in pieces])
            for (text, span), state in zip(pieces, states, strict=True):
                text.advance(span, state)


def make_drafter(
    config: SpeculativeConfig,
    model: str,
    target: Backend,
    block_tokens: int = 64,
    kernels: Kernels = "auto",
    budget: Budget | int = CACHE_BYTES,
) -> Drafter | None:
    """The draft for a served model; None where the config names none.

    Args:
      model: what `target` was loaded from.
      budget: see `Drafter`.
    Raises: ConfigError for a draft that is the target itself; ModelError for one with another vocabulary.
    """
    if config.draft is None:
        return None
    if config.draft == SELF:
        is_same = target.is_int8 == (config.precision == "int8")
        if is_same and config.layers is None:
            raise ConfigError("speculative: the draft is the served model itself; set layers, or another precision.")
        draft = target if is_same else load_decoder(model, config.precision, target.max_tokens)
    else:
        _check_vocabulary(config.draft, model)
        draft = load_decoder(config.draft, config.precision, target.max_tokens)
    if config.layers is not None:
        if not isinstance(draft, Decoder) or config.layers > draft.layers:
            had = f"the draft has {draft.layers}" if isinstance(draft, Decoder) else "transformers runs it whole"
            raise ConfigError(f"speculative: {config.layers} layers; {had}.")
        draft = Decoder(draft.weights._replace(blocks=draft.weights.blocks[: config.layers]))
    drafter = Drafter(draft, config, block_tokens, kernels, budget)
    if drafter.decoder.vocab_size != target.vocab_size:
        raise ModelError(
            f"{config.draft}: a vocabulary of {drafter.decoder.vocab_size} tokens, {model} has {target.vocab_size}; a "
            "draft must share it. Distil one from the same tokenizer."
        )
    return drafter


def _check_vocabulary(draft: str, model: str) -> None:
    own, others = (load_tokenizer(name).get_vocab() for name in (draft, model))
    different = [token for token in own.keys() | others.keys() if own.get(token) != others.get(token)]
    if different:
        raise ModelError(
            f"{draft}: another vocabulary than that of {model}, {len(different)} tokens differ, say "
            f"{min(different)!r}. A draft must have the same ids; distil one from the same tokenizer."
        )
