"""Bytes that several keepers share: the oldest of all goes first, and nothing that is in use."""

import random

import pytest

from limbeck.engine.budget import Budget
from limbeck.errors import ConfigError


class Shelf:
    """Keeps things by when they were used last."""

    def __init__(self, budget):
        self._budget, self.things = budget, []
        budget.join(self)

    def put(self, size):
        if self._budget.take(size):
            self.things.append((self._budget.now(), size))

    def oldest(self):
        return self.things[0][0] if self.things else None

    def release_oldest(self):
        self._budget.give_back(self.things.pop(0)[1])


@pytest.mark.parametrize("seed", range(3))
def test_the_oldest_of_all_goes_first(seed):
    chance, budget = random.Random(seed), Budget(100)
    shelves, expected = [Shelf(budget), Shelf(budget), Shelf(budget)], []
    for _ in range(400):
        size = chance.randrange(1, 120)
        shelf = chance.choice(shelves)
        shelf.put(size)
        if size <= 100:
            while sum(expected) + size > 100:
                expected.pop(0)
            expected.append(size)
        kept = sorted(thing for one in shelves for thing in one.things)
        assert [size for _, size in kept] == expected
        assert budget.used_bytes == sum(expected) <= 100


def test_what_is_in_use_is_not_released():
    budget = Budget(10, "limits.memory_bytes")
    shelf = Shelf(budget)
    assert budget.take(6)
    shelf.put(4)
    assert budget.take(4) and shelf.things == []
    assert not budget.take(1)
    budget.give_back(10)
    assert budget.used_bytes == 0 and budget.take(10)
    with pytest.raises(ConfigError, match=r"a text takes 11 bytes; limits.memory_bytes is 10"):
        budget.check(11, "a text takes")
