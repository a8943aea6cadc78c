"""Generation against transformers, and against itself: alone, in company, cold, warm, aborted, within its memory."""

import random

import pytest
import torch
from kernels_here import kernels_here
from made_models import made_model

from limbeck.engine.budget import Budget
from limbeck.engine.decoder import Decoder
from limbeck.engine.generation import GenerationConfig, Generator
from limbeck.engine.jobs import Job, ThoughtBudget
from limbeck.engine.plan import Costs
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.requests import Request
from limbeck.engine.sampling import Sampling
from limbeck.engine.scoring import Scorer, ScoringConfig
from limbeck.engine.weights import weights_of
from limbeck.errors import ConfigError, ModelError

FAMILIES = ["llama", "llama-tied", "llama-biased", "qwen2", "qwen3", "mistral", "gemma", "gemma3"]
GREEDY = Sampling(temperature=0)


def ids(count, seed):
    generator = random.Random(seed)
    return [generator.randrange(96) for _ in range(count)]


PROMPTS = [ids(length, length) for length in (5, 17, 30, 8, 16, 1)]


def generator_of(decoder, cache_bytes=1 << 24, budget=None, **config):
    config = {"prefill_tokens": 20} | config
    return Generator(decoder, PrefixCache(budget or cache_bytes, 8, "model"), GenerationConfig(**config), budget=budget)


class Driven:
    """A generator and everything that came of its jobs."""

    def __init__(self, generator):
        self.generator, self.tokens, self.prompts, self.last = generator, {}, {}, {}

    def add(self, job):
        number = self.generator.add(job)
        self.tokens[number], self.prompts[number] = [], []
        return number

    def step(self):
        for progress in self.generator.step():
            self.tokens[progress.job] += progress.tokens
            self.prompts[progress.job] += progress.prompt
            self.last[progress.job] = progress

    def finish(self):
        while self.generator.running:
            self.step()


def finished(generator, jobs):
    """Tokens, last progress and the prompt's log-probs of jobs that start together."""
    driven = Driven(generator)
    numbers = [driven.add(job) for job in jobs]
    driven.finish()
    return [(driven.tokens[number], driven.last[number], driven.prompts[number]) for number in numbers]


def texts(generator, jobs):
    return [[drawn.token for drawn in tokens] for tokens, _, _ in finished(generator, jobs)]


