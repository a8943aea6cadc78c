"""What counts as the first derivation of an output."""

import pytest

from limbeck.evaluate.derivation import first_derived


@pytest.mark.parametrize(
    ("output", "pattern", "value"),
    [
        ("<think>\na 7+4=1\nSo 1\nCheck\nSo 3\n</think>\n\n3", "So {answer}", "1"),
        ("<think>\na 7+4=1\n</think>\n\nSo 3", "So {answer}", None),
        ("So 12", "So {answer}", "12"),
        ("it makes 3.5 in all. It makes 4.", "makes {answer}", "3.5"),
        ("it makes 4. Then on.", "makes {answer}", "4"),
        ("so -7/3, that is", "so {answer}", "-7/3"),
        ("x=2 y=3 z=3", r"={answer} \w={answer}", "3"),
        ("", "So {answer}", None),
    ],
)
def test_first_derivation(output, pattern, value):
    assert first_derived(output, pattern) == value
