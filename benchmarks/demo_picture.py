"""The picture of the README: gain kept by the demo's capable student, drawn from the summary of a demo.

python benchmarks/demo_picture.py runs/demo/summary.json docs/images/demo.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cut_regimes import WHOLE, draw

POLICIES = {"common_length": "common length", "lead": "share"}


def rows_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The capable student's runs as rows of the map of cuts."""
    runs = [run for run in summary["runs"] if run["regime"] == "capable"]
    full = max(run["flops"] for run in runs)
    return [
        {
            "regime": "capable student",
            "arm": arm_of(run["name"]),
            "gain": [run[key] for key in ("gain_kept", "gain_kept_low", "gain_kept_high")],
            "cost": run["flops"] / full,
        }
        for run in runs
    ]


def arm_of(name: str) -> str:
    """What a run kept, by its name: ...policy-common_length_lead_fraction-0.5."""
    policy, fraction = name.rpartition("policy-")[2].split("_lead_fraction-")
    cut = WHOLE if fraction == "1.0" else f"{POLICIES[policy]} {fraction}"
    return f"whole at the cost of {cut}" if name.startswith("whole-at") else cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("summary", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(rows_of(json.loads(options.summary.read_text(encoding="utf-8"))), options.picture)


if __name__ == "__main__":
    main()
