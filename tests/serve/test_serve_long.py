"""Scoring requests that are larger than a round: the same scores, in pieces that let others through."""

import time

import pytest
import torch
from made_models import made_model

from limbeck.engine.decoder import Decoder
from limbeck.engine.plan import Costs
from limbeck.engine.requests import Request
from limbeck.engine.scoring import Scorer, ScoringConfig
from limbeck.engine.weights import weights_of
from limbeck.serve.line import TICKET_PARTS, WINDOW, Line, Part
from limbeck.serve.long import LongRequest
from limbeck.serve.ticket import Prefill, Ticket

LABELS = [3, 4]


def scorer_of(precision="int8", cache_bytes=1 << 24):
    decoder = Decoder(weights_of(made_model("llama", max_position_embeddings=1024), precision))
    costs = Costs((64,), (1.0,), 0.0)
    return Scorer(decoder, ScoringConfig(block_tokens=16), costs=costs, budget=cache_bytes)


def tokens(count, seed=0):
    return torch.randint(90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def part_of(work):
    return Part(Ticket([work], time.monotonic() + 60, lambda *_: None), 0, [])


def worked_off(work, scorer, piece):
    long, steps = LongRequest(part_of(work), scorer, piece), 1
    while (scores := long.step()) is None:
        steps += 1
    long.release()
    return scores, steps


REQUESTS = {
    "many items": Request(tokens(40), [tokens(9, seed) for seed in range(30)], LABELS),
    "a long prefix": Request(tokens(500), [tokens(5, 1), (), tokens(7, 2)], LABELS, True),
    "only a prefix": Request(tokens(300), [()], LABELS),
    "no items": Request(tokens(300), [], LABELS),
    "no prefix": Request((), [tokens(30, seed) for seed in range(9)], LABELS, True),
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("cache_bytes", [1 << 24, 0])
def test_pieces_give_the_bits_of_the_whole(name, cache_bytes):
    request = REQUESTS[name]
    (whole,) = scorer_of().score([request])
    scorer = scorer_of(cache_bytes=cache_bytes)
    found, steps = worked_off(request, scorer, 64)
    assert torch.equal(found.logits, whole.logits)
    if request.full:
        torch.testing.assert_close(found.log_normalizers, whole.log_normalizers)
    assert steps > 1 or cache_bytes == 0
    assert all(block.users == 0 for block in scorer.cache._blocks.values())


def test_a_long_item_is_read_in_pieces():
    """As a prefix, so that the numbers are equal to rounding."""
    request = Request(tokens(20), [tokens(400, 1), tokens(5, 2)], LABELS)
    (whole,) = scorer_of("float32").score([request])
    found, steps = worked_off(request, scorer_of("float32"), 64)
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert steps >= 6


def test_a_prefix_sent_ahead_is_read_in_pieces():
    scorer = scorer_of()
    _, steps = worked_off(Prefill(tokens(320), "pin"), scorer, 64)
    assert steps >= 5
    assert scorer.cache.stats().blocks == 20


def test_one_request_of_many_parts_leaves_room_for_others():
    line = Line(lambda key: False, 1)
    greedy = Ticket([Request([1], [[2]], LABELS)] * 1000, time.monotonic() + 60, lambda *_: None)
    modest = Ticket([Request([1], [[2]], LABELS)], time.monotonic() + 60, lambda *_: None)
    line.parts = [Part(greedy, number, []) for number in range(1000)] + [Part(modest, 0, [])]
    taken = line.take(lambda part: True)
    assert modest in {part.ticket for part in taken} and len(taken) == TICKET_PARTS + 1 <= WINDOW
    assert len(line.parts) == 1000 - TICKET_PARTS
