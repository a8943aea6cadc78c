"""What the optimizer benchmarks share: flags, the machine's description, and the results file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from limbeck.checkpoint import versions

# Studies are no part of the installed package: a script finds them beside its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from studies.page import Table, markdown_table

Outcome = tuple[dict[str, Any], dict[str, Table], list[str]]
"""Keys and values, tables for people, notes."""


def main(name: str, docstring: str, measure: Callable[[bool, Path], Outcome]) -> None:
    """Run `measure(quick, scratch)`; print its tables and, as the last line, its keys as one JSON object.

    `scratch` is a directory for what an interrupted run needs to go on: --scratch keeps it from one call to the next.
    """
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="same keys, smaller grid, under 60 seconds on 2 cores")
    parser.add_argument("--out", type=Path, help=f"directory for {name}.md and {name}.json, such as benchmarks/results")
    parser.add_argument("--scratch", type=Path, help="directory that lets an interrupted run go on")
    flags = parser.parse_args()
    scratch = flags.scratch or Path(os.environ.get("TMPDIR", "/tmp")) / f"limbeck-{name}-{os.getpid()}"
    scratch.mkdir(parents=True, exist_ok=True)
    started, started_cpu = time.perf_counter(), _cpu_seconds()
    keys, tables, notes = measure(flags.quick, scratch)
    keys |= {"wall_seconds": time.perf_counter() - started, "cpu_seconds": _cpu_seconds() - started_cpu}
    body = "\n\n".join(f"## {title}\n\n{markdown_table(table)}" for title, table in tables.items())
    text = "\n\n".join([body, *notes])
    print(text, flush=True)
    if flags.out:
        flags.out.mkdir(parents=True, exist_ok=True)
        (flags.out / f"{name}.md").write_text(_page(name, docstring, text, keys), encoding="utf-8")
        (flags.out / f"{name}.json").write_text(json.dumps(keys, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(keys))


def _page(name: str, docstring: str, text: str, keys: Mapping[str, Any]) -> str:
    command = " ".join(["python", f"benchmarks/{name}.py", *(flag for flag in sys.argv[1:] if flag == "--quick")])
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    used = ", ".join(f"{package} {version}" for package, version in versions().items() if package in ("torch", "numpy"))
    clock = f"{keys['wall_seconds']:.0f} s on the clock, {keys['cpu_seconds']:.0f} s of processor time"
    about = f"`{command}` on {machine}; {used}; {clock}. The interval in brackets is 95 %, by bootstrap over seeds."
    return f"# {name}\n\n{docstring.strip()}\n\n{about}\n\n{text}\n\n```json\n{json.dumps(keys)}\n```\n"


def _cpu_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
