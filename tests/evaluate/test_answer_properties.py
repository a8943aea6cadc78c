"""Answers by rules: what holds for any number, list or choice, whatever it is."""

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from limbeck.evaluate.answer_forms import Quantity, list_of, number_of, range_of
from limbeck.evaluate.answers import Verdict, extract_answer
from limbeck.evaluate.compare import check_exact
from limbeck.evaluate.numbers import equal_numbers

RIGHT, WRONG = Verdict.RIGHT, Verdict.WRONG
whole = st.integers(-(10**9), 10**9)
shares = st.fractions(min_value=-1000, max_value=1000, max_denominator=1000)
lengths = {"km": 100_000, "m": 100, "cm": 1}
entries = st.lists(st.integers(0, 999), min_size=2, max_size=6, unique=True)


@given(st.text(max_size=60))
@settings(max_examples=300)
def test_a_text_is_right_against_itself(text):
    assume(text.strip())
    assert check_exact(text, text) is RIGHT
    assert check_exact(f"  {text}\n", text) is RIGHT


@given(whole, st.sampled_from(["", "km", "hours", "$", "%"]))
def test_a_number_is_read_in_any_spelling(value, unit):
    read = number_of(f"{value} {unit}".strip())
    assert read is not None and read.value == value
    assert number_of(f"{value:,} {unit}".strip()) == number_of(f"about {value} {unit}".strip()) == read
    assert number_of(f"x = {value} {unit}".strip()) == number_of(f"({value} {unit})".replace(" )", ")")) == read


@given(st.integers(-999, 999), st.integers(1, 999))
def test_a_fraction_is_the_same_in_latex(top, bottom):
    latex = rf"{'-' if top < 0 else ''}\frac{{{abs(top)}}}{{{bottom}}}"
    assert check_exact(latex, f"{top}/{bottom}") is RIGHT
    assert number_of(f"{top}/{bottom}").value == Fraction(top, bottom)


@given(shares, shares, st.sampled_from(sorted(lengths)), st.sampled_from(sorted(lengths)))
def test_lengths_are_compared_in_any_unit_and_order(one, other, unit, other_unit):
    ours, theirs = Quantity(one, unit), Quantity(other, other_unit)
    verdict = equal_numbers(ours, theirs)
    assert verdict is equal_numbers(theirs, ours)
    assert verdict is (RIGHT if one * lengths[unit] == other * lengths[other_unit] else WRONG)


@given(shares, shares)
def test_a_share_is_its_percentage_alone(share, other):
    percent = Quantity(100 * share, "%")
    assert equal_numbers(percent, Quantity(share, "")) is equal_numbers(Quantity(share, ""), percent) is RIGHT
    expected = RIGHT if other in (share, 100 * share) else WRONG
    assert equal_numbers(Quantity(other, ""), percent) is expected


@given(entries, st.randoms(use_true_random=False))
def test_a_set_has_no_order_and_a_tuple_has(numbers, random):
    mixed = random.sample(numbers, len(numbers))
    given_set, right = (", ".join(map(str, each)) for each in (mixed, numbers))
    assert check_exact(rf"\{{{given_set}\}}", rf"\{{{right}\}}") is RIGHT
    assert check_exact(f"({given_set})", f"({right})") is (RIGHT if mixed == numbers else WRONG)


@given(entries, st.integers(0, 5), st.integers(1000, 2000))
def test_a_list_with_another_entry_is_wrong(numbers, place, other):
    changed = [*numbers]
    changed[place % len(numbers)] = other
    for form in ("{}", "[{}]"):
        ours, theirs = (form.format(", ".join(map(str, each))) for each in (changed, numbers))
        assert check_exact(ours, theirs) is WRONG
    assert check_exact(", ".join(map(str, numbers[:-1])), ", ".join(map(str, [*numbers]))) is WRONG


@given(entries)
def test_the_entries_of_a_list_are_read_back(numbers):
    for joined in (", ".join(map(str, numbers)), "; ".join(map(str, numbers)), " and ".join(map(str, numbers))):
        assert [number_of(entry).value for entry in list_of(joined).entries] == numbers


@given(st.integers(0, 999), st.integers(0, 999))
def test_the_ends_of_a_range_are_read_in_every_spelling(low, high):
    for text in (f"{low} to {high}", f"between {low} and {high}", f"from {low} to {high}", f"{low}-{high}"):
        assert range_of(text) == (str(low), str(high)), text
    assert check_exact(f"{low} to {high}", f"between {low} and {high}") is RIGHT


@given(st.sampled_from("ABCDEFGHJ"), st.sampled_from("ABCDEFGHIJ"), st.sampled_from(["Paris", "12 apples", "x + 1"]))
def test_a_choice_is_its_letter(given_letter, right, text):
    verdict = RIGHT if given_letter == right else WRONG
    for answer in (f"({given_letter})", f"{given_letter}.", f"{given_letter}) {text}", f"option {given_letter}"):
        assert check_exact(answer, right) is verdict, answer


@pytest.mark.parametrize("mark", [r"\boxed{{{}}}", "<answer>{}</answer>", "#### {}", "So the answer is {}."])
@given(value=st.integers(-9999, 9999), other=st.integers(-9999, 9999))
@settings(max_examples=40)
def test_a_marked_answer_is_found_behind_other_numbers(mark, value, other):
    text = f"First {other}, then {other + 1}.\n{mark.format(value)}"
    assert extract_answer(text) == str(value)
    assert check_exact(extract_answer(text), str(value)) is RIGHT
