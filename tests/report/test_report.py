"""The report on made-up sweeps and runs: what it says, what it refuses, and that its page stands alone."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from limbeck.errors import CheckpointError
from limbeck.report.collect import collect
from limbeck.report.findings import findings
from limbeck.report.groups import group_rows, lines_of, uncut_of
from limbeck.report.page import write_report as run
from limbeck.report.rows import rows_of
from limbeck.report.tables import console_table, markdown, score_table


def make_run(lead: float, keep_ending: bool = False, seed: int = 0, loss: float = 0.0, **more: Any) -> dict[str, Any]:
    """A run whose score falls with the cut, more so without the ending."""
    rng = random.Random(f"{lead} {keep_ending} {seed} {more}")
    kept = lead if not keep_ending else min(1.0, lead + 0.12)
    score = (0.88 * (1 - (1 - lead) ** 2 * (0.5 if keep_ending else 0.9)) - loss) + rng.uniform(-0.02, 0.02)
    score = max(0.02, score)
    half = 1.96 * math.sqrt(score * (1 - score) / 300)
    stop = 1.0 if lead == 1 or keep_ending else max(0.02, lead - 0.2)
    ending = str(keep_ending).lower()
    retention = 1.0 if lead == 1 else score / 0.88
    return {
        "name": f"lead_fraction-{lead}_keep_ending-{ending}_seed-{seed}",
        "lead_fraction": lead,
        "keep_ending": keep_ending,
        "seed": seed,
        "accuracy": score,
        "accuracy_low": score - half,
        "accuracy_high": min(1.0, score + half),
        "retention": retention,
        "retention_low": retention - (0 if lead == 1 else half),
        "retention_high": retention + (0 if lead == 1 else half),
        "tokens": round(612_345 * kept),
        "flops": round(1.4e12 * kept),
        "flops_teacher": 0,
        "flops_student": round(1.25e12 * kept),
        "flops_head": round(0.15e12 * kept),
        "train_seconds": 41.7 * kept + rng.uniform(0, 3),
        "seconds": {"step": 40.0 * kept, "validation": 1.5},
        "peak_bytes": round(310e6 * (0.4 + 0.6 * kept)),
        "stop_rate": stop,
        "stop_rate_low": max(0.0, stop - 0.04),
        "stop_rate_high": min(1.0, stop + 0.04),
        "end_marker_rate": stop,
        "output_tokens": 320 - 160 * stop,
        "output_tokens_low": 310 - 160 * stop,
        "output_tokens_high": 330 - 160 * stop,
        "unknown_fraction": 0.0,
        "validation_ce": 0.31 - 0.1 * lead,
        "lost_end_marker_fraction": 0.0 if lead == 1 or keep_ending else 1.0,
        "lost_first_derivation_fraction": 1.0 if lead < 0.5 else 0.0,
        **more,
    }


def make_summary(runs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    model = {"accuracy_low": 0.94, "accuracy_high": 0.985, "stop_rate": 1.0, "output_tokens": 171.2}
    return {
        "title": "Truncated traces of a tiny teacher",
        "command": ["limbeck", "demo", "--out", "runs/demo"],
        "teacher": {"name": "tiny-teacher", "accuracy": 0.967, "parameters": 2_900_000, **model},
        "base": {
            **model,
            "name": "tiny-student",
            "accuracy": 0.31,
            "accuracy_low": 0.26,
            "accuracy_high": 0.36,
            "parameters": 640_000,
        },
        "teacher_accuracy": 0.967,
        "base_accuracy": 0.31,
        "axes": ["lead_fraction", "keep_ending", "seed"],
        "match": "examples",
        "task": {"name": "builtin:chain", "num_problems": 300, "num_samples": 1, "temperature": 0.0},
        "runs": runs,
        "store": {
            "tokens_scored": 612_345,
            "tokens_asked": 1_900_000,
            "bytes_per_token": 206,
            "flops": 3.6e12,
            "seconds": 24.4,
        },
        "trace_stats": {
            "segment_shares": {"prompt": 0.21, "cot": 0.74, "answer": 0.05},
            "mean_tokens": 196.4,
            "first_derivation_fraction": 0.52,
        },
        "config": {"title": "Truncated traces", "grid": {"lead_fraction": [0.25, 0.5, 0.75, 1.0]}},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"system": "Linux", "processor": "x86_64", "python": "3.11.7"},
        **more,
    }


def demo_runs() -> list[dict[str, Any]]:
    cut = [make_run(lead) for lead in (0.25, 0.5, 0.75, 1.0)]
    return cut + [make_run(lead, keep_ending=True) for lead in (0.25, 0.5, 0.75)]


def write_sweep(directory: Path, runs: list[dict[str, Any]], **more: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "summary.json").write_text(json.dumps(make_summary(runs, **more)))
    return directory


def groups_of(directory: Path) -> Any:
    return group_rows(collect([directory]).rows)


def said(directory: Path) -> str:
    evidence = collect([directory])
    return "\n".join(findings(group_rows(evidence.rows), evidence.models, evidence.sources))


class Outside(HTMLParser):
    """Everything in a page that a browser would fetch, and every script."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.found.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "poster", "data") and not (value or "").startswith("data:"):
                self.found.append(f"{tag} {name}={value}")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a demo-like sweep, written into the sweep's own directory."""
    directory = write_sweep(tmp_path_factory.mktemp("report") / "sweep", demo_runs())
    assert run([directory], directory) == directory / "report.html"
    return directory


