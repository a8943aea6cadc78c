"""What runs over several sources read of each, and what they forgot."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.report.rows import Row
from limbeck.report.tables import Table
from limbeck.report.units import scale_of, share

HOW_TO_READ = (
    "Held-out CE in nats a token, on whole traces of the source, before the first step and with the weights that were "
    "written. Forgotten: how much it rose."
)


def source_table(rows: Sequence[Row]) -> Table:
    """A line a run and source; empty where every run has one source."""
    lines = [(row.name, source) for row in rows for source in row.raw.get("sources") or []]
    tokens = [source["tokens"] for _, source in lines]
    scale = scale_of(tokens, "tokens")
    names = {name for name, _ in lines}
    if not lines:
        return Table((), ())
    return Table.of(
        {
            "source": [
                source["source"] if len(names) == 1 else f"{name}: {source['source']}" for name, source in lines
            ],
            "sequences": [f"{source['sequences']:,}" for _, source in lines],
            scale.unit: list(map(scale.write, tokens)),
            **{
                title: [share(source[key], 4) for _, source in lines]
                for title, key in (("CE before", "ce_before"), ("CE after", "ce_after"), ("forgotten", "forgotten"))
            },
        }
    )
