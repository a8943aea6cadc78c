"""A teacher's words in the student's tokens: nothing is lost, nothing suppressed, and where it can be exact it is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import EOS, SPECIAL, byte_tokenizer, metaspace_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from limbeck.teacher.alignment import align, num_shared_bytes
from limbeck.teacher.spelling import END, Spelling
from limbeck.teacher.vocabulary_map import Passage, VocabularyMap


def spelling(tokenizer):
    return Spelling(tokenizer, [tokenizer.convert_tokens_to_ids(EOS)], ("<think>",))


def merged(*merges):
    return byte_tokenizer(merges=merges)


def random_merges(rng, text, count):
    """Merges of the bytes of a text, and of what earlier ones made."""
    tokens, merges = [bytes_to_unicode()[byte] for byte in (text + "a1").encode()], []
    for _ in range(count):
        left, right = (tokens[place] for place in rng.integers(len(tokens), size=2))
        if left + right not in tokens:
            merges.append(f"{left} {right}")
            tokens.append(left + right)
    return merges


def passages(teacher, student, text):
    """The teacher's tokens of a text, and where each of the student's stands in them."""
    spellings = spelling(teacher), spelling(student)
    theirs, ours = ([*tokenizer.encode(text), 2] for tokenizer in (teacher, student))
    lengths = [
        np.array([len(one.table[token]) for token in ids]) for one, ids in zip(spellings, (theirs, ours), strict=True)
    ]
    spelled = [one.spell(ids) for one, ids in zip(spellings, (theirs, ours), strict=True)]
    assert spelled == [text.encode() + END] * 2
    spans = align(lengths[1], lengths[0], num_shared_bytes(*spelled))
    return theirs, [
        (low, Passage(theirs[low : high + 1], int(skipped), target))
        for target, low, high, skipped in zip(ours, *spans, strict=True)
    ]


def log_probs(rng, vocab):
    values = rng.normal(0, 4, vocab)
    return (values - np.logaddexp.reduce(values)).astype(np.float32)


TEXTS = st.text(max_size=25).filter(lambda text: not any(special in text for special in SPECIAL))


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.integers(0, 2**32 - 1))
def test_mass_stays_one_and_no_token_of_the_text_gets_none(text, seed):
    rng = np.random.default_rng(seed)
    teacher, student = (merged(*random_merges(rng, text, 25)) for _ in range(2))
    between = VocabularyMap(spelling(teacher), spelling(student))
    theirs, found = passages(teacher, student, text)
    rows = [log_probs(rng, len(between.teacher.table)) for _ in theirs]
    between.observe(passage for _, passage in found[::2])
    told = 0.0
    for place, passage in found:
        here = rows[place : place + len(passage.tokens)]
        entries, kinds = between.project(here, passage)
        assert entries[passage.target] > 0
        assert sum(entries.values()) == pytest.approx(sum(kinds.values()), abs=1e-12)
        # Special tokens that could stand inside the student's token are no text.
        specials = [between.teacher.names[name] for name in SPECIAL if name != EOS]
        unread = here[1:] if not passage.skipped else here
        assert -1e-6 < 1 - sum(entries.values()) < 1e-6 + sum(float(np.exp(row[specials]).sum()) for row in unread)
        told += np.log(entries[passage.target])
    # The text is at least as likely in the student's tokens: what else the teacher could call it counts too.
    assert told >= sum(float(row[token]) for row, token in zip(rows, theirs, strict=True)) - 1e-4


@settings(max_examples=20, deadline=None)
@given(TEXTS, st.integers(0, 2**32 - 1))
def test_between_equal_tokenizers_the_distribution_is_the_teachers(text, seed):
    rng = np.random.default_rng(seed)
    own = merged(*random_merges(rng, text, 20))
    between = VocabularyMap(spelling(own), spelling(own))
    assert between.matched == 1.0
    _, found = passages(own, own, text)
    between.observe(passage for _, passage in found)
    for _, passage in found:
        row = log_probs(rng, len(between.teacher.table))
        entries, kinds = between.project([row], passage)
        assert len(passage.tokens) == 1
        np.testing.assert_allclose([entries[i] for i in range(len(row))], np.exp(row.astype(float)), rtol=1e-12)
        assert kinds["exact"] == pytest.approx(1, abs=1e-6)


NUMBERS = [f"{a}{b}{c}" for a, b, c in itertools.product("0123456789", repeat=3)]
DIGITS = merged()
TRIPLES = merged(
    *(f"{a} {b}" for a, b in itertools.product("0123456789", repeat=2)),
    *(f"{n[:2]} {n[2]}" for n in NUMBERS),
    *(f"{n[0]} {n[1:]}" for n in NUMBERS),
)


def number_world(seed):
    """Random probabilities of all numbers of three digits."""
    weights = np.random.default_rng(seed).gamma(0.05, size=1000)
    return dict(zip(NUMBERS, weights / weights.sum(), strict=True))


def told_behind(world, begin, spelled):
    """log p of every token behind `begin`: of all that goes on with what the token spells."""
    total = sum(p for text, p in world.items() if text.startswith(begin))
    row = np.full(len(spelled), -np.inf, np.float32)
    for token, said in spelled.items():
        mass = sum(p for text, p in world.items() if text.startswith(begin + said))
        row[token] = np.log(mass / total) if mass else -np.inf
    return row


def test_a_number_that_the_teacher_splits_has_the_probability_of_its_digits():
    teacher, student, world = spelling(DIGITS), spelling(TRIPLES), number_world(0)
    digits = {i: str(d) for d in range(10) for i in [DIGITS.convert_tokens_to_ids(str(d))]}
    size = len(teacher.table)

    def row(begin):
        full = np.full(size, -np.inf, np.float32)
        full[list(digits)] = told_behind(world, begin, dict(enumerate(digits.values())))
        return full

    between = VocabularyMap(teacher, student)
    number = max(world, key=world.get)
    target, tokens = TRIPLES.encode(number)[0], DIGITS.encode(number)
    for text in NUMBERS:
        between.observe([Passage(DIGITS.encode(text), 0, TRIPLES.encode(text)[0])])
    found, kinds = between.project([row(number[:depth]) for depth in range(3)], Passage(tokens, 0, target))
    assert found[target] == pytest.approx(world[number], rel=1e-5)
    for text in NUMBERS:
        if text[:2] == number[:2]:
            # One more count stands for the token that spells what was said, so that no text need be seen.
            assert found[TRIPLES.encode(text)[0]] == pytest.approx(world[text], rel=1e-5)
    for digit in "0123456789":
        mass = sum(p for token, p in found.items() if student.table[token].startswith(digit.encode()))
        assert mass == pytest.approx(sum(p for text, p in world.items() if text[0] == digit), abs=1e-6)
    # Other numbers are whole numbers too, as they are in the texts, and not single digits.
    single = sum(found.get(TRIPLES.convert_tokens_to_ids(digit), 0.0) for digit in "0123456789")
    assert single < 0.01
    assert kinds["longer"] + kinds["exact"] == pytest.approx(1, abs=1e-6)


def test_digits_of_a_number_that_the_teacher_writes_at_once_are_exact():
    teacher, student, world = spelling(TRIPLES), spelling(DIGITS), number_world(1)
    row = np.full(len(teacher.table), -np.inf, np.float32)
    for text, p in world.items():
        row[TRIPLES.encode(text)[0]] = np.log(max(p, 1e-30))
    between, number = VocabularyMap(teacher, student), max(world, key=world.get)
    for skipped, digit in enumerate(number):
        passage = Passage(TRIPLES.encode(number), skipped, DIGITS.convert_tokens_to_ids(digit))
        found, _ = between.project([row], passage)
        begun = sum(p for text, p in world.items() if text.startswith(number[:skipped]))
        for other in "0123456789":
            mass = sum(p for text, p in world.items() if text.startswith(number[:skipped] + other))
            assert found.get(DIGITS.convert_tokens_to_ids(other), 0.0) == pytest.approx(mass / begun, abs=1e-6)


def test_ends_of_turns_meet_whatever_they_are_called():
    teacher, student = spelling(DIGITS), Spelling(metaspace_tokenizer(), [3, 2], ())
    assert teacher.ends == (2,)
    between = VocabularyMap(teacher, student)
    row = np.full(len(teacher.table), -np.inf, np.float32)
    row[2] = 0.0
    found, _ = between.project([row], Passage([2], 0, 3))
    assert found == {3: 1.0}


def test_a_text_begins_with_the_token_that_the_tokenizer_would_write():
    own = spelling(merged("a b", "b c", "ab c"))
    assert own.table[own.begin(b"abd")] == b"ab"
    assert own.table[own.begin(b"bcd")] == b"bc"
    assert own.table[own.begin("é".encode()[:1])] == b"\xc3"
    with_spaces = Spelling(metaspace_tokenizer(), [2], ())
    assert with_spaces.table[with_spaces.begin(b"word")] == b"w"
    assert with_spaces.table[with_spaces.begin(b" word")] == b" "
    assert with_spaces.begin("é".encode()) is None


def test_a_piece_is_meant_where_a_byte_spells_the_same():
    words = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("a", "b"), ("▁", "ab")], byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    own = Spelling(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), [0], ())
    assert [words[own.begin(text)] for text in (b"a", b" ab", b"abb", b" aba", b"\n")] == [
        "a",
        "▁ab",
        "ab",
        "▁ab",
        "<0x0A>",
    ]
    assert own.spell(own.names[name] for name in ("▁ab", "<0xC3>", "<0xA9>")).decode() == " abé"


def test_special_tokens_without_text_stay_open():
    teacher, student = spelling(DIGITS), Spelling(metaspace_tokenizer(), [2], ())
    begin = teacher.names["<|im_start|>"]
    row = np.full(len(teacher.table), -np.inf, np.float32)
    row[begin], row[teacher.names["a"]] = np.log(0.25), np.log(0.75)
    target = student.names["a"]
    found, _ = VocabularyMap(teacher, student).project([row], Passage([teacher.names["a"]], 0, target))
    assert found[target] == pytest.approx(0.75)
    assert sum(found.values()) == pytest.approx(1.0)  # both call it by one name
    del student.names["<|im_start|>"]
    found, _ = VocabularyMap(teacher, student).project([row], Passage([teacher.names["a"]], 0, target))
    assert sum(found.values()) == pytest.approx(0.75)
