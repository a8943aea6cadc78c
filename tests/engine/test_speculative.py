"""The acceptance rule: what is settled on has the target's distribution, for any two distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.engine.speculative import SpeculationStats, settle

UNIFORMS = 400


@st.composite
def pairs(draw):
    """Two distributions over the same few tokens, with zeros."""
    size = draw(st.integers(2, 6))
    weights = st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any)
    draft, target = (torch.tensor(draw(weights), dtype=torch.float32) for _ in range(2))
    return draft / draft.sum(), target / target.sum()


def shares_of(proposed, draft, target):
    """How the uniform numbers are shared out among the tokens, for one proposal."""
    tokens = [settle(proposed, draft, target, (n + 0.5) / UNIFORMS) for n in range(UNIFORMS)]
    return torch.bincount(torch.tensor(tokens), minlength=len(draft)) / UNIFORMS


@settings(max_examples=25)
@given(pairs())
def test_the_result_has_the_target_s_distribution(pair):
    """Summed over all proposals, each with its probability under the draft."""
    draft, target = pair
    whole = sum(
        float(draft[token]) * shares_of(token, draft, target) for token in range(len(draft)) if float(draft[token]) > 0
    )
    torch.testing.assert_close(whole, target, rtol=0, atol=len(draft) / UNIFORMS)


@settings(max_examples=25)
@given(pairs())
def test_acceptance_is_the_overlap(pair):
    """sum_x q(x) P(stay) = sum_x min(p, q), the most that any rule can reach."""
    draft, target = pair
    accepted = sum(
        float(draft[token]) * float(shares_of(token, draft, target)[token])
        for token in range(len(draft))
        if float(draft[token]) > 0
    )
    assert accepted == pytest.approx(float(torch.minimum(draft, target).sum()), abs=len(draft) / UNIFORMS)


@given(pairs(), st.floats(0, 1, exclude_max=True))
def test_equal_distributions_refuse_nothing_and_impossible_tokens_never_come(pair, uniform):
    draft, target = pair
    for token in (n for n in range(len(draft)) if float(draft[n]) > 0):
        assert settle(token, draft, draft, uniform) == token
        assert float(target[settle(token, draft, target, uniform)]) > 0


def test_what_rounding_leaves_of_a_refusal_is_drawn_from_the_target():
    """q(x) is above p(x) by a rounding, and nowhere else below it."""
    draft = torch.tensor([0.5, 0.5])
    target = torch.tensor([0.49999997, 0.5])
    assert settle(0, draft, target, 1 - 2**-53) in (0, 1)


def test_counters():
    stats = SpeculationStats()
    assert (stats.acceptance, stats.mean_length) == (0, 1)
    stats.count(3, 2)
    stats.count(3, 0)
    assert (stats.drafts, stats.draft_tokens, stats.accepted_tokens, stats.accepted_at) == (2, 6, 2, [1, 1])
    assert (stats.acceptance, stats.mean_length) == (1 / 3, 2)
