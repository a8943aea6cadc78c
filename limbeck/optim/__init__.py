"""Optimizers of the Langevin family, noise for any optimizer, and growing batches."""

from limbeck.optim.growing_batch import AccumulationSchedule, BatchGrowth, EqualLR, GrowingBatchSampler
from limbeck.optim.langevin import AGLD, ASG, ASGLD
from limbeck.optim.perturb import Perturb
from limbeck.optim.perturbed import NoisySGD, PerturbedGD, PerturbedSGD
from limbeck.optim.psgld import PSGLD
from limbeck.optim.ranks import RankSquares
from limbeck.optim.sgld import SGLD

__all__ = [
    "AGLD",
    "ASG",
    "ASGLD",
    "PSGLD",
    "SGLD",
    "AccumulationSchedule",
    "BatchGrowth",
    "EqualLR",
    "GrowingBatchSampler",
    "NoisySGD",
    "Perturb",
    "PerturbedGD",
    "PerturbedSGD",
    "RankSquares",
]
