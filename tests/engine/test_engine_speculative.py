"""Speculative decoding: the texts and the distribution of plain decoding, whatever the draft, and a clean state."""

import random
from collections import Counter

import httpx
import pytest
import torch
from limbeck_server import RunningServer
from made_models import made_model
from made_tokenizers import byte_tokenizer
from prometheus_client.parser import text_string_to_metric_families
from test_engine_generation import GREEDY, PROMPTS, finished, ids, texts

from limbeck.engine.backends import load_decoder
from limbeck.engine.decoder import Decoder, Segment
from limbeck.engine.drafter import Drafter, make_drafter
from limbeck.engine.drawing import distribution_of
from limbeck.engine.generation import GenerationConfig, Generator
from limbeck.engine.jobs import Job, ThoughtBudget
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.sampling import Sampling
from limbeck.engine.speculative import SpeculativeConfig
from limbeck.engine.weights import weights_of
from limbeck.errors import ConfigError, ModelError

MODEL = made_model("llama", num_hidden_layers=4)
TARGET = Decoder(weights_of(MODEL))
INT8 = Decoder(weights_of(MODEL, "int8"))
DRAFTS = {
    "int8 self": INT8,
    "depth cut": Decoder(TARGET.weights._replace(blocks=TARGET.weights.blocks[:2])),
    "another model": Decoder(weights_of(made_model("qwen3", seed=3))),
    "itself": TARGET,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generator_of(target, draft=None, cache_bytes=1 << 24, keeps_text=False, prefill_tokens=20, **config):
    drafter = None if draft is None else Drafter(draft, SpeculativeConfig(**{"max_running": 8} | config), 8)
    cache = PrefixCache(cache_bytes, 8, "model")
    return Generator(target, cache, GenerationConfig(prefill_tokens=prefill_tokens, keeps_text=keeps_text), drafter)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("target", [TARGET, INT8], ids=["float32", "int8"])
def test_greedy_texts_are_those_of_plain_decoding(target, draft):
    """Alone and together, with as many tokens as come, and with the draft's acceptance counted on the way."""
    jobs = [Job(prompt=p, max_tokens=n, sampling=GREEDY) for p, n in zip(PROMPTS, (24, 2, 1, 17, 40, 3), strict=True)]
    plain = texts(generator_of(target), jobs)
    for num_tokens in (1, 3, 5):
        generator = generator_of(target, DRAFTS[draft], num_tokens=num_tokens)
        assert texts(generator, jobs) == plain
        assert texts(generator, jobs[::-1]) == plain[::-1]
        assert [texts(generator, [job])[0] for job in jobs] == plain
        stats = generator.speculation
        assert stats.draft_tokens > 0 and sum(stats.accepted_at) == stats.accepted_tokens <= stats.draft_tokens
        assert len(stats.accepted_at) <= num_tokens and stats.skipped_tokens == 0
        if DRAFTS[draft] is target:
            assert stats.acceptance == 1


def test_jobs_come_and_go_while_others_are_drafted():
    generator, plain = generator_of(INT8, DRAFTS["depth cut"]), generator_of(INT8)
    generator_random = random.Random(0)
    jobs = [
        Job(prompt=ids(generator_random.randrange(1, 40), n), max_tokens=1 + n % 30, sampling=GREEDY) for n in range(24)
    ]
    expected = [texts(plain, [job])[0] for job in jobs]
    found, numbers, waiting = {}, {}, list(enumerate(jobs))
    while waiting or generator.running:
        for place, job in [waiting.pop(0) for _ in range(min(len(waiting), generator_random.randrange(3)))]:
            numbers[generator.add(job)] = place
        for progress in generator.step():
            found.setdefault(numbers[progress.job], []).extend(drawn.token for drawn in progress.tokens)
    assert [found[place] for place in range(len(jobs))] == expected


def test_a_crowd_is_written_without_the_draft_and_counted():
    jobs = [Job(prompt=prompt, max_tokens=12, sampling=GREEDY) for prompt in PROMPTS]
    generator = generator_of(INT8, DRAFTS["depth cut"], max_running=2)
    found = [generator.add(job) for job in jobs]
    written = {number: [] for number in found}
    for _ in range(8):
        for progress in generator.step():
            written[progress.job] += [drawn.token for drawn in progress.tokens]
    assert generator.speculation.drafts == 0 and generator.speculation.skipped_tokens > 0
    for number in found[2:]:
        generator.abort(number)
    while generator.running:
        for progress in generator.step():
            written[progress.job] += [drawn.token for drawn in progress.tokens]
    assert generator.speculation.drafts > 0
    assert [written[number] for number in found[:2]] == texts(generator_of(INT8), jobs[:2])


def test_a_text_too_long_for_the_draft_is_written_without_it():
    short = Decoder(weights_of(MODEL, max_tokens=20))
    generator = generator_of(TARGET, short)
    job = Job(prompt=PROMPTS[0], max_tokens=30, sampling=GREEDY)
    assert texts(generator, [job]) == texts(generator_of(TARGET), [job])
    assert generator.speculation.drafts == 0 and generator.speculation.skipped_tokens == 29


@pytest.mark.parametrize("sampling", [Sampling(seed=4), Sampling(seed=5, top_p=0.9), Sampling(seed=6, top_k=7)])
def test_a_seeded_text_is_the_same_in_any_company(sampling):
    draft = Decoder(INT8.weights._replace(blocks=INT8.weights.blocks[:2]))
    job = Job(prompt=PROMPTS[2], max_tokens=20, sampling=sampling, top_log_probs=1)
    ((alone, _, _),) = finished(generator_of(INT8, draft), [job])
    others = [Job(prompt=ids(n, 70 + n), max_tokens=n, sampling=Sampling(seed=n)) for n in (3, 9, 21)]
    generator = generator_of(INT8, draft, max_running=2, prefill_tokens=8)
    for _ in ("cold", "warm"):
        assert finished(generator, [*others, job])[-1][0] == alone


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6, top_p=0.8), Sampling(top_k=3, min_p=0.2)])
def test_sampled_texts_have_the_distribution_of_the_target(sampling):
    """Pairs of tokens over a vocabulary of 8 from 800 texts, against the target's own probabilities: chi-square."""
    model = made_model("llama", vocab_size=8)
    target = Decoder(weights_of(model))
    draft = Decoder(weights_of(made_model("llama", seed=1, vocab_size=8), "int8"))
    generator = generator_of(target, draft, max_running=64, num_tokens=2)
    count, prompt = 800, [3, 1, 4]
    found = Counter()
    for start in range(0, count, 25):
        jobs = [
            Job(prompt=prompt, max_tokens=4, sampling=Sampling(**_fields(sampling), seed=start + n)) for n in range(25)
        ]
        found.update(tuple(text[1:3]) for text in texts(generator, jobs))
    expected = _pairs(target, prompt, sampling)
    assert set(found) <= {pair for pair, share in expected.items() if share > 0}
    assert 0.05 < generator.speculation.acceptance < 0.95
    statistic, cells = 0.0, 0
    rest_found, rest_expected = 0.0, 0.0
    for pair, share in expected.items():
        if share * count >= 5:
            statistic, cells = statistic + (found[pair] - share * count) ** 2 / (share * count), cells + 1
        else:
            rest_found, rest_expected = rest_found + found[pair], rest_expected + share * count
    if rest_expected > 0:
        statistic, cells = statistic + (rest_found - rest_expected) ** 2 / rest_expected, cells + 1
    degrees = cells - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5, (statistic, degrees)  # 4 standard deviations


