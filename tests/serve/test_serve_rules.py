"""Thought budgets, constraints behind them, and drawing from logits."""

import pytest
import torch

from limbeck.engine.drawing import distribution_of, draw_tokens, drawn_of
from limbeck.engine.jobs import Job, ThoughtBudget
from limbeck.engine.rules import Rules, Thought
from limbeck.engine.sampling import Sampling

OPEN, CLOSE = (7, 8), (5, 5, 6)


class OnlyNines:
    """Two nines, then the end."""

    def __init__(self):
        self.accepted = []

    def allowed(self):
        return torch.arange(12) == 9

    def accept(self, token):
        assert token == 9
        self.accepted.append(token)

    @property
    def is_complete(self):
        return len(self.accepted) == 2


def written(thought, tokens):
    """What stands there in the end, and where markers were forced."""
    text, forced = [], []
    source = iter(tokens)
    while (token := thought.forced if thought.forced is not None else next(source, None)) is not None:
        forced.append(thought.forced is not None)
        text.append(token)
        thought.accept(token)
    return text, forced


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3], [1, 2, 3, 5, 5, 6]),
        ([1, 2, 5], [1, 2, 5, 5, 6]),  # a marker that was begun is finished
        ([1, 5, 5], [1, 5, 5, 6]),
        ([5, 5, 5], [5, 5, 5, 6]),
        ([5, 5, 6, 1, 2, 3, 4], [5, 5, 6, 1, 2, 3, 4]),  # closed by itself; nothing is forced afterwards
    ],
)
def test_a_thought_ends_within_its_budget(tokens, expected):
    assert written(Thought(ThoughtBudget(3, (), CLOSE), False), tokens)[0] == expected


def test_a_thought_counts_from_its_opening():
    text, forced = written(Thought(ThoughtBudget(2, OPEN, CLOSE), False), [1, 7, 1, 7, 8, 2, 3, 4])
    assert text == [1, 7, 1, 7, 8, 2, 3, 5, 5, 6, 4]
    assert forced == [False] * 7 + [True] * 3 + [False]


def next_ones(rules):
    logits = torch.zeros(12)
    rules.restrict_(logits)
    return torch.nonzero(~logits.isneginf())[:, 0].tolist()


def test_a_constraint_starts_behind_the_thought():
    constraint = OnlyNines()
    job = Job(
        prompt=[1],
        max_tokens=99,
        end_tokens=frozenset([0]),
        constraint=constraint,
        thought=ThoughtBudget(2, OPEN, CLOSE),
    )
    rules = Rules(job, 2.0)
    assert next_ones(rules) == [7, 9]  # the thought, or the text at once
    assert not rules.accept(7)
    assert rules.forced == 8
    rules.accept(8)
    assert next_ones(rules) == list(range(1, 12))  # anything but the end
    for token in (3, 3):
        rules.accept(token)
    for token in CLOSE:
        assert rules.forced == token
        rules.accept(token)
    assert next_ones(rules) == [9] and constraint.accepted == []
    assert not rules.accept(9) and rules.accept(9)


def test_a_constrained_text_may_do_without_its_thought():
    rules = Rules(Job(prompt=[1], max_tokens=9, constraint=OnlyNines(), thought=ThoughtBudget(2, OPEN, CLOSE)), 2.0)
    rules.accept(9)
    assert next_ones(rules) == [9] and rules.forced is None


SAMPLINGS = [
    Sampling(temperature=0.7),
    Sampling(top_k=3),
    Sampling(top_p=0.6),
    Sampling(top_k=5, top_p=0.7, temperature=2.0),
    Sampling(min_p=0.3),
    Sampling(top_k=1),
]


def by_formula(logits, sampling):
    """transformers' order of filters, one token at a time."""
    probabilities = (logits / sampling.temperature).softmax(0)
    order = probabilities.argsort(descending=True).tolist()
    kept = order[: sampling.top_k] if sampling.top_k else order
    mass, whole, nucleus = 0.0, float(probabilities[kept].sum()), []
    for token in kept:
        if mass < sampling.top_p * whole:
            nucleus.append(token)
        mass += float(probabilities[token])
    nucleus = [token for token in nucleus if probabilities[token] >= sampling.min_p * probabilities.max()]
    out = torch.zeros_like(probabilities)
    out[nucleus] = probabilities[nucleus]
    return out / out.sum()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("vocabulary", [10, 2000])
def test_draws_follow_the_filtered_distribution(sampling, vocabulary):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(vocabulary, generator=generator) * (3 if vocabulary > 10 else 1)
    logits[2] = -torch.inf
    expected = by_formula(logits, sampling)
    torch.testing.assert_close(distribution_of(logits, sampling), expected, rtol=1e-5, atol=1e-7)
    uniforms = ((torch.arange(4000) + 0.5) / 4000).tolist()  # every quantile once
    drawn = [draw_tokens(logits[None], [sampling], [u])[0] for u in uniforms[:: 1 if vocabulary == 10 else 4]]
    counts = torch.tensor(drawn).bincount(minlength=vocabulary).double()
    assert not counts[expected == 0].any()
    torch.testing.assert_close(counts / len(drawn), expected.double(), rtol=0, atol=2 / len(drawn))


def test_rows_do_not_depend_on_each_other():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(12, 3000, generator=generator)
    samplings = [*SAMPLINGS, Sampling(temperature=0), Sampling()] * 2
    samplings = samplings[:12]
    uniforms = torch.rand(12, generator=generator).tolist()
    together = draw_tokens(logits, samplings, uniforms)
    apart = [draw_tokens(logits[n : n + 1], [samplings[n]], [uniforms[n]])[0] for n in range(12)]
    assert together == apart
    assert together[6] == int(logits[6].argmax())


def test_log_probs_and_alternatives():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    first, second = drawn_of([0, 0], logits, 2)
    expected = logits.log_softmax(1)
    assert first.log_prob == pytest.approx(float(expected[0, 0])) and [token for token, _ in first.top] == [1, 2]
    assert second.top[0] == (0, pytest.approx(float(expected[1, 0])))
    assert drawn_of([1], logits[:1], 0)[0].top == [] and len(drawn_of([1], logits[:1], 9)[0].top) == 3


@pytest.mark.parametrize("temperature", [1e-40, 1e-38, 1e-9])
@pytest.mark.parametrize("extra", [{}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_temperature_that_goes_to_zero_takes_the_most_likely(temperature, extra):
    logits = torch.tensor([[3.0, 90.0, -torch.inf, 89.0]])
    assert draw_tokens(logits, [Sampling(temperature=temperature, **extra)], [0.999]) == [1]
