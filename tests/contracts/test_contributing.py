"""What CONTRIBUTING.md says of files is true: they are there, and its example diffs stand on lines that are in them."""

import re

import pytest
from docs_blocks import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)
DIFFS = re.findall(r"^### ([^\n]+)\n(?:(?!^###).)*?^```diff\n(.*?)^```$", TEXT, re.M | re.S)
KINDS = ["divergence", "pruning solver", "quantisation method", "trace format", "optimizer", "architecture", "endpoint"]


def test_the_files_and_folders_that_it_names_are_there():
    named = re.findall(r"`((?:limbeck|tests|docs)/[\w./]*)`", PROSE) + re.findall(r"\]\((\S+?)\)", PROSE)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_kind_of_extension_has_an_example():
    assert [kind for kind, _ in DIFFS] == KINDS


@pytest.mark.parametrize(("kind", "diff"), DIFFS, ids=KINDS)
def test_an_example_fits_the_code_and_touches_three_files_at_most(kind, diff):
    files = re.split(r"^--- \S+\n\+\+\+ b/(\S+)\n", diff, flags=re.M)[1:]
    assert 1 <= len(files) // 2 <= 3
    for name, hunk in zip(files[::2], files[1::2], strict=True):
        stands = [line[1:] for line in hunk.splitlines() if line.startswith((" ", "-"))]
        assert any(line.startswith("+") for line in hunk.splitlines()), name
        if stands:
            assert not set(stands) - set((ROOT / name).read_text().splitlines()), name
        elif (ROOT / name).exists():
            continue
        else:
            assert f"--- /dev/null\n+++ b/{name}" in diff, name
