"""The report's section on ranking pipelines: one row a model, what was lost, and a manifest without a table refused."""

import re

import pytest

from limbeck.checkpoint import write_manifest
from limbeck.errors import CheckpointError
from limbeck.ranking.data import RankingDataConfig
from limbeck.report import page

TEACHER = {
    "model": "teacher",
    "before": None,
    "auc": 0.75,
    "auc_low": 0.73,
    "auc_high": 0.77,
    "parameters": 590_000,
    "weight_bytes": 2_360_000,
    "latency_p50_ms": 4.0,
    "latency_p95_ms": 6.0,
}
SMALL = TEACHER | {
    "model": "w8a8",
    "before": "teacher",
    "auc": 0.7425,
    "auc_difference": -0.0075,
    "auc_difference_low": -0.01,
    "auc_difference_high": -0.005,
    "delong_p_value": 0.0123,
    "kendall_tau": 0.91,
    "auc_difference_from_unpruned": -0.0075,
    "auc_difference_low_from_unpruned": -0.01,
    "auc_difference_high_from_unpruned": -0.005,
    "relative_auc_from_unpruned": -0.01,
    "weight_bytes": 204_800,
    "latency_p50_ms": 2.0,
}


def written(directory, rows, stage="ranking table"):
    directory.mkdir()
    write_manifest(
        directory,
        stage=stage,
        config=RankingDataConfig(source="synthetic"),
        inputs={},
        metrics={"rows": rows},
    )
    return directory


def test_rows_findings_and_figure(tmp_path):
    out = tmp_path / "report"
    page.write_report([written(tmp_path / "films", [TEACHER, SMALL])], out)
    text = (out / "report.md").read_text()
    assert text.startswith("# Ranking models\n") and "2 ranking models" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    header, _, teacher, small = cells[:4]
    row = dict(zip(header, small, strict=True))
    assert row["AUC"] == "0.7425 (0.7300 to 0.7700)"
    assert row["difference"] == "-0.0075 (-0.0100 to -0.0050)" and row["p"] == "0.012"
    assert row["of unpruned AUC"] == "-1.00%" and row["KiB"] == "200" and row["ms, median"] == "2.00"
    assert "NDCG@5" not in header and dict(zip(header, teacher, strict=True))["model"] == "teacher"
    assert "w8a8: AUC 0.7425, -1.00% of the unpruned student's (difference -0.0075, -0.0100 to -0.0050)." in text
    assert (out / "plots/ranking.png").read_bytes().startswith(b"\x89PNG")
    assert "<h2>Ranking</h2>" in (out / "report.html").read_text()


def test_several_pipelines_are_told_apart(tmp_path):
    paths = [written(tmp_path / "films", [TEACHER]), written(tmp_path / "books", [TEACHER], "rank pipeline")]
    text = page.write_report(paths, tmp_path / "report").with_suffix(".md").read_text()
    assert re.search(r"\| films: teacher ", text) and re.search(r"\| books: teacher ", text)


def test_a_manifest_without_a_table_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="run the stage again"):
        page.write_report([written(tmp_path / "films", [{"model": "teacher"}])], tmp_path / "report")