def test_page_stands_alone(report: Path) -> None:
    page = (report / "report.html").read_text()
    parser = Outside()
    parser.feed(page)
    assert parser.found == []
    assert "@import" not in page and "url(" not in page
    assert "prefers-color-scheme: dark" in page


def test_page_opens_with_what_was_found_and_holds_every_part(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert page.index("Half of each trace without its ending kept") < page.index("<h2>Quality beside cost")
    parts = [
        "Quality beside cost",
        "Who spent the FLOPs",
        "What was cut",
        "Stopping and output length",
        "How to reproduce",
    ]
    assert [page.index(f"<h2>{part}</h2>") for part in parts] == sorted(
        page.index(f"<h2>{part}</h2>") for part in parts
    )
    assert "limbeck demo --out runs/demo" in page and "torch 2.13.0" in page and "lead_fraction:" in page


def test_figures_and_leftovers(report: Path) -> None:
    names = {path.name for path in (report / "plots").iterdir()}
    by_lead = {f"{key}_by_lead_fraction.png" for key in ("accuracy", "retention", "stop_rate", "output_tokens")}
    assert names == by_lead | {f"accuracy_by_{cost}.png" for cost in ("tokens", "flops", "train_seconds", "peak_bytes")}
    assert all((report / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert not list(report.rglob("*.partial"))


def test_markdown_links_exist_and_tables_are_whole(report: Path) -> None:
    text = (report / "report.md").read_text()
    links = re.findall(r"\]\((.*?)\)", text)
    assert len(links) == 8 and all((report / link).is_file() for link in links)
    widths = {len(line.split("|")) for line in text.split("## Who")[0].splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_csv_is_unrounded(report: Path) -> None:
    runs = json.loads((report / "summary.json").read_text())["runs"]
    lines = list(csv.DictReader((report / "report.csv").open()))
    assert [line["name"] for line in lines[:2]] == ["teacher: tiny-teacher", "base: tiny-student"]
    for line, values in zip(lines[2:], runs, strict=True):
        assert float(line["accuracy"]) == values["accuracy"]
        assert float(line["seconds.step"]) == values["seconds"]["step"]
        assert json.loads(line["keep_ending"]) is values["keep_ending"]


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    runs = [make_run(1.0) | {"name": "<script>alert(1)</script>|x"}]
    page = run([write_sweep(tmp_path / "s", runs, title="a <b> & c")], tmp_path / "out").read_text()
    assert "<script>" not in page and "a &lt;b&gt; &amp; c" in page
    assert "\\|x" in (tmp_path / "out" / "report.md").read_text()


def test_a_rounded_sampler_has_a_column_where_one_wrote(tmp_path: Path) -> None:
    runs = [make_run(0.5) | {"rollout_mismatch_nats": 0.0123}, make_run(1.0) | {"rollout_mismatch_nats": None}]
    for rows, expected in ((runs, ["0.0123", "–"]), (runs[1:], None)):
        table = score_table(group_rows(rows_of(rows, (), "a sweep")), [])
        column = dict(zip(table.header, zip(*table.rows, strict=True), strict=True)).get("sampler's mismatch, nats")
        assert (column and list(column)) == expected


def test_headline_numbers_are_the_data(tmp_path: Path) -> None:
    half = make_run(0.5) | {"retention": 0.91, "retention_low": 0.88, "retention_high": 0.94}
    half |= {"flops": 49, "train_seconds": 52.0, "peak_bytes": 80}
    whole = make_run(1.0) | {"flops": 100, "train_seconds": 100.0, "peak_bytes": 100}
    text = said(write_sweep(tmp_path, [half, whole])).replace("\u00a0", " ")
    assert text.startswith(
        "Half of each trace kept 91 % (88–94) of the score at 49 % of the FLOPs, 52 % of the training seconds and "
        "80 % of the peak memory of whole traces. The interval lies below 100 %"
    )
    assert "Below whole traces: lead 0.5." in text


@pytest.mark.parametrize(
    ("low", "high", "claim"),
    [(0.9, 1.0, "not distinguishable"), (0.9, 0.99, "this loss"), (1.01, 1.1, "this gain")],
)
def test_a_claim_needs_an_interval_on_one_side(tmp_path: Path, low: float, high: float, claim: str) -> None:
    half = make_run(0.5) | {"retention": (low + high) / 2, "retention_low": low, "retention_high": high}
    claims = {"not distinguishable", "this loss", "this gain"}
    headline = said(write_sweep(tmp_path, [half, make_run(1.0)])).splitlines()[0]
    assert {word for word in claims if word in headline} == {claim}


def test_no_interval_no_claim(tmp_path: Path) -> None:
    half = make_run(0.5)
    for name in ("retention_low", "retention_high"):
        del half[name]
    text = said(write_sweep(tmp_path, [half, make_run(1.0)]))
    assert "kept" not in text and "Retention is undefined for lead 0.5" in text
    table = score_table(groups_of(tmp_path), ())
    assert "(no interval)" in table.rows[0][table.header.index("retention")]


def test_endings_are_compared_by_their_intervals(tmp_path: Path) -> None:
    runs = []
    for lead, cut, kept in ((0.25, 0.3, 0.6), (0.5, 0.6, 0.65)):
        for keep_ending, score in ((False, cut), (True, kept)):
            ends = {"accuracy": score, "accuracy_low": score - 0.05, "accuracy_high": score + 0.05}
            runs.append(make_run(lead, keep_ending) | ends)
    text = said(write_sweep(tmp_path, [*runs, make_run(1.0)]))
    assert (
        "raised the score at lead 0.25 (unpaired difference +0.30, +0.23 to +0.37); it made no distinguishable "
        "difference at lead 0.5 (unpaired difference +0.05, -0.02 to +0.12)." in text
    )


def test_undefined_retention_says_why(tmp_path: Path) -> None:
    undefined = dict.fromkeys(("retention", "retention_low", "retention_high"))
    zero = {"accuracy": 0.0, "accuracy_low": 0.0, "accuracy_high": 0.01}
    text = said(write_sweep(tmp_path / "zero", [make_run(0.5) | undefined, make_run(1.0) | undefined | zero]))
    assert "undefined for lead 0.5 (the score of the uncut run cannot be told from zero)" in text
    text = said(write_sweep(tmp_path / "none", [make_run(0.5) | undefined, make_run(0.75) | undefined]))
    assert "(no scored uncut run has the same settings)" in text


def test_seeds_are_one_group_with_mean_values(tmp_path: Path) -> None:
    runs = [make_run(lead, seed=seed) for lead in (0.5, 1.0) for seed in (0, 1, 2)]
    groups = groups_of(write_sweep(tmp_path, runs))
    assert [(group.lead_fraction, len(group.rows)) for group in groups] == [(0.5, 3), (1.0, 3)]
    for name in ("accuracy", "accuracy_low", "accuracy_high", "flops"):
        assert groups[0].get(name) == pytest.approx(sum(values[name] for values in runs[:3]) / 3)
    assert "means over the seeds" in said(tmp_path)
    table = score_table(groups, ())
    assert [row[table.header.index("seeds")] for row in table.rows] == ["3", "3"]


def test_a_value_that_a_seed_lacks_is_missing_in_the_group(tmp_path: Path) -> None:
    runs = [make_run(0.5, seed=0), make_run(0.5, seed=1) | {"retention": None}]
    (group,) = groups_of(write_sweep(tmp_path, runs))
    assert group.get("retention") is None and group.get("accuracy") is not None


def test_uncut_run_belongs_to_its_own_settings(tmp_path: Path) -> None:
    runs = [make_run(lead, divergence=name) for lead in (0.5, 1.0) for name in ("forward_kl", "jsd")]
    groups = groups_of(write_sweep(tmp_path, runs, axes=["lead_fraction", "divergence"]))
    found = [uncut_of(group, groups) for group in groups]
    assert [(g.lead_fraction, g.settings["divergence"]) for g in found if g] == [(1.0, "forward_kl"), (1.0, "jsd")] * 2


def test_lines_share_the_uncut_run_of_their_family(tmp_path: Path) -> None:
    lines = lines_of(groups_of(write_sweep(tmp_path, demo_runs())))
    assert [[group.lead_fraction for group in members] for members in lines.values()] == [[0.25, 0.5, 0.75, 1.0]] * 2


def test_a_policy_without_a_fraction_is_not_called_uncut(tmp_path: Path) -> None:
    runs = [make_run(1.0, policy=policy) for policy in ("lead", "first_derivation")]
    groups = groups_of(write_sweep(tmp_path, runs, axes=["lead_fraction", "policy"]))
    assert [group.is_uncut for group in groups] == [True, False]
    assert uncut_of(groups[1], groups) is groups[0]
    assert len(lines_of(groups)) == 1


def test_unscored_runs_are_no_error(tmp_path: Path) -> None:
    runs = [{"name": f"run-{lead}", "lead_fraction": lead, "flops": 100 * lead} for lead in (0.5, 1.0)]
    write_sweep(tmp_path, runs, teacher=None, base=None, store=None, trace_stats=None, task=None, axes=None, match=None)
    page = run([tmp_path], tmp_path / "out").read_text()
    assert "No run has been scored yet" in page and "What was cut" not in page


def test_only_names_is_enough(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"runs": [{"name": "a"}]}))
    assert "No run has been scored yet" in run([tmp_path], tmp_path / "out", "Title").read_text()


def write_single(directory: Path, lead: float, rate: float, score: float | None = None) -> Path:
    """A distilled student as `limbeck distill` leaves it."""
    directory.mkdir(parents=True)
    manifest = {
        "stage": "distill",
        "command": ["limbeck", "distill", "tiny.yaml"],
        "config": {
            "truncation": {"lead_fraction": lead, "keep_ending": False},
            "optimizer": {"learning_rate": rate},
            "training": {"seed": 0},
        },
        "versions": {"torch": "2.13.0"},
        "machine": {"system": "Linux"},
        "ledger": {
            "tokens": 1000,
            "flops": {"teacher": 5, "student": 10, "head": 1, "total": 16},
            "train_seconds": 3.5,
            "peak_bytes": {"total": 7 * 2**20},
        },
        "metrics": {"loss": 1.0, "validation_ce": 1.25},
        "counts": {"lost_end_marker_fraction": 0.5},
    }
    (directory / "limbeck.json").write_text(json.dumps(manifest))
    if score is not None:
        (directory / "evaluation").mkdir()
        summary = {
            "model": directory.name,
            "accuracy": score,
            "accuracy_low": score - 0.1,
            "accuracy_high": score + 0.1,
        }
        (directory / "evaluation" / "summary.json").write_text(json.dumps(summary))
    return directory


def test_single_runs_become_rows_with_the_fields_that_differ(tmp_path: Path) -> None:
    paths = [write_single(tmp_path / "a", 0.5, 1e-3, 0.6), write_single(tmp_path / "b", 1.0, 2e-3)]
    first, second = collect(paths).rows
    assert first.settings == (("optimizer.learning_rate", "0.001"),)
    assert (first.lead_fraction, second.lead_fraction) == (0.5, 1.0)
    assert first.numbers | {} == {
        "accuracy": 0.6,
        "accuracy_low": 0.5,
        "accuracy_high": 0.7,
        "validation_ce": 1.25,
        "tokens": 1000,
        "flops": 16,
        "flops_teacher": 5,
        "flops_student": 10,
        "flops_head": 1,
        "train_seconds": 3.5,
        "peak_bytes": 7 * 2**20,
        "lost_end_marker_fraction": 0.5,
    }
    assert second.get("accuracy") is None


def test_sweeps_and_runs_in_one_report(tmp_path: Path) -> None:
    sweeps = [write_sweep(tmp_path / name, [make_run(0.5), make_run(1.0)]) for name in ("one", "two")]
    evidence = collect([*sweeps, write_single(tmp_path / "b", 1.0, 1e-3, 0.6)])
    groups = group_rows(evidence.rows)
    assert [group.settings.get("sweep") for group in groups] == ["one", "one", "two", "two", None]
    assert uncut_of(groups[2], groups) is groups[3]
    assert len(evidence.models) == 2


def test_pass_at_k_is_shown_where_it_says_more_than_the_score(tmp_path: Path) -> None:
    more = {"pass_at_k": 0.9, "pass_at_k_low": 0.85, "pass_at_k_high": 0.95}
    groups = groups_of(write_sweep(tmp_path, [make_run(0.5, pass_k=4, **more), make_run(1.0, pass_k=1, **more)]))
    table = score_table(groups, ())
    assert "pass@1" not in table.header
    assert [row[table.header.index("pass@4")] for row in table.rows] == ["0.900 (0.850–0.950)", "–"]


def test_console_table_shows_intervals_whole_at_80_columns() -> None:
    console = Console(width=80, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    console.print(console_table(demo_runs()))
    text = console.export_text()
    assert "…" not in text and "(reference)" in text
    assert len(re.findall(r"\(\d\.\d\d–\d\.\d\d\)", text)) == 13


def test_markdown_cells_do_not_break_the_table() -> None:
    table = score_table(group_rows(()), ())
    assert markdown(table).count("\n") == 1


BAD = {
    "not json": "{",
    "not an object": "[1]",
    "nan": json.dumps(make_summary([make_run(0.5) | {"accuracy": float("nan")}])),
    "infinite": json.dumps(make_summary([make_run(0.5)])).replace('"seed": 0', '"seed": 1e999'),
    "no runs": json.dumps(make_summary([])),
    "runs missing": json.dumps({"title": "x"}),
    "runs of text": json.dumps({"runs": ["a"]}),
    "score of text": json.dumps(make_summary([make_run(0.5) | {"accuracy": "0.5"}])),
    "score of true": json.dumps(make_summary([make_run(0.5) | {"accuracy": True}])),
    "huge integer": json.dumps(make_summary([make_run(0.5) | {"flops": 10**400}])),
    "lead of zero": json.dumps(make_summary([make_run(0.5) | {"lead_fraction": 0}])),
    "lead of text": json.dumps(make_summary([make_run(0.5) | {"lead_fraction": "half"}])),
    "axes of numbers": json.dumps(make_summary([make_run(0.5)], axes=[1])),
    "teacher of text": json.dumps(make_summary([make_run(0.5)], teacher="big")),
    "store of numbers": json.dumps(make_summary([make_run(0.5)], store=3)),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_broken_summaries_give_one_line_and_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        run([tmp_path], tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message and len(message) < 400
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        collect([tmp_path])


def test_directories_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        collect([tmp_path / "missing"])
    with pytest.raises(CheckpointError, match="neither"):
        collect([tmp_path])
    with pytest.raises(CheckpointError, match="at least one"):
        collect([])
    (tmp_path / "limbeck.json").write_text('{"stage": "evaluate"}')
    with pytest.raises(CheckpointError, match="stage 'evaluate'"):
        collect([tmp_path])


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    directory = write_sweep(tmp_path / "s", [make_run(1.0)])
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        run([directory], tmp_path / "file")


def gain_runs() -> list[dict[str, Any]]:
    """Whole traces, half of them, whole ones at the cost of the half, and one that failed."""
    kept = {"gain_kept": 0.94, "gain_kept_low": 0.9, "gain_kept_high": 0.99}
    fewer = {"gain_kept": 0.5, "gain_kept_low": 0.4, "gain_kept_high": 0.6}
    fewer |= {"accuracy": 0.5, "accuracy_low": 0.45, "accuracy_high": 0.55}
    cut, whole = make_run(0.5, **kept, learning_rate=1e-4), make_run(1.0, gain_kept=1.0, learning_rate=1e-3)
    control = whole | {
        "name": "fewer",
        "tokens": 1,
        "flops": 7e11,
        **fewer,
        "control": True,
        "control_of": [cut["name"]],
    }
    failed = {
        "name": "lead_fraction-0.25",
        "lead_fraction": 0.25,
        "keep_ending": False,
        "seed": 0,
        "failed": "no memory",
    }
    return [cut, whole, control, failed]


def test_a_cut_stands_beside_whole_traces_at_its_cost(tmp_path: Path) -> None:
    evidence = collect([write_sweep(tmp_path, gain_runs())])
    groups = group_rows(evidence.rows)
    cut, whole, control, _ = groups
    assert control.is_control and not control.is_uncut and not control.has_fraction
    assert uncut_of(cut, groups) is uncut_of(control, groups) is whole
    said = findings(groups, evidence.models, evidence.sources)
    gains = (
        "Of what whole traces gain over the base student, lead 0.5 kept 94\N{NO-BREAK SPACE}% (90–99) at "
        "50\N{NO-BREAK SPACE}% of the FLOPs, more than fewer whole traces at that cost, which kept "
        "50\N{NO-BREAK SPACE}% (40–60) (unpaired difference +"
    )
    assert any(sentence.startswith(gains) for sentence in said)
    assert "Failed: lead_fraction-0.25 (no memory)" in said
    table = score_table(groups, evidence.models)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["whole traces"]["gain kept"] == "1.000 (reference)"
    assert rows["whole traces at the cost of lead 0.5"]["gain kept"] == "0.500 (0.400–0.600)"
    assert rows["lead 0.5"]["learning rate"] == "0.0001"
    assert rows["lead 0.25"]["score"] == "–"
    assert (run([tmp_path], tmp_path, top=["It saves half."])).read_text().count("It saves half.") == 1


def test_every_base_student_has_a_row(tmp_path: Path) -> None:
    bases = [{"name": name, "accuracy": score} for name, score in (("a", 0.5), ("b", 0.1))]
    evidence = collect([write_sweep(tmp_path, demo_runs(), bases=bases)])
    assert [model.name for model in evidence.models] == ["teacher: tiny-teacher", "base: a", "base: b"]
