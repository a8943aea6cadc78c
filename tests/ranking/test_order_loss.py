"""Losses on order against their sources, pair by pair in plain Python, and what all of them must do."""

import itertools
import math

import pytest
import torch

from limbeck.ranking.order_loss import ORDER_LOSSES


def ranknet(scores, grades):
    pairs = [(i, j) for i, j in itertools.permutations(range(len(grades)), 2) if grades[i] > grades[j]]
    return sum(math.log(1 + math.exp(scores[j] - scores[i])) for i, j in pairs) / max(len(pairs), 1)


def lambdaloss(scores, grades):
    def discount(rank):
        return math.log2(1 + rank)

    ideal = sum(g / discount(r) for r, g in enumerate(sorted(grades, reverse=True), start=1))
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    rank = {i: place for place, i in enumerate(order, start=1)}
    total = 0.0
    for i, j in itertools.permutations(range(len(grades)), 2):
        if grades[i] > grades[j]:
            apart = abs(rank[i] - rank[j])
            delta = abs(1 / discount(apart) - 1 / discount(apart + 1))
            total += delta * (grades[i] - grades[j]) / ideal * math.log2(1 + math.exp(scores[j] - scores[i]))
    return total


def listmle(scores, grades):
    """Xia's likelihood of the only order that grades without ties allow, without the certain last place."""
    order = sorted(range(len(grades)), key=lambda i: -grades[i])
    total = 0.0
    for place, i in enumerate(order[:-1]):
        total += math.log(sum(math.exp(scores[j]) for j in order[place:])) - scores[i]
    return total / max(len(order) - 1, 1)


SLOW = {"ranknet": ranknet, "lambdaloss": lambdaloss, "listmle": listmle}
GRADES = [[3.0, 0.0, 2.0, 1.0, 4.0], [0.0, 1.0, 2.0]]


def padded(rows, fill=7.0):
    width = max(map(len, rows))
    values = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.float64)
    present = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return values, present


@pytest.mark.parametrize("name", ORDER_LOSSES)
def test_losses_are_those_of_their_sources(name):
    generator = torch.Generator().manual_seed(4)
    scores = [torch.randn(len(row), generator=generator, dtype=torch.float64).tolist() for row in GRADES]
    grades, present = padded(GRADES)
    found = ORDER_LOSSES[name](padded(scores, fill=-3.0)[0], grades, present)
    assert found.tolist() == pytest.approx([SLOW[name](*pair) for pair in zip(scores, GRADES, strict=True)])


@pytest.mark.parametrize("name", ORDER_LOSSES)
def test_gradients_push_the_better_up_and_leave_equal_grades_alone(name):
    grades, present = padded([[2.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    scores = torch.tensor([[0.1, 0.4, 0.2, -0.3], [0.5, 0.1, 0.2, 9.0]], dtype=torch.float64, requires_grad=True)
    loss = ORDER_LOSSES[name](scores, grades, present)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert loss[1] == 0 and not gradient[1].any(), "equal grades have no order"
    assert gradient[0, 0] < 0 < gradient[0, 2] and gradient[0].sum().abs() < 1e-12
    assert torch.isfinite(gradient).all()
    assert torch.autograd.gradcheck(lambda s: ORDER_LOSSES[name](s, grades, present), (scores,))
