"""On-policy distillation: the student writes, the teacher scores what it wrote, KD only.

1. `OnPolicyConfig.is_on_policy` says from the step number alone whether a step trains on rollouts: none in the first
   `start_fraction` of the run (given traces: the first stage), then the share `fraction`, evenly spread.
2. A window of `max_staleness_steps + 1` steps shares one refresh: at its first on-policy step the student completes
   the prompts of all its on-policy steps. A window without end is offline on-policy distillation (2604.13010).
3. Rollouts become examples with KD weight on what the student wrote. From there on they are like any other example:
   packed, scored by the teacher in one pass, any divergence. No gradient passes through the sampling.

Draws come from (seed, step of the refresh, example, sample), so neither the ranks nor a restart change them; the
rollouts in use are part of the saved state, because the weights that wrote them are gone.

Sources: GKD (2306.13649, lambda = `fraction`), 2502.14305 (two stages, temperature 0.8 to 0.9, 300 tokens), 2602.15260
(rollouts of a few tokens), 2604.13010 (score once). Differs from GKD:
a step is of one kind, and the kinds are spread evenly, not drawn.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from limbeck.distill.on_policy import OnPolicyConfig
from limbeck.distill.parallel import Ranks
from limbeck.distill.plan import PlannedStep
from limbeck.engine.complete import Completion, complete, generator_for, write
from limbeck.engine.rescore import rescore
from limbeck.engine.sampling import SamplingConfig
from limbeck.ledger import Ledger, decoding_flops
from limbeck.models.anatomy import Sizes
from limbeck.progress import console
from limbeck.traces.batch import Example
from limbeck.traces.render import RenderConfig, stop_ids
from limbeck.traces.sample import COT, PROMPT, Sample


class Prompts(NamedTuple):
    """What the student is asked, and how long the given traces answer."""

    ids: list[list[int]]
    """Token ids of each example's prompt, as at inference."""
    mean_response_tokens: float
    """Of the given traces before any cut."""


