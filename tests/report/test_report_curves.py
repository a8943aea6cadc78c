"""Learning curves and the table of sources on the page; the table that a sweep prints."""

from __future__ import annotations

import json
import re

import pytest
from test_report import demo_runs, make_run, write_sweep

from limbeck.checkpoint import Checkpoint
from limbeck.errors import CheckpointError
from limbeck.report.collect import collect
from limbeck.report.curves import binned, curve_plots
from limbeck.report.forgetting import source_table
from limbeck.report.groups import group_rows
from limbeck.report.page import write_report
from limbeck.report.tables import show_sweep


def log(directory, run, steps=150):
    """A metrics.jsonl as a run writes it: a loss a step, a held-out one every 50."""
    place = directory / "runs" / run["name"]
    place.mkdir(parents=True)
    lines = [
        {"step": n, "loss": 3 / n, "tokens": 40 * n, **({"validation_ce": 2 - n / 100} if n % 50 == 0 else {})}
        for n in range(1, steps + 1)
    ]
    (place / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return lines


def test_the_curves_of_a_sweep_stand_side_by_side(tmp_path):
    runs = [make_run(0.5), make_run(1.0), make_run(1.0, seed=1)]
    sweep = write_sweep(tmp_path / "sweep", runs)
    lines = [log(sweep, run) for run in runs]
    rows = collect([sweep]).rows
    assert rows[0].curves["loss"] == tuple((line["tokens"], line["loss"]) for line in lines[0])
    assert [x for x, _ in rows[0].curves["validation_ce"]] == [2000.0, 4000.0, 6000.0]
    plots = curve_plots(group_rows(rows))
    assert [plot.name for plot in plots] == ["loss_by_tokens", "validation_ce_by_tokens"]
    (axes,) = plots[0].draw().axes
    labels = [line.get_label() for line in axes.lines]
    # Two seeds of one setting are two lines, with one label and one colour.
    assert len(labels) == 3 and sum(not label.startswith("_") for label in labels) == 2
    assert axes.lines[1].get_color() == axes.lines[2].get_color() != axes.lines[0].get_color()
    assert all(len(line.get_xdata()) <= 60 for line in axes.lines)
    page = write_report([sweep], tmp_path / "report").read_text(encoding="utf-8")
    assert "Held-out loss on whole traces over the tokens read." in page
    assert (tmp_path / "report" / "plots" / "loss_by_tokens.png").stat().st_size > 1000
    assert "curves" not in (tmp_path / "report" / "report.csv").read_text(encoding="utf-8")


def test_a_run_without_a_log_has_no_curve(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", demo_runs())
    assert curve_plots(group_rows(collect([sweep]).rows)) == []
    place = sweep / "runs" / demo_runs()[0]["name"]
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text('{"loss": 1.0}\nhalf a li', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: damaged"):
        collect([sweep])


def test_parts_of_a_curve_keep_its_mean():
    curve = tuple((float(n), float(n * n)) for n in range(120))
    found = binned(curve, most=60)
    assert len(found) == 60 and sum(y for _, y in found) / 60 == pytest.approx(sum(y for _, y in curve) / 120)
    assert [x for x, _ in found] == sorted(x for x, _ in found)
    assert binned(curve[:60], most=60) == curve[:60]


def test_what_was_forgotten_is_on_the_page(tmp_path):
    row = {"sequences": 30, "tokens": 4000, "ce_before": 1.0, "ce_after": 1.25, "forgotten": 0.25}
    other = {**row, "tokens": 9000, "ce_after": 0.5, "forgotten": 0.0}
    run = make_run(1.0, sources=[{"source": "new.jsonl", **other}, {"source": "old.jsonl", **row}])
    sweep = write_sweep(tmp_path / "sweep", [run])
    table = source_table(collect([sweep]).rows)
    assert table.header == ("source", "sequences", "k tokens", "CE before", "CE after", "forgotten")
    assert table.rows[1] == ("old.jsonl", "30", "4.00", "1.0000", "1.2500", "0.2500")
    page = write_report([sweep], tmp_path / "report").read_text(encoding="utf-8")
    assert "Sources, and what was forgotten" in page and "old.jsonl" in page
    assert source_table(collect([write_sweep(tmp_path / "plain", demo_runs())]).rows).header == ()


def test_names_of_runs_stay_on_narrow_pages(tmp_path):
    page = write_report([write_sweep(tmp_path / "sweep", demo_runs())], tmp_path / "report").read_text(encoding="utf-8")
    assert re.search(r'th\[scope="row"\][^}]*position: sticky; left: 0', page)
    assert re.search(r"@media \(max-width: 40rem\)[^@]*max-width: 9rem", page)


def test_a_sweep_prints_its_table(tmp_path, capsys):
    show_sweep(Checkpoint(write_sweep(tmp_path / "sweep", demo_runs())))
    text = capsys.readouterr().out
    assert "whole" in text and "score" in text and text.count("0.5") >= 2
