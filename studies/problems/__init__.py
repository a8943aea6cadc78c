"""Problems with saddles: one family a file, each a frozen config with a pure loss and known facts."""

from __future__ import annotations

from collections.abc import Callable

from limbeck.errors import ConfigError, nearest
from studies.problems.degenerate import DeepLinear, MonkeySaddle
from studies.problems.dictionary import DictionaryLearning
from studies.problems.matrix import (
    AsymmetricFactorisation,
    MatrixCompletion,
    MatrixFactorisation,
    MatrixSensing,
)
from studies.problems.nets import SmallNet
from studies.problems.octopus import Octopus
from studies.problems.pca import OnlinePCA
from studies.problems.phase_retrieval import PhaseRetrieval, SampledPhaseRetrieval
from studies.problems.problem import Facts, Problem, TiltedProblem
from studies.problems.saddles import QuadraticSaddle, QuarticSaddle, ValleySaddle
from studies.problems.tensor import TensorDecomposition

__all__ = [
    "PROBLEMS",
    "AsymmetricFactorisation",
    "DeepLinear",
    "DictionaryLearning",
    "Facts",
    "MatrixCompletion",
    "MatrixFactorisation",
    "MatrixSensing",
    "MonkeySaddle",
    "Octopus",
    "OnlinePCA",
    "PhaseRetrieval",
    "Problem",
    "QuadraticSaddle",
    "QuarticSaddle",
    "SampledPhaseRetrieval",
    "SmallNet",
    "TensorDecomposition",
    "TiltedProblem",
    "ValleySaddle",
    "make",
]

PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "quadratic_saddle": lambda size: QuadraticSaddle(num_dims=size),
    "quartic_saddle": lambda size: QuarticSaddle(num_dims=size),
    "rotated_saddle": lambda size: QuarticSaddle(num_dims=size, rotation_seed=0),
    "valley_saddle": lambda size: ValleySaddle(num_dims=size),
    "octopus": lambda size: Octopus(num_dims=size),
    "phase_retrieval": lambda size: PhaseRetrieval(num_dims=size),
    "sampled_phase_retrieval": lambda size: SampledPhaseRetrieval(num_dims=size, num_samples=20 * size),
    "matrix_factorisation": lambda size: MatrixFactorisation(num_rows=size),
    "asymmetric_factorisation": lambda size: AsymmetricFactorisation(num_rows=size, num_columns=size),
    "matrix_sensing": lambda size: MatrixSensing(num_rows=size, num_samples=20 * size),
    "matrix_completion": lambda size: MatrixCompletion(num_rows=size),
    "tensor_decomposition": lambda size: TensorDecomposition(num_dims=size),
    "online_pca": lambda size: OnlinePCA(num_dims=size),
    "free_pca": lambda size: OnlinePCA(num_dims=size, on_sphere=False),
    "dictionary_learning": lambda size: DictionaryLearning(num_dims=size),
    "linear_net": lambda size: SmallNet(kind="linear", num_inputs=size),
    "tanh_net": lambda size: SmallNet(kind="tanh", num_inputs=size),
    "autoencoder": lambda size: SmallNet(kind="autoencoder", num_inputs=size),
    "softmax_bottleneck": lambda size: SmallNet(kind="bottleneck", num_inputs=size),
    "monkey_saddle": lambda size: MonkeySaddle(),
    "deep_linear": lambda size: DeepLinear(width=size),
}
"""Problem name to its maker, which takes the problem's own size (coordinates, rows, inputs or width)."""


def make(name: str, size: int) -> Problem:
    """The problem called `name` at `size`, with defaults for the rest.

    Raises: ConfigError for an unknown name.
    """
    if name not in PROBLEMS:
        raise ConfigError(f"problem: found {name!r}; {nearest(name, PROBLEMS)}")
    return PROBLEMS[name](size)
