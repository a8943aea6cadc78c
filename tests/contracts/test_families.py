"""Supported means tested: commands on tiny random models of families, compared with plain transformers.

A fixed sample runs by default, every family that `docs/models.md` lists with every command in the slow set.
"""

from __future__ import annotations

import re

import pytest
import torch
from architectures import FAMILIES
from docs_blocks import ROOT
from family_trials import TRIALS, prepare, trial

from limbeck.models import layouts

SAMPLE = {
    ("Gemma 2", "distill"): "works",
    ("gpt-oss", "teacher cache"): "works",
    ("Granite 4", "evaluate"): "slower",
    ("Gemma 3, vision", "distill"): "works",
    ("Qwen3.5", "distill"): "slower",
    ("Qwen3.5", "prune"): "refused",
}
CELL = re.compile(r"(yes|padded|alone|plain|no \((\d+)\))$")
STATES = {"yes": "works", "padded": "slower", "alone": "slower", "plain": "slower"}


def rows_of_page() -> dict[str, list[str]]:
    lines = (ROOT / "docs/models.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[2:] for row in rows}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    made = {}

    def place(name):
        if name not in made:
            made[name] = prepare(name, tmp_path_factory.mktemp("family") / "it")
        return made[name]

    return place


@pytest.mark.parametrize(("name", "command"), SAMPLE)
def test_a_sample_of_families(places, name, command):
    cell = trial(name, command, places(name))
    assert cell.state == SAMPLE[name, command], cell


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_no_cell_of_the_page_lies(places, name):
    found = {command: trial(name, command, places(name)) for command in TRIALS}
    told = dict(zip(TRIALS, rows_of_page()[name], strict=True))
    assert {command: cell.state for command, cell in found.items()} == {
        command: STATES.get(cell, "refused") for command, cell in told.items()
    }, [cell for cell in found.values() if cell.state == "WRONG"]


def test_the_page_has_every_family_and_command():
    rows = rows_of_page()
    assert list(rows) == ["family", *FAMILIES] and rows["family"] == list(TRIALS)
    assert len(FAMILIES) >= 45
    assert all(CELL.match(cell) for name, row in rows.items() if name != "family" for cell in row), "a cell says wrong"


def test_every_refusal_has_its_reason():
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    asked = {int(number) for number in re.findall(r"no \((\d+)\)", text)}
    assert asked == {int(number) for number in re.findall(r"^(\d+)\. \S", text, re.MULTILINE)}


def test_a_wrong_layout_would_show(places, monkeypatch):
    """The trial is no rubber stamp: state that runs from one sequence into the next does not pass."""

    def joined(decoder, input_ids, lengths, way):
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        return layouts.call(decoder, input_ids, positions)

    monkeypatch.setattr(layouts, "run", joined)
    assert trial("Qwen3.5", "distill", places("Qwen3.5")).state == "WRONG"
