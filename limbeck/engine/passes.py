"""What a step computes for several texts at once, or where that fails, for as many as can do without the guilty one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from limbeck.engine.context import Span, plan_reading
from limbeck.engine.isolation import Failed, apart, each
from limbeck.engine.jobs import Drawn
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.run import Run
from limbeck.engine.steps import Steps
from limbeck.engine.writing import echoed, written

PATIENCE_SECONDS = 0.005
"""A step waits so long for late masks; a text whose mask is later misses its turn."""

Computed = tuple[Span, Tensor]
"""A token's span and its state [D]."""


class Passes:
    """Over the texts under way, by their numbers. `fail` ends a text; None lets what goes wrong be raised."""

    def __init__(self, steps: Steps, cache: PrefixCache, prefill_tokens: int, runs: Mapping[int, Run]) -> None:
        """`prefill_tokens`: most tokens of prompts in a step; `runs`: kept by the generator."""
        self._steps, self._cache, self._prefill_tokens, self._runs = steps, cache, prefill_tokens, runs

    def read(self, fail: Failed[int] | None) -> None:
        """Go on with the prompts, in one pass."""
        runs = {id(run.prompt): number for number, run in self._runs.items() if run.prompt.is_reading}
        prompts = [self._runs[number].prompt for number in runs.values()]
        spans: dict[int, list[Span]] = {}
        for prompt, span in plan_reading(prompts, self._prefill_tokens, self._cache):
            spans.setdefault(runs[id(prompt)], []).append(span)
        states = apart(list(spans), lambda numbers: self._states(numbers, spans), fail)
        each(list(states), lambda number: self._go_on(self._runs[number], spans[number], states[number]), fail)

    def compute(self, numbers: Sequence[int], fail: Failed[int] | None) -> dict[int, list[Computed]]:
        """The states of these texts' last tokens that have none yet; none where a prompt has just ended."""

        def computed(part: Sequence[int]) -> dict[int, list[Computed]]:
            spans = {number: self._runs[number].next_spans() for number in part}
            segments = [self._runs[number].segment(span) for number in part for span in spans[number]]
            states = iter(self._steps.run(segments) if segments else ())
            return {number: [(span, next(states)) for span in spans[number]] for number in part}

        return apart(numbers, computed, fail)

    def ready(self, numbers: Sequence[int], fail: Failed[int] | None) -> list[int]:
        """Those whose constraint has said what may come next, or does so soon."""
        end = time.monotonic() + PATIENCE_SECONDS
        found = each(numbers, lambda n: self._runs[n].rules.are_ready(max(0.0, end - time.monotonic())), fail)
        return [number for number, is_ready in found.items() if is_ready]

    def draw(self, numbers: Sequence[int], fail: Failed[int] | None) -> dict[int, Drawn]:
        """The next token of each."""

        def drawn(part: Sequence[int]) -> dict[int, Drawn]:
            runs = [self._runs[number] for number in part]
            logits = self._steps.logits(torch.stack([run.state for run in runs]))
            return dict(zip(part, written(runs, logits), strict=True))

        return apart(numbers, drawn, fail)

    def logits(self, states: Mapping[int, Sequence[Tensor]], fail: Failed[int] | None) -> dict[int, Tensor]:
        """All logits [n V] of n states [D] of each text."""

        def logits(part: Sequence[int]) -> dict[int, Tensor]:
            rows = self._steps.logits(torch.stack([state for number in part for state in states[number]]))
            return dict(zip(part, rows.split([len(states[number]) for number in part]), strict=True))

        return apart(list(states), logits, fail)

    def _states(self, numbers: Sequence[int], spans: Mapping[int, Sequence[Span]]) -> dict[int, list[Tensor]]:
        """States at the last token of each span, or at each token where a prompt is echoed."""
        every_row = any(self._runs[number].job.is_echoed for number in numbers)
        segments = [self._runs[number].prompt.segment(span) for number in numbers for span in spans[number]]
        rows = self._steps.decoder.run(segments, every_row)
        parts = iter(rows.split([len(segment.tokens) if every_row else 1 for segment in segments]))
        return {number: [next(parts) for _ in spans[number]] for number in numbers}

    def _go_on(self, run: Run, spans: Sequence[Span], states: Sequence[Tensor]) -> None:
        for span, rows in zip(spans, states, strict=True):
            if run.job.is_echoed:
                run.echo(echoed(run, span, rows, self._steps.logits))
            run.prompt.advance(span, rows[-1])
