"""What a student writes during a run, before it runs: rollouts, the looks of a controller, completions of the traces.

Lengths are assumed: those of the given responses, or the limit where that is less.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from limbeck.distill.config import DistillConfig
from limbeck.distill.data import Data
from limbeck.distill.on_policy import OnPolicyConfig
from limbeck.distill.output import costs_of_traces
from limbeck.distill.plan import PlannedStep
from limbeck.distill.rollouts import Prompts
from limbeck.distill.stop_control import prompts_of
from limbeck.ledger import decoding_flops
from limbeck.models.anatomy import Sizes
from limbeck.traces.batch import Example
from limbeck.traces.sample import Sample

Written = tuple[int, int]
"""FLOPs, and new tokens."""


def sampling_of(config: DistillConfig, data: Data, sizes: Sizes, steps: Sequence[PlannedStep]) -> Written:
    """All that a student writes for a run."""
    completions = [(cost["flops"]["sampling"], cost["rollout_tokens"]) for cost in costs_of_traces(config)]
    parts = [*completions, _looks(config, data, sizes, steps)]
    if config.on_policy is not None and data.prompts is not None:
        parts.append(_rollouts(config.on_policy, data.prompts, sizes, steps))
    return sum(flops for flops, _ in parts), sum(tokens for _, tokens in parts)


def rollouts_of(policy: OnPolicyConfig, prompts: Prompts, number: int, steps: Sequence[PlannedStep]) -> list[Example]:
    """Rollouts of the assumed length for the prompts of an on-policy step."""
    written = _rollout_tokens(policy, prompts, policy.written_at(number, len(steps)), len(steps))
    examples = []
    for index in steps[number].indices:
        prompt = prompts.ids[index]
        weight = np.concatenate([np.zeros(len(prompt)), np.ones(written)]).astype(np.float32)
        # Behind the prompt, no two rollouts are alike.
        ids = np.array([*prompt, *[index] * written], dtype=np.int32)
        sample = Sample(input_ids=ids, segment_ids=(weight > 0).astype(np.int8), ending_start=len(ids))
        examples += [Example(sample=sample, ce_weight=np.zeros_like(weight), kd_weight=weight)] * policy.num_samples
    return examples


def _rollout_tokens(policy: OnPolicyConfig, prompts: Prompts, step: int, steps: int) -> int:
    return max(1, min(policy.new_tokens_at(step, steps), round(prompts.mean_response_tokens)))


def _rollouts(policy: OnPolicyConfig, prompts: Prompts, sizes: Sizes, steps: Sequence[PlannedStep]) -> Written:
    """The prompts of a window are answered once."""
    windows: dict[int, set[int]] = {}
    for number, step in enumerate(steps):
        if policy.is_on_policy(number, len(steps)):
            windows.setdefault(policy.written_at(number, len(steps)), set()).update(step.indices)
    flops = tokens = 0
    for number, members in windows.items():
        written = [_rollout_tokens(policy, prompts, number, len(steps))] * policy.num_samples
        flops += sum(decoding_flops(sizes, len(prompts.ids[index]), written) for index in members)
        tokens += sum(written) * len(members)
    return flops, tokens


def _looks(config: DistillConfig, data: Data, sizes: Sizes, steps: Sequence[PlannedStep]) -> Written:
    """What a controller asks of the student, answers taken to be as long as the given ones."""
    control, policy = config.stop_control, config.on_policy
    if control is None or not data.validation:
        return 0, 0
    held_out, limit = data.validation[: control.num_prompts], control.limit(data.validation)
    asked = [len(prompt) for prompt in prompts_of(held_out)]
    written = [min(limit, len(example) - prompt) for example, prompt in zip(held_out, asked, strict=True)]
    looks = sum(
        control.is_due(n) and not (policy is not None and policy.is_on_policy(n, len(steps))) for n in range(len(steps))
    )
    flops = sum(decoding_flops(sizes, prompt, [new]) for prompt, new in zip(asked, written, strict=True))
    return looks * flops, looks * sum(written)
