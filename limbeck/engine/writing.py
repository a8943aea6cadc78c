"""From logits to the next tokens of texts, by their rules, their sampling and their random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from limbeck.engine.context import Span
from limbeck.engine.drawing import distribution_of, draw_tokens, drawn_of
from limbeck.engine.jobs import Drawn
from limbeck.engine.run import Run
from limbeck.engine.speculative import Proposal, settle

HEAD_ROWS = 64
"""Rows of a prompt whose logits are made at once, for its log-probs."""


def echoed(run: Run, span: Span, states: Tensor, logits: Callable[[Tensor], Tensor]) -> list[Drawn]:
    """Log-probs of the prompt's tokens behind those of a span, by the states [n D] of its tokens."""
    prompt, top = run.job.prompt, run.job.prompt_log_probs or 0
    start, stop = span[0], min(span[1], len(prompt) - 1)
    return [
        drawn
        for first in range(start, stop, HEAD_ROWS)
        for drawn in drawn_of(
            prompt[first + 1 : min(first + HEAD_ROWS, stop) + 1],
            logits(states[first - start : min(first + HEAD_ROWS, stop) - start]),
            top,
            run.job.log_prob_temperature,
        )
    ]


def written(runs: Sequence[Run], logits: Tensor) -> list[Drawn]:
    """A token for each row of logits [R V], with log-probs where they are asked for."""
    allowed = logits
    if any(not run.rules.are_free for run in runs):
        allowed = logits.clone()
        for run, row in zip(runs, allowed, strict=True):
            run.rules.restrict_(row)
    uniforms = [run.uniform() for run in runs]
    tokens = draw_tokens(allowed, [run.job.sampling for run in runs], uniforms)
    forced = [run.rules.forced for run in runs]
    tokens = [token if force is None else force for token, force in zip(tokens, forced, strict=True)]
    return [_with_log_prob(run, token, row) for run, token, row in zip(runs, tokens, logits, strict=True)]


def settled(run: Run, logits: Tensor, proposal: Proposal | None) -> Drawn:
    """The next token of a text by logits [V], given what a draft proposes: it is accepted where it comes out.

    Where there is but one token, by temperature 0 or force, the proposal has no say in it.
    """
    if proposal is None or proposal.distribution is None or run.rules.forced is not None:
        return written([run], logits[None])[0]
    allowed = logits
    if not run.rules.are_free:
        allowed = logits.clone()
        run.rules.restrict_(allowed)
    target = distribution_of(allowed, run.job.sampling)
    return _with_log_prob(run, settle(proposal.token, proposal.distribution, target, run.uniform()), logits)


def _with_log_prob(run: Run, token: int, logits: Tensor) -> Drawn:
    if run.job.top_log_probs is None:
        return Drawn(token, None, ())
    return drawn_of([token], logits[None], run.job.top_log_probs, run.job.log_prob_temperature)[0]