def by_transformers(model, prompt, count):
    prompts = torch.tensor([prompt])
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kernels", kernels_here())
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_equal_those_of_transformers(family, kernels):
    model = made_model(family)
    jobs = [Job(prompt=prompt, max_tokens=24, sampling=GREEDY) for prompt in PROMPTS]
    ours = texts(generator_of(Decoder(weights_of(model)), kernels=kernels), jobs)
    assert ours == [by_transformers(model, prompt, 24) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_log_probs_equal_those_of_transformers(family):
    model = made_model(family)
    decoder = Decoder(weights_of(model))
    job = Job(prompt=PROMPTS[2], max_tokens=9, top_log_probs=3, prompt_log_probs=2, sampling=Sampling(seed=1))
    plain = Job(prompt=PROMPTS[1], max_tokens=5, sampling=GREEDY)
    ((tokens, _, prompt), _) = finished(generator_of(decoder), [job, plain])
    whole = [*prompt, *tokens]
    assert [drawn.token for drawn in whole[: len(job.prompt)]] == list(job.prompt)
    assert whole[0].log_prob is None and len(whole) == len(job.prompt) + 9
    with torch.inference_mode():
        expected = model(torch.tensor([[drawn.token for drawn in whole]])).logits[0].log_softmax(-1)
    for place, drawn in enumerate(whole[1:]):
        assert drawn.log_prob == pytest.approx(float(expected[place, drawn.token]), abs=1e-5)
        best = expected[place].topk(2 if place + 1 < len(job.prompt) else 3)
        assert [log_prob for _, log_prob in drawn.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_prompt_alone_is_scored():
    (found,) = finished(
        generator_of(Decoder(weights_of(made_model("llama")))),
        [Job(prompt=[3, 4, 5], max_tokens=0, prompt_log_probs=0)],
    )
    tokens, last, prompt = found
    assert tokens == [] and last.finish == "length" and [drawn.token for drawn in prompt] == [3, 4, 5]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernels", kernels_here())
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_a_seeded_int8_text_is_the_same_to_the_bit(family, kernels, one_thread):
    """Alone and cold; in company that comes and goes; with its prompt in the cache, wholly or in part."""
    decoder = Decoder(weights_of(made_model(family), "int8"))
    samplings = [Sampling(seed=4), Sampling(seed=4, top_p=0.9), GREEDY, Sampling(seed=5, top_k=7, min_p=0.02)]
    jobs = [
        Job(prompt=prompt, max_tokens=12, sampling=sampling, top_log_probs=1)
        for prompt, sampling in zip(PROMPTS, samplings, strict=False)
    ]
    alone = [finished(generator_of(decoder, kernels=kernels), [job])[0][0] for job in jobs]
    others = [Job(prompt=ids(n, 70 + n), max_tokens=n, sampling=Sampling(seed=n)) for n in (3, 9, 21)]
    generator = generator_of(decoder, kernels=kernels)
    for _ in ("cold", "warm"):
        assert [tokens for tokens, _, _ in finished(generator, [*others, *jobs])][len(others) :] == alone
    driven = Driven(generator_of(decoder, prefill_tokens=1, kernels=kernels))
    numbers = [driven.add(job) for job in reversed(jobs)]
    for job in others:
        driven.step()
        driven.add(job)
    driven.generator.abort(numbers[0])
    driven.finish()
    assert [driven.tokens[number] for number in numbers[1:]] == alone[::-1][1:]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_float32_texts_are_those_of_the_job_alone(family):
    decoder = Decoder(weights_of(made_model(family)))
    jobs = [Job(prompt=p, max_tokens=12, sampling=Sampling(seed=n, top_p=0.95)) for n, p in enumerate(PROMPTS)]
    alone = [texts(generator_of(decoder), [job])[0] for job in jobs]
    generator = generator_of(decoder)
    assert texts(generator, jobs) == alone
    assert texts(generator, jobs[::-1]) == alone[::-1]
    assert alone != texts(generator, [Job(prompt=p, max_tokens=12) for p in PROMPTS])


def test_prompts_are_found_again_and_shared():
    """By a later job; by jobs that start together; from scoring, and by it."""
    decoder = Decoder(weights_of(made_model("llama")))
    scorer = Scorer(decoder, ScoringConfig(block_tokens=8), costs=Costs((1, 64, 256), (1e-3, 2e-3, 6e-3), 1e-9))
    generator = Generator(decoder, scorer.cache, GenerationConfig(prefill_tokens=64))
    job = Job(prompt=PROMPTS[2], max_tokens=3, sampling=GREEDY)
    first, second, third = finished(generator, [job, job, job])
    assert [run[1].cached_tokens for run in (first, second, third)] == [0, 30, 30]
    assert first[0] == second[0] == third[0]
    scorer.score([Request(PROMPTS[2], [[1, 2]], [3])])
    assert scorer.usage.cached_tokens == 24
    (fourth,) = finished(generator, [job])
    assert fourth[1].cached_tokens == 30 and fourth[0] == first[0]  # scoring keeps the short last block as well


def test_the_next_turn_finds_the_text():
    decoder = Decoder(weights_of(made_model("llama")))
    generator = generator_of(decoder, keeps_text=True)
    (text,) = texts(generator, [Job(prompt=PROMPTS[2], max_tokens=20, sampling=GREEDY)])
    again = Job(prompt=[*PROMPTS[2], *text, 7, 8], max_tokens=4, sampling=GREEDY)
    ((tokens, last, _),) = finished(generator, [again])
    assert last.cached_tokens == 48
    assert tokens == finished(generator_of(decoder), [again])[0][0]


def test_what_is_over_or_aborted_leaves_nothing():
    decoder = Decoder(weights_of(made_model("llama")))
    generator = generator_of(decoder)
    numbers = [generator.add(Job(prompt=prompt, max_tokens=20)) for prompt in PROMPTS]
    held = sum(len(prompt) + 20 for prompt in PROMPTS) * decoder.bytes_per_token
    assert generator.taken_bytes == held
    for _ in range(4):
        generator.step()
    for number in [*numbers, *numbers]:
        generator.abort(number)
    assert (generator.running, generator.taken_bytes, generator.step()) == (0, 0, [])
    assert all(block.users == 0 for block in generator.cache._blocks.values())


def test_memory_stays_within_its_budget():
    """Running jobs and the cache share it; blocks in use are not thrown out."""
    decoder = Decoder(weights_of(made_model("llama")))
    budget = Budget(110 * decoder.bytes_per_token, "limits.memory_bytes")
    generator = generator_of(decoder, budget=budget, max_running=4)
    random_one = random.Random(2)
    waiting = [Job(prompt=ids(random_one.randrange(1, 40), n), max_tokens=n % 30) for n in range(60)]
    total = len(waiting)
    done = 0
    while waiting or generator.running:
        while waiting and generator.begin(waiting[-1]) is not None:
            waiting.pop()
        done += sum(progress.finish is not None for progress in generator.step())
        used = generator.taken_bytes + generator.cache.stats().used_bytes
        assert used == budget.used_bytes <= budget.total_bytes and generator.running <= 4
    assert done == total and generator.cache.stats().evicted_blocks > 0
    generator.add(Job(prompt=[1] * 40, max_tokens=68))
    with pytest.raises(ConfigError, match="Finish some before"):
        generator.add(Job(prompt=[1] * 20, max_tokens=2))
    with pytest.raises(ConfigError, match=r"a text of 120 tokens takes \d+ bytes; limits.memory_bytes is"):
        generator.add(Job(prompt=[1] * 60, max_tokens=60))


def test_reading_does_not_stop_writing():
    """While a long prompt is read bit by bit, the others get a token every step."""
    generator = generator_of(Decoder(weights_of(made_model("llama"))), prefill_tokens=8)
    first = generator.add(Job(prompt=[1], max_tokens=50))
    generator.step()
    second = generator.add(Job(prompt=ids(80, 1), max_tokens=2))
    for _ in range(9):
        assert [progress.job for progress in generator.step()] == [first]
    assert [progress.job for progress in generator.step()] == [first, second]


def test_ends_and_shortest_texts():
    decoder = Decoder(weights_of(made_model("llama")))
    (free,) = texts(generator_of(decoder), [Job(prompt=PROMPTS[0], max_tokens=20, sampling=GREEDY)])
    end = free[3]
    job = Job(prompt=PROMPTS[0], max_tokens=20, sampling=GREEDY, end_tokens=frozenset([end]))
    ((tokens, last, _),) = finished(generator_of(decoder), [job])
    assert [drawn.token for drawn in tokens] == free[: free.index(end) + 1] and last.finish == "stop"
    longer = Job(
        prompt=PROMPTS[0], max_tokens=20, min_tokens=9, sampling=Sampling(seed=1), end_tokens=frozenset(range(90))
    )
    (text,) = texts(generator_of(decoder), [longer])
    assert all(token >= 90 for token in text[:9]) and len(text) >= 10


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thought_has_its_budget(budget):
    """The closing marker of two tokens stands behind exactly so many tokens, and the text goes on."""
    decoder = Decoder(weights_of(made_model("llama")))
    job = Job(prompt=PROMPTS[0], max_tokens=20, sampling=GREEDY, thought=ThoughtBudget(budget, (), (94, 95)))
    (free,) = texts(generator_of(decoder), [Job(prompt=PROMPTS[0], max_tokens=20, sampling=GREEDY)])
    (text,) = texts(generator_of(decoder), [job])
    assert text[: budget + 2] == [*free[:budget], 94, 95] and len(text) == 20
    (rest,) = texts(
        generator_of(decoder), [Job(prompt=[*PROMPTS[0], *text[: budget + 2]], max_tokens=18 - budget, sampling=GREEDY)]
    )
    assert text[budget + 2 :] == rest


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": []}, ModelError, "empty prompt"),
        ({"prompt": [96]}, ModelError, "token ids 96 to 96; the model has 0 to 95"),
        ({"max_tokens": 128}, ModelError, "a prompt of 2 and 128 more tokens; the limit is 128"),
        ({"min_tokens": 5}, ConfigError, "min_tokens 5, max_tokens 4"),
        ({"end_tokens": frozenset([99])}, ModelError, "end tokens or markers"),
        ({"thought": ThoughtBudget(3, (), ())}, ConfigError, "closing marker"),
        ({"top_log_probs": -1}, ConfigError, "top_log_probs"),
        ({"sampling": Sampling(temperature=-1)}, ConfigError, "temperature must be 0 or more; found -1"),
        ({"sampling": Sampling(top_p=0)}, ConfigError, "0 < top_p <= 1"),
        ({"sampling": Sampling(seed=-3)}, ConfigError, "seed must be 0 or more"),
    ],
)
def test_what_cannot_run_says_why(changes, error, message):
    generator = generator_of(Decoder(weights_of(made_model("llama"))))
    with pytest.raises(error, match=message):
        generator.add(Job(**{"prompt": [1, 2], "max_tokens": 4, **changes}))
    assert generator.running == 0
