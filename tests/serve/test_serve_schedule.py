"""k-LPM: its two ends are FCFS and LPM, and in between nobody starves."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from limbeck.engine.jobs import Job
from limbeck.serve.line import Line, Part
from limbeck.serve.schedule import order
from limbeck.serve.ticket import Ticket

KEYS = [bytes([n]) for n in range(8)]
CHAINS = st.lists(st.integers(0, 7).map(lambda n: KEYS[: n + 1]) | st.just([]), max_size=12)


def nothing(_: bytes) -> bool:
    return False


@given(CHAINS, st.integers(0, 5))
def test_k_of_one_is_first_come_first_served(waiting, picked):
    assert list(order(waiting, nothing, 1, picked)) == list(range(len(waiting)))


def test_lpm_takes_the_longest_cached_prefix_and_the_older_of_equals():
    waiting = [KEYS[:1], KEYS[:3], KEYS[:2], KEYS[:3]]
    held = set(KEYS[:3])
    assert list(order(waiting, held.__contains__, None)) == [1, 3, 2, 0]


def test_a_prefix_counts_as_cached_once_it_is_picked():
    other = [b"x", b"y"]
    waiting = [KEYS[:4], other, KEYS[:4]]
    assert list(order(waiting, nothing, 2)) == [0, 2, 1]


def test_only_an_unbroken_beginning_counts():
    assert list(order([[b"a", b"b", b"c"], [b"b"]], {b"b", b"c"}.__contains__, None)) == [1, 0]


@given(CHAINS, st.integers(1, 4), st.sets(st.sampled_from(KEYS)))
def test_every_order_is_complete_and_bounded(waiting, k, held):
    found = list(order(waiting, held.__contains__, k))
    assert sorted(found) == list(range(len(waiting)))
    for place, index in enumerate(found):
        assert place <= k * index, "the n-th oldest is served within k n picks"


@given(st.integers(1, 4), st.integers(1, 5))
def test_turns_go_on_from_call_to_call(k, room):
    """A request nobody shares a prefix with is served although hits keep arriving."""
    line = Line({KEYS[0]}.__contains__, k)
    lonely = Part(ticket(), 0, [b"alone"])
    line.parts = [Part(ticket(), 0, KEYS[:1]), lonely]
    for calls in itertools.count(1):
        line.parts += [Part(ticket(), 0, KEYS[:1]) for _ in range(room)]
        left = iter(range(room))
        taken = line.take(lambda _, left=left: next(left, None) is not None)
        assert len(taken) == room
        if any(part is lonely for part in taken):
            break
        assert calls * room <= 2 * k


def test_a_part_without_room_stays_and_holds_up_the_rest():
    line = Line(nothing, 1)
    parts = [Part(ticket(), 0, []) for _ in range(3)]
    line.parts = list(parts)
    assert line.take(lambda part: part is not parts[1]) == [parts[0]]
    assert line.parts == parts[1:]
    line.drop(parts[1].ticket, None)
    assert line.parts == parts[2:]


def test_parts_whose_turn_it_is_not_hold_up_nobody():
    line, greedy, taken = Line(nothing, 1), ticket(), []
    parts = [*(Part(greedy, 0, []) for _ in range(5)), Part(ticket(), 0, [])]
    line.parts = list(parts)

    def has_room(part):
        taken.append(part)
        return True

    def has_no_other(part):
        return not any(other.ticket is part.ticket for other in taken)

    assert line.take(has_room, has_no_other) == [parts[0], parts[5]]
    assert line.parts == parts[1:5]


def ticket() -> Ticket:
    made = object.__new__(Ticket)  # the queue of a real one wants an event loop
    made.parts = [Job(prompt=[1], max_tokens=1)]
    return made