def _fields(sampling):
    return {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}


def _pairs(target, prompt, sampling):
    """Probability of each second and third token, by all texts of three tokens."""

    def next_of(tokens):
        return distribution_of(target.logits(target.run([Segment(tokens)]))[0], sampling).tolist()

    shares = Counter()
    for first, first_share in enumerate(next_of(prompt)):
        for second, second_share in enumerate(next_of([*prompt, first])):
            for third, third_share in enumerate(next_of([*prompt, first, second])):
                shares[second, third] += first_share * second_share * third_share
    return shares


class EvenTokens:
    """Even token ids only, five of them."""

    def __init__(self):
        self.written = []

    def allowed(self):
        return torch.arange(96) % 2 == 0

    def accept(self, token):
        assert token % 2 == 0
        self.written.append(token)

    @property
    def is_complete(self):
        return len(self.written) == 5


@pytest.mark.parametrize(
    "fields",
    [
        lambda: {"thought": ThoughtBudget(5, (), (94, 95))},
        lambda: {"thought": ThoughtBudget(0, (), (94, 95)), "min_tokens": 15, "end_tokens": frozenset(range(90))},
        lambda: {"end_tokens": frozenset(range(40))},
        lambda: {"top_log_probs": 3, "prompt_log_probs": 2},
        lambda: {"constraint": EvenTokens()},
        lambda: {"constraint": EvenTokens(), "thought": ThoughtBudget(3, (), (94, 95))},
    ],
    ids=["thought", "shortest text", "end", "log-probs", "constraint", "thought and constraint"],
)
@pytest.mark.parametrize("draft", ["int8 self", "another model"])
def test_rules_hold_as_in_plain_decoding(draft, fields):
    def job():
        return Job(prompt=PROMPTS[1], max_tokens=20, sampling=GREEDY, **fields())

    (plain,) = finished(generator_of(INT8), [job()])
    generator = generator_of(INT8, DRAFTS[draft])
    (found,) = finished(generator, [job()])
    assert found[0] == plain[0] and found[2] == plain[2] and found[1].finish == plain[1].finish
    assert generator.speculation.drafts > 0


def test_rejected_tokens_leave_the_cache_as_plain_decoding_does():
    """Blocks of text that are kept for the next turn hold accepted tokens only, with the bits of plain decoding."""
    job = Job(prompt=PROMPTS[1], max_tokens=40, sampling=GREEDY)
    plain, drafted = generator_of(INT8, keeps_text=True), generator_of(INT8, DRAFTS["another model"], keeps_text=True)
    assert texts(plain, [job]) == texts(drafted, [job])
    assert 0 < drafted.speculation.accepted_tokens < drafted.speculation.draft_tokens or drafted.speculation.drafts > 5
    kept, expected = drafted.cache._blocks, plain.cache._blocks
    assert kept.keys() == expected.keys() and len(kept) > len(PROMPTS[1]) // 8
    for key, block in expected.items():
        for name in ("keys", "values", "last_hidden"):
            assert torch.equal(getattr(kept[key], name), getattr(block, name))
    assert all(block.users == 0 for block in kept.values())