@dataclass(slots=True)
class Rollouts:
    """The rollouts in use, and what is needed to write the next ones."""

    config: OnPolicyConfig
    steps: Sequence[PlannedStep]
    prompts: Prompts
    stop_ids: tuple[int, ...]
    masked_ids: np.ndarray
    seed: int
    refreshed_at: int = -1
    """The step whose weights wrote the rollouts in use."""
    completions: dict[int, list[Completion]] = field(default_factory=dict)
    """Index of an example -> the completions of its prompt."""
    has_warned: bool = False
    rounding_seconds: float = 0.0
    """That rounding the weights took, the last time."""

    def is_due(self, step: int) -> bool:
        """Whether `step` trains on rollouts."""
        return self.config.is_on_policy(step, len(self.steps))

    def refresh(self, step: int, model: Any, sizes: Sizes, ledger: Ledger, ranks: Ranks) -> None:
        """Let the student write the rollouts of the window of `step`, unless they are there; charged as `sampling`.

        Every rank writes a share of them and all get the whole.
        """
        window = self.config.window(step, len(self.steps))
        if self.refreshed_at in window:
            return
        needed = sorted({i for number in window if self.is_due(number) for i in self.steps[number].indices})
        mine = needed[ranks.rank :: ranks.world_size]
        prompts = [self.prompts.ids[i] for i in mine]
        with ledger.phase("sampling"):
            limits = replace(self.config, max_new_tokens=self.config.new_tokens_at(step, len(self.steps)))
            found = self._write(model, prompts, mine, self.seed * 1_000_003 + step, limits)
        parts = [dict(zip(mine, found, strict=True))]
        self._charge(ledger, sizes, prompts, found)
        if ranks.world_size > 1:
            parts = [{} for _ in range(ranks.world_size)]
            dist.all_gather_object(parts, dict(zip(mine, found, strict=True)))
        self.completions = {i: part[i] for part in parts for i in part}
        self.refreshed_at = step

    def _write(
        self, model: Any, prompts: Sequence[Sequence[int]], keys: Sequence[int], seed: int, limits: SamplingConfig
    ) -> list[list[Completion]]:
        if self.config.precision == "float32" or not prompts:
            return complete(model, prompts, limits, self.stop_ids, seed, keys=keys)
        start = time.perf_counter()
        generator = generator_for(model, limits, max(map(len, prompts)))
        self.rounding_seconds = time.perf_counter() - start
        found = write(generator, prompts, limits, self.stop_ids, seed, keys=keys, log_probs=True)
        rescore(model, prompts, found, self.config.temperature)
        return found

    def examples_of(self, step: int) -> list[Example]:
        """The rollouts of the prompts of `step`, KD weight 1 on what the student wrote."""
        return [
            self._example(index, completion)
            for index in self.steps[step].indices
            for completion in self.completions[index]
        ]

    def metrics(self, step: int) -> dict[str, Any]:
        """Columns of metrics.jsonl for an on-policy step; says once when rollouts have grown too long."""
        written = [c for index in self.steps[step].indices for c in self.completions[index]]
        mean = sum(len(c.token_ids) for c in written) / len(written)
        growth = mean / self.prompts.mean_response_tokens
        if growth > self.config.length_warning_factor and not self.has_warned:
            self.has_warned = True
            console.print(
                f"step {step + 1}: rollouts have {mean:.0f} tokens in the mean, {growth:.1f} times the given responses "
                "(length inflation); lower on_policy.max_new_tokens or raise start_fraction.",
                highlight=False,
            )
        return {
            "rollout_tokens": mean,
            "rollout_stopped": sum(c.stopped for c in written) / len(written),
            "rollout_length_over_given": growth,
            "rollout_age_steps": step - self.refreshed_at,
            **self._mismatch(written),
        }

    def _mismatch(self, written: Sequence[Completion]) -> dict[str, float]:
        """How far the rounded sampler is from the student that it stands for; nothing where it is the student."""
        if self.config.precision == "float32":
            return {}
        ratios = np.concatenate([_log_ratios(completion) for completion in written])
        # KL(sampler, student) a token by the estimator r - 1 - log r, which is never negative.
        found = {
            "rollout_mismatch_nats": float(np.mean(np.expm1(ratios) - ratios)),
            "rounding_seconds": self.rounding_seconds,
        }
        if self.config.importance_limit is not None:
            found["rollout_importance"] = float(np.minimum(np.exp(ratios), self.config.importance_limit).mean())
        return found

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: JSON-ready."""
        return {
            "refreshed_at": self.refreshed_at,
            "has_warned": self.has_warned,
            "completions": {
                str(i): [dataclasses.astuple(c) for c in found] for i, found in sorted(self.completions.items())
            },
        }

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.refreshed_at, self.has_warned = int(tree["refreshed_at"]), bool(tree["has_warned"])
        self.completions = {
            int(i): [Completion([int(token) for token in ids], bool(stopped), *more) for ids, stopped, *more in found]
            for i, found in tree["completions"].items()
        }

    def _example(self, index: int, completion: Completion) -> Example:
        prompt, written = self.prompts.ids[index], np.array(completion.token_ids, dtype=np.int32)
        ids = np.concatenate([np.array(prompt, dtype=np.int32), written])
        weight = np.zeros(len(ids), dtype=np.float32)
        weight[len(prompt) :] = ~np.isin(written, self.masked_ids)
        if self.config.importance_limit is not None:
            weight[len(prompt) :] *= np.minimum(np.exp(_log_ratios(completion)), self.config.importance_limit)
        segments = np.full(len(ids), COT, dtype=np.int8)
        segments[: len(prompt)] = PROMPT
        sample = Sample(input_ids=ids, segment_ids=segments, ending_start=len(ids), source=f"rollout of {index}")
        return Example(sample=sample, ce_weight=np.zeros_like(weight), kd_weight=weight)

    def _charge(
        self, ledger: Ledger, sizes: Sizes, prompts: Sequence[Sequence[int]], found: Sequence[Sequence[Completion]]
    ) -> None:
        lengths = [[len(c.token_ids) for c in samples] for samples in found]
        ledger.count(rollout_tokens=sum(map(sum, lengths)))
        ledger.add_flops(
            sampling=sum(decoding_flops(sizes, len(p), new) for p, new in zip(prompts, lengths, strict=True))
        )


def _log_ratios(completion: Completion) -> np.ndarray:
    """float64 [T]: log of the student's probability of each token over the sampler's."""
    return np.array(completion.exact_log_probs) - np.array(completion.log_probs)


def make_rollouts(
    config: OnPolicyConfig,
    steps: Sequence[PlannedStep],
    prompts: Prompts,
    tokenizer: Any,
    render: RenderConfig,
    seed: int,
) -> Rollouts:
    """Rollouts for the prompts of a planned run.

    Args:
      steps: the plan; an on-policy step takes the prompts of its examples.
      prompts: those of the run's examples, in order.
      seed: the run's seed.
    """
    stops = stop_ids(tokenizer, render)
    markers = {
        i
        for marker in (render.start_marker, render.end_marker)
        for i in tokenizer.encode(marker, add_special_tokens=False)
    }
    masked = set(tokenizer.all_special_ids) - set(stops) - markers if config.mask_special_tokens else set()
    masked_ids = np.array(sorted(masked), dtype=np.int32)
    return Rollouts(config, steps, prompts, stops, masked_ids, seed)
