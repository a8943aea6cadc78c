"""One page from sweeps, runs and compressed models; `limbeck.report(...)` writes it.

Example:
    from limbeck.report import csv_text, rows_of

    run = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.97, "train_seconds": 12.0}
    csv_text(rows_of([run], axes=[], where="a notebook"))
"""

from limbeck.lazy import lazy, make_callable

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Evidence": "collect",
        "Plot": "plots",
        "ReportConfig": "page",
        "Row": "rows",
        "Table": "tables",
        "collect_evidence": "collect:collect",
        "compression_table": "compression",
        "console_table": "tables",
        "csv_text": "tables",
        "markdown": "tables",
        "rows_of": "rows",
        "score_table": "tables",
        "write_report": "page",
    },
)
make_callable(__name__)
