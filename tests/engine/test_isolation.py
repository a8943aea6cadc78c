"""A text that fails or stalls ends alone: the others have, to the bit, what they have without it."""

import threading
import time

import pytest
import torch
from kernels_here import kernels_here
from made_models import made_model
from test_engine_generation import PROMPTS, finished, ids

from limbeck.engine.decoder import Decoder
from limbeck.engine.drafter import Drafter
from limbeck.engine.generation import GenerationConfig, Generator
from limbeck.engine.isolation import Stalled, apart
from limbeck.engine.jobs import Job
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.sampling import Sampling
from limbeck.engine.speculative import SpeculativeConfig
from limbeck.engine.weights import weights_of

POISON = 95


class Anything:
    """A constraint that allows all; `act` is called for the mask of each place."""

    size_bytes, is_complete = 0, False

    def __init__(self, act=lambda place: None):
        self._act, self._place = act, 0

    def allowed(self):
        self._act(self._place)
        return torch.ones(96, dtype=torch.bool)

    def accept(self, token):
        self._place += 1


def broken(place):
    if place == 3:
        raise RuntimeError("a fault")


def good_jobs():
    return [
        Job(prompt=prompt, max_tokens=20, sampling=Sampling(temperature=2.0, seed=number), constraint=constraint)
        for number, (prompt, constraint) in enumerate(zip(PROMPTS, [None, Anything()] * 3, strict=True))
    ]


def outcome(generator, bad=()):
    """Tokens of the good jobs with others beside them, and what those others ended by."""
    numbers = [generator.add(job) for job in good_jobs()]
    others = [generator.add(job) for job in bad]
    tokens, failures = {number: [] for number in [*numbers, *others]}, {}
    while generator.running:
        for progress in generator.step(failures.__setitem__):
            tokens[progress.job] += [drawn.token for drawn in progress.tokens]
    return [tokens[number] for number in numbers], [failures.get(number) for number in others]


def int8_generator(drafted=False, **config):
    decoder = Decoder(weights_of(made_model("llama"), "int8"))
    drafter = Drafter(decoder, SpeculativeConfig(draft="self", max_running=9), 8) if drafted else None
    return Generator(decoder, PrefixCache(1 << 24, 8, "model"), GenerationConfig(prefill_tokens=20, **config), drafter)


@pytest.mark.parametrize("kernels", kernels_here())
@pytest.mark.parametrize("drafted", [False, True])
def test_a_constraint_that_fails_ends_its_own_text(kernels, drafted):
    alone, _ = outcome(int8_generator(drafted, kernels=kernels))
    bad = Job(prompt=ids(9, 1), max_tokens=20, sampling=Sampling(seed=1), constraint=Anything(broken))
    beside, (error,) = outcome(int8_generator(drafted, kernels=kernels), [bad])
    assert beside == alone and isinstance(error, RuntimeError)


@pytest.mark.parametrize("place", ["reading", "decoding"])
def test_a_pass_that_fails_for_one_text_is_made_without_it(place, monkeypatch):
    generator = int8_generator()
    guilty = Job(prompt=[POISON] * 9, max_tokens=37, sampling=Sampling(seed=1))
    owner = generator.decoder if place == "reading" else generator.steps
    real = owner.run

    def run(segments, *rest):
        if any(segment.prefix.room == (9 if place == "reading" else 9 + 37) for segment in segments):
            raise RuntimeError("a fault of a kernel")
        return real(segments, *rest)

    alone, _ = outcome(int8_generator())
    monkeypatch.setattr(owner, "run", run)
    beside, (error,) = outcome(generator, [guilty])
    assert beside == alone and str(error) == "a fault of a kernel"
    assert generator.running == 0 and all(block.users == 0 for block in generator.cache._blocks.values())


def test_without_anybody_to_tell_a_failure_is_raised():
    generator = int8_generator()
    generator.add(Job(prompt=[1], max_tokens=20, constraint=Anything(broken)))
    with pytest.raises(RuntimeError, match="a fault"):
        for _ in range(9):
            generator.step()


def test_a_text_that_stalls_ends_and_holds_nobody_up():
    alone, _ = outcome(int8_generator())
    never = threading.Event()
    bad = [
        Job(prompt=ids(9, n), max_tokens=20, constraint=Anything(lambda place: place == 2 and never.wait()))
        for n in range(3)
    ]
    generator = int8_generator(stall_seconds=0.4)
    start = time.monotonic()
    beside, errors = outcome(generator, bad)
    assert time.monotonic() - start < 5
    never.set()
    assert beside == alone and all(isinstance(error, Stalled) for error in errors)
    assert "longer than 0.4 s to constrain" in str(errors[0])


class Exclusive(Anything):
    """As llguidance's matchers: whoever looks at it while a mask is made is refused."""

    def __init__(self):
        super().__init__(lambda place: self._busy())
        self._is_busy = False

    def _busy(self):
        self._is_busy = True
        time.sleep(0.02)
        self._is_busy = False

    @property
    def is_complete(self):
        assert not self._is_busy
        return False


def test_while_a_mask_is_made_nobody_else_looks_at_its_constraint():
    generator, failures = int8_generator(), {}
    generator.add(Job(prompt=[1], max_tokens=6, constraint=Exclusive()))
    while generator.running:
        generator.step(failures.__setitem__)
    assert not failures


def test_a_late_mask_costs_its_text_turns_alone():
    slow = Job(prompt=[1], max_tokens=4, constraint=Anything(lambda place: time.sleep(0.2)))
    generator = int8_generator()
    late, quick = generator.add(slow), generator.add(Job(prompt=[2], max_tokens=30))
    order = []
    while generator.running:
        order += [progress.job for progress in generator.step() for _ in progress.tokens]
    assert order.count(late) == 4 and order.count(quick) == 30
    assert order[:20].count(quick) > 15


def test_texts_of_a_draft_that_fails_go_on_without_it(monkeypatch):
    generator = int8_generator(drafted=True)
    monkeypatch.setattr(generator.drafter, "propose", lambda runs: 1 / 0)
    jobs = [Job(prompt=prompt, max_tokens=20, sampling=Sampling(temperature=0)) for prompt in PROMPTS]
    expected = [[drawn.token for drawn in tokens] for tokens, *_ in finished(int8_generator(), jobs)]
    numbers = [generator.add(job) for job in jobs]
    found, failures = {number: [] for number in numbers}, {}
    while generator.running:
        for progress in generator.step(failures.__setitem__):
            found[progress.job] += [drawn.token for drawn in progress.tokens]
    assert list(found.values()) == expected and not failures


@pytest.mark.parametrize("guilty", [set(), {0}, {3, 4}, {0, 1, 2, 3, 4, 5, 6}])
def test_calls_are_halved_down_to_the_guilty(guilty):
    calls, told = [], {}

    def call(keys):
        calls.append(list(keys))
        if guilty & set(keys):
            raise ValueError(sorted(guilty & set(keys)))
        return {key: key**2 for key in keys}

    found = apart(list(range(7)), call, told.__setitem__)
    assert found == {key: key**2 for key in range(7) if key not in guilty} and told.keys() == guilty
    assert len(calls) <= 1 + 2 * 3 * max(1, len(guilty))
    if guilty:
        with pytest.raises(ValueError):
            apart(list(range(7)), call, None)
