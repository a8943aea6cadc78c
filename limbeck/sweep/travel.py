"""What a run would do to the student, known before it: its steps, its FLOPs, and how far weights can travel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from limbeck.distill.config import DistillConfig, TrainingConfig
from limbeck.ledger import backbone_backward_flops, backbone_forward_flops, head_flops, head_forward_flops
from limbeck.models.anatomy import Computed, Sizes
from limbeck.models.parts import decoder_of
from limbeck.optim.build import ADAM
from limbeck.optim.schedules import learning_rate_factor


class Pair(NamedTuple):
    """What a training pass multiplies."""

    student: Sizes
    teacher: Sizes

    def training_flops(self, tokens: int, supervised: int) -> int:
        """FLOPs of one training pass over a sequence, the teacher's forward pass included.

        Args:
          tokens: of the sequence.
          supervised: those of them with a loss.
        """
        whole = Computed.whole([tokens])
        ours = backbone_forward_flops(self.student, whole) + backbone_backward_flops(self.student, whole)
        theirs = backbone_forward_flops(self.teacher, whole) + head_forward_flops(self.teacher, supervised)
        return ours + theirs + head_flops(self.student, supervised)


def steps_of(training: TrainingConfig, num_traces: int, mean_tokens: float) -> int:
    """Optimizer steps of a run over so many traces of so many tokens in the mean."""
    if training.max_steps is not None:
        return training.max_steps
    total = training.max_tokens or num_traces * mean_tokens * training.epochs
    tokens_a_step = training.batch_tokens or (training.batch_size or 1) * mean_tokens
    return max(1, math.ceil(total / tokens_a_step))


@torch.no_grad()
def travel(model: nn.Module, config: DistillConfig, steps: int) -> float | None:
    """Sum of the learning rates of a run over the root mean square of the weights of the student's linear layers.

    A step of Adam moves a weight by about its learning rate, so a weight that is always pushed in one direction moves
    by this share of its size. It has no unit, and compares rates across models and lengths of training.

    Returns: None where steps are no bound of what a weight moves: other optimizers, and adapters.
    """
    if config.optimizer.name not in ADAM or config.lora is not None:
        return None
    weights = [module.weight for module in decoder_of(model).modules() if isinstance(module, nn.Linear)]
    square = sum(float(weight.double().square().sum()) for weight in weights)
    size = math.sqrt(square / sum(weight.numel() for weight in weights))
    factors = sum(learning_rate_factor(config.schedule, step, steps) for step in range(steps))
    return config.optimizer.learning_rate * factors / size