def test_what_is_over_or_aborted_leaves_nothing():
    generator = generator_of(INT8, DRAFTS["depth cut"])
    numbers = [generator.add(Job(prompt=prompt, max_tokens=20)) for prompt in PROMPTS]
    both = INT8.bytes_per_token + DRAFTS["depth cut"].bytes_per_token
    assert generator.taken_bytes == sum(len(prompt) + 20 for prompt in PROMPTS) * both
    for _ in range(4):
        generator.step()
    for number in [*numbers, *numbers]:
        generator.abort(number)
    assert (generator.running, generator.taken_bytes, generator.step()) == (0, 0, [])
    assert not generator.drafter._texts
    for cache in (generator.cache, generator.drafter.cache):
        assert cache._blocks and all(block.users == 0 for block in cache._blocks.values())


def test_a_prompt_that_the_draft_does_not_know_is_read_bit_by_bit():
    """The target's cache has the prompt, the draft's has not: the others are not held up."""
    generator = generator_of(INT8, DRAFTS["int8 self"], prefill_tokens=8)
    long = Job(prompt=ids(80, 1), max_tokens=6, sampling=GREEDY)
    (expected,) = texts(generator_of(INT8), [long])
    first = generator.add(Job(prompt=[1], max_tokens=120, sampling=GREEDY))
    texts_of = {first: []}
    for progress in [p for _ in range(3) for p in generator.step()]:
        texts_of[progress.job] += progress.tokens
    second = generator.add(long)
    texts_of[second] = []
    while not texts_of[second] or len(texts_of[second]) < 6:
        found = generator.step()
        assert first in [progress.job for progress in found]
        for progress in found:
            texts_of[progress.job] += progress.tokens
    assert [drawn.token for drawn in texts_of[second]] == expected


def test_a_draft_must_share_the_vocabulary(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    MODEL.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"another vocabulary than that of tiny-student, \d+ tokens differ, say"):
        make_drafter(SpeculativeConfig(draft=str(tmp_path)), "tiny-student", TARGET)
    with pytest.raises(ModelError, match=r"a vocabulary of \d+ tokens, tiny-student has 96; a draft must share it"):
        make_drafter(SpeculativeConfig(draft="tiny-teacher"), "tiny-student", TARGET)


def test_a_draft_of_the_model_itself():
    target = load_decoder("tiny-student", "int8")
    with pytest.raises(ConfigError, match="the draft is the served model itself"):
        make_drafter(SpeculativeConfig(draft="self"), "tiny-student", target)
    with pytest.raises(ConfigError, match="99 layers; the draft has"):
        make_drafter(SpeculativeConfig(draft="self", layers=99), "tiny-student", target)
    cut = make_drafter(SpeculativeConfig(draft="self", layers=1), "tiny-student", target)
    assert cut.decoder.weights.blocks[0] is target.weights.blocks[0] and len(cut.decoder.weights.blocks) == 1
    whole = make_drafter(SpeculativeConfig(draft="self"), "tiny-student", load_decoder("tiny-student", "float32"))
    assert whole.decoder.is_int8
    assert make_drafter(SpeculativeConfig(), "tiny-student", target) is None


@pytest.mark.parametrize("fields", [{"num_tokens": 0}, {"layers": 0}, {"max_running": 0}])
def test_settings_that_make_no_sense_are_refused(fields):
    with pytest.raises(ConfigError, match="1 or more"):
        SpeculativeConfig(draft="self", **fields)


def test_the_server_shows_what_its_draft_is_worth():
    body = {"prompt": "12 + 7 =", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    with RunningServer() as plain:
        expected = plain.post("/v1/completions", body).json()["choices"][0]["text"]
    with RunningServer(speculative={"draft": "self", "layers": 1, "num_tokens": 2}) as server:
        answer = server.post("/v1/completions", body).json()
        page = httpx.get(server.url + "/metrics").text
    assert answer["choices"][0]["text"] == expected
    details = answer["usage"]["completion_tokens_details"]
    accepted, rejected = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
    assert accepted + rejected > 0
    found = {family.name: family.samples for family in text_string_to_metric_families(page)}
    assert found["vllm:spec_decode_num_draft_tokens"][0].value == accepted + rejected
    assert found["vllm:spec_decode_num_accepted_tokens"][0].value == accepted
    positions = found["vllm:spec_decode_num_accepted_tokens_per_pos"]
    assert sum(sample.value for sample in positions) == accepted
    assert [sample.labels["position"] for sample in positions] == [str(n) for n in range(len(positions))]
    assert found["limbeck:spec_decode_acceptance"][0].value == pytest.approx(accepted / (accepted + rejected))
    assert found["limbeck:spec_decode_mean_length"][0].value >= 1
