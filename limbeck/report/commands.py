"""The command that writes a report."""

from __future__ import annotations

from limbeck.report.page import ReportConfig, write_report
from limbeck.stage import View


def _run(config: ReportConfig) -> dict[str, str]:
    return {"report": str(write_report(config.sources, config.out, config.title))}


REPORT = View(name="report", config=ReportConfig, run=_run, subject="sources", takes_many=True)
