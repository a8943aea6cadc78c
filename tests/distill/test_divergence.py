"""Laws of the divergences, on distributions found by search."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.distill.divergence import (
    DIVERGENCES,
    DivergenceConfig,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    tvd,
)

FEW = settings(max_examples=60, deadline=None)
logit = st.floats(-30.0, 30.0, width=32)
share = st.floats(0.0, 0.99)


@st.composite
def pairs(draw, bound=None):
    """Log-probabilities of a student and a teacher over 2 to 9 entries, float64 [1 V] each."""
    entries = draw(st.integers(2, 9))
    value = logit if bound is None else st.floats(-bound, bound, width=32)
    rows = draw(st.tuples(*[st.lists(value, min_size=entries, max_size=entries)] * 2))
    return tuple(torch.tensor([row], dtype=torch.float64).log_softmax(-1) for row in rows)


OWN = {
    "jsd": {"beta": st.floats(0.0, 1.0)},
    "skew_kl": {"skew_alpha": share},
    "skew_reverse_kl": {"skew_alpha": share},
    "combined_kl": {"forward_ratio": st.floats(0.0, 1.0)},
}
configs = st.one_of(
    st.builds(DivergenceConfig, name=st.just(name), **OWN.get(name, {})) for name in sorted(DIVERGENCES)
)


@FEW
@given(pairs(), configs)
def test_never_negative(pair, config):
    value, _ = config.bind()(*pair)
    assert value >= -1e-12


@FEW
@given(pairs(), configs, st.randoms())
def test_order_of_the_vocabulary_does_not_matter(pair, config, random):
    student, teacher = pair
    order = list(range(student.shape[1]))
    random.shuffle(order)
    value, gradient = config.bind()(student, teacher)
    moved, moved_gradient = config.bind()(student[:, order], teacher[:, order])
    torch.testing.assert_close(moved, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved_gradient, gradient[:, order], rtol=1e-9, atol=1e-12)


@FEW
@given(pairs(), configs)
def test_merging_entries_never_increases_it(pair, config):
    """The reason why a top-k teacher's D is a lower bound of the dense one."""
    value, _ = config.bind()(*pair)
    merged, _ = config.bind()(*(torch.cat([x[:, :1], x[:, 1:].logsumexp(-1, keepdim=True)], 1) for x in pair))
    assert merged <= value + 1e-9


@FEW
@given(pairs())
def test_jsd_at_one_half_is_symmetric_and_at_most_log_2(pair):
    student, teacher = pair
    value, _ = jsd(student, teacher, beta=0.5)
    mirrored, _ = jsd(teacher, student, beta=0.5)
    torch.testing.assert_close(value, mirrored, rtol=1e-9, atol=1e-12)
    assert value <= math.log(2) + 1e-12


@FEW
@given(pairs(), st.floats(0.0, 1.0))
def test_jsd_mirrors_at_one_minus_beta(pair, beta):
    student, teacher = pair
    torch.testing.assert_close(
        jsd(student, teacher, beta=beta)[0], jsd(teacher, student, beta=1.0 - beta)[0], rtol=1e-6, atol=1e-9
    )


@FEW
@given(pairs(), st.floats(0.01, 0.99))
def test_jsd_is_a_mix_of_the_two_skew_divergences(pair, beta):
    value, gradient = jsd(*pair, beta=beta)
    forward, forward_gradient = skew_kl(*pair, alpha=beta)
    reverse, reverse_gradient = skew_reverse_kl(*pair, alpha=1.0 - beta)
    torch.testing.assert_close(value, (1 - beta) * forward + beta * reverse, rtol=1e-9, atol=1e-12)
    mixed = (1 - beta) * forward_gradient + beta * reverse_gradient
    torch.testing.assert_close(gradient, mixed, rtol=1e-9, atol=1e-12)


@FEW
@given(pairs(bound=2.0))
def test_jsd_and_the_skew_divergences_reach_the_kls_without_a_jump(pair):
    for end, limit, near in (
        (jsd(*pair, beta=0.0), forward_kl(*pair), jsd(*pair, beta=1e-6)),
        (jsd(*pair, beta=1.0), reverse_kl(*pair), jsd(*pair, beta=1.0 - 1e-6)),
        (skew_kl(*pair, alpha=0.0), forward_kl(*pair), skew_kl(*pair, alpha=1e-6)),
        (skew_reverse_kl(*pair, alpha=0.0), reverse_kl(*pair), skew_reverse_kl(*pair, alpha=1e-6)),
    ):
        for at_end, at_limit, nearby in zip(end, limit, near, strict=True):
            torch.testing.assert_close(at_end, at_limit, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(nearby, at_limit, rtol=0, atol=1e-3)


@FEW
@given(pairs())
def test_tvd_is_at_most_1_and_bounded_by_pinsker(pair):
    value, _ = tvd(*pair)
    assert value <= 1.0 + 1e-12
    assert value <= math.sqrt(forward_kl(*pair)[0] / 2 + 1e-12) + 1e-9
