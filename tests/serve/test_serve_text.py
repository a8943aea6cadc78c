"""Text in pieces is the text in one: characters, stop strings, thoughts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.models.load import load_tokenizer
from limbeck.serve.reasoning import ThoughtSplitter
from limbeck.serve.text import PATIENCE_TOKENS, Detokenizer, StopStrings
from limbeck.serve.vocabulary import Vocabulary
from limbeck.traces.thought import SKY_T1, THINK


def byte_decode(ids):
    """Each token is a byte."""
    return bytes(ids).decode("utf-8", "replace")


@given(st.text())
def test_bytes_become_whole_characters_at_once(text):
    detokenizer = Detokenizer(byte_decode)
    pieces = [detokenizer.add(byte) for byte in text.encode()]
    assert all("�" not in piece for piece in pieces) or "�" in text
    assert "".join(pieces) + detokenizer.finish() == text


@given(st.binary(max_size=PATIENCE_TOKENS - 1))
def test_bytes_that_are_no_text_come_out_as_the_decoder_writes_them(data):
    detokenizer = Detokenizer(byte_decode)
    assert "".join(map(detokenizer.add, data)) + detokenizer.finish() == byte_decode(data)


def test_endless_rubbish_is_not_held_back_for_ever():
    detokenizer = Detokenizer(byte_decode)
    assert "".join(detokenizer.add(0xFF) for _ in range(1000)).count("�") > 900


def test_a_half_character_at_the_end_is_told_at_the_end():
    detokenizer = Detokenizer(byte_decode)
    assert [detokenizer.add(byte) for byte in b"a\xe2\x82"] == ["a", "", ""]
    assert detokenizer.finish() == "�"
    assert detokenizer.finish() == ""


def test_a_text_goes_on_from_a_half_character_of_its_prompt():
    detokenizer = Detokenizer(byte_decode, before=b"ab\xc3")
    assert detokenizer.add(0xA9) == "é"


def spaced_decode(ids):
    """Like sentencepiece: every word has a space in front, which the first one loses."""
    return " ".join(f"w{token}" for token in ids)


def test_spaces_depend_on_what_stands_before():
    alone, going_on = Detokenizer(spaced_decode), Detokenizer(spaced_decode, before=[7])
    assert [alone.add(1), alone.add(2)] == ["w1", " w2"]
    assert [going_on.add(1), going_on.add(2)] == [" w1", " w2"]


@given(st.lists(st.integers(6, 55), max_size=40))
def test_the_built_in_tokenizer_in_pieces(ids):
    vocabulary = Vocabulary(load_tokenizer("tiny-student"), ())
    detokenizer = Detokenizer(vocabulary.decode)
    assert "".join(map(detokenizer.add, ids)) + detokenizer.finish() == vocabulary.decode(ids)


def pieces_of(text, cuts):
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


TEXT = st.text(alphabet="abc", max_size=30)
CUTS = st.lists(st.integers(0, 30), max_size=10)


@given(TEXT, st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3), CUTS)
def test_a_stop_string_ends_the_text_wherever_it_is_cut(text, stops, cuts):
    filtered = StopStrings(stops)
    found = ""
    for piece in pieces_of(text, cuts):
        found += filtered.add(piece)
        if filtered.found is not None:
            break
    found += filtered.finish()
    # The first to be complete wins, as it does token by token; here a piece is looked at as a whole.
    ends = [text.find(stop) for stop in stops if stop in text]
    assert (filtered.found is not None) == bool(ends)
    if not ends:
        assert found == text
    else:
        assert text.startswith(found + filtered.found)
        assert not any(stop in found for stop in stops)


def test_no_part_of_a_stop_string_gets_out():
    stops = StopStrings(["END"])
    assert [stops.add(piece) for piece in ("aE", "N", "xEN", "D!")] == ["a", "", "ENx", ""]
    assert stops.found == "END" and stops.finish() == ""


def split(pieces, **settings):
    splitter = ThoughtSplitter(**settings)
    parts = [*(splitter.add(piece) for piece in pieces), splitter.finish()]
    return "".join(part.thought for part in parts), "".join(part.answer for part in parts), splitter.has_thought


CASES = {
    "<think>\nwhy\n</think>\n\n42": ("why", "42", True),
    "  <think>a</think>b": ("a", "b", True),
    "<think>a < b </thin k> c</think> d <think>": ("a < b </thin k> c", "d <think>", True),
    "no thought </think> here": ("", "no thought </think> here", False),
    " blank space stays ": ("", " blank space stays ", False),
    "<think>\n\n</think>\n7": ("", "7", True),
    "<think> never closed ": ("never closed", "", True),
    "<thinking> is a word": ("", "<thinking> is a word", False),
    "<thi": ("", "<thi", False),
    "": ("", "", False),
    f"{SKY_T1.start}a{SKY_T1.end}b": ("a", "b", True),
}


@pytest.mark.parametrize("text", CASES)
@given(cuts=CUTS)
def test_thought_and_answer_wherever_the_text_is_cut(text, cuts):
    assert split(pieces_of(text, cuts)) == CASES[text]


@given(cuts=CUTS)
def test_a_thought_that_the_prompt_has_opened(cuts):
    assert split(pieces_of("\nwhy</think>\nso", cuts), opened=THINK) == ("why", "so", True)


def test_without_known_markers_everything_is_answer():
    assert split(["<think>a</think>b"], known=()) == ("", "<think>a</think>b", False)


def test_a_thought_is_passed_on_while_it_grows():
    splitter = ThoughtSplitter()
    assert splitter.add("<think>one ").thought == "one"
    assert splitter.add("two </thi").thought == " two"
    assert splitter.add("nk> three") == ("", "three")
