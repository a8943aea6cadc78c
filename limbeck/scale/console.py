"""Predictions and plans as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from limbeck.cost.hardware import Hardware
from limbeck.cost.prediction import Prediction
from limbeck.ledger import FLOP_PARTS
from limbeck.scale.advise import Advice
from limbeck.scale.cluster import Estimate
from limbeck.scale.roofline import DECODE_EFFICIENCY, PREFILL_EFFICIENCY

_SIZES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(value: float, unit: str = "") -> str:
    """Three digits with a decimal prefix: `1.23 TFLOP`, `540 MB`."""
    size, prefix = next(((size, prefix) for size, prefix in _SIZES if abs(value) >= size), (1.0, ""))
    scaled = value / size
    digits = 0 if scaled >= 99.5 or scaled == int(scaled) else 1 if scaled >= 9.95 else 2
    return f"{scaled:.{digits}f} {prefix}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for size, unit in ((86400 * 2, "days"), (7200, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def show_predictions(predictions: Sequence[Prediction], hardware: Hardware) -> None:
    """One line a stage, the terms of the highest memory, and what was assumed."""
    out = Console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("stage")
    for name in ("tokens", *FLOP_PARTS, "FLOPs", "memory", "time"):
        table.add_column(name, justify="right")
    for found in predictions:
        table.add_row(*_cells(found))
    if len(predictions) > 1:
        table.add_row(*_sums(predictions))
    out.print(table)
    largest = max(predictions, key=lambda found: found.peak_bytes)
    out.print(f"memory: {_terms(largest.memory)}", highlight=False, soft_wrap=True)
    rates = ", ".join(f"{name} {amount(hardware.rate(name), 'FLOP/s')}" for name in hardware.flops)
    out.print(f"{hardware.name}: {rates}, {amount(hardware.bandwidth, 'B/s')}", highlight=False)
    for note in dict.fromkeys(note for found in predictions for note in found.notes):
        out.print(f"assumed: {note}", highlight=False)


def _cells(found: Prediction) -> list[str]:
    parts = [amount(found.flops[name], "F") if found.flops[name] else "–" for name in FLOP_PARTS]
    all_flops = amount(found.total_flops + found.solver_flops, "F")
    tokens = amount(found.tokens + found.new_tokens)
    return [found.stage, tokens, *parts, all_flops, amount(found.peak_bytes, "B"), duration(found.seconds)]


def _sums(predictions: Sequence[Prediction]) -> list[str]:
    """The cells of all stages together: sums, and the highest memory."""
    flops = sum(found.total_flops + found.solver_flops for found in predictions)
    highest = max(found.peak_bytes for found in predictions)
    seconds = duration(sum(found.seconds for found in predictions))
    return ["all", "", *[""] * len(FLOP_PARTS), amount(flops, "F"), amount(highest, "B"), seconds]


def show_plan(own: Estimate, best: Sequence[Estimate], flags: Sequence[Sequence[str]], hardware: Hardware) -> None:
    """The recipe's own settings and the best ones, then the assumptions.

    Args:
      flags: for each of `best`, what to add to the command.
    """
    out = Console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    names = ("settings", "fits", "memory a device", "a step", "beside it: messages", "whole run", "device-hours")
    table.add_column(names[0])
    for name in names[1:]:
        table.add_column(name, justify="right")
    for label, found in {"the recipe's": own, **{f"plan {n}": found for n, found in enumerate(best, 1)}}.items():
        table.add_row(
            label,
            "yes" if found.fits else "no",
            f"{amount(found.peak_bytes, 'B')} of {amount(found.limit_bytes, 'B')}",
            duration(found.step_seconds),
            duration(found.shard_seconds + found.waiting_seconds),
            duration(found.hours * 3600),
            amount(found.device_hours),
        )
    out.print(table)
    for number, words in enumerate(flags, 1):
        out.print(f"plan {number}: {' '.join(words) or 'as the recipe is'}", highlight=False, soft_wrap=True)
    if not best:
        out.print(
            "no setting fits: use more devices or ones with more memory, a smaller student, adapters (lora), or "
            "shorter traces (lead_fraction).",
            highlight=False,
            soft_wrap=True,
        )
    shown = best[0] if best else own
    out.print(f"memory: {_terms(shown.memory)}", highlight=False, soft_wrap=True)
    for line in assumptions(shown, hardware):
        out.print(f"assumed: {line}", highlight=False, soft_wrap=True)


def show_advice(found: Advice, hardware: Hardware) -> None:
    """Formats, cuts in the chosen format, and the reasons."""
    out = Console()
    for title, rows in (("format", found.formats), (f"cut, in {found.chosen}", found.cuts)):
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in (title, "weights", "fits", "prompt", "a new token", "request", "requests/s", "takes"):
            table.add_column(name, justify="left" if name in (title, "takes") else "right")
        for row in rows:
            times = row.times
            table.add_row(
                row.name,
                amount(row.weight_bytes, "B"),
                "yes" if row.fits else "no",
                f"{1000 * times.prefill:.2f} ms",
                f"{1000 * times.step:.2f} ms" if times.step else "–",
                f"{1000 * times.request:,.0f} ms",
                f"{times.requests_per_second:,.2f}",
                row.needs,
            )
        out.print(table)
        out.print()
    out.print(f"take {found.chosen}", highlight=False)
    for reason in found.reasons:
        out.print(f"- {reason}", highlight=False, soft_wrap=True)
    rates = ", ".join(f"{name} {amount(rate, 'FLOP/s')}" for name, rate in hardware.flops.items())
    out.print(f"{hardware.name}: {rates}, {amount(hardware.bandwidth, 'B/s')}", highlight=False, soft_wrap=True)
    if hardware.is_accelerator:
        out.print(
            f"assumed: prompts reach {PREFILL_EFFICIENCY:.0%} of these FLOP/s, decoding {DECODE_EFFICIENCY:.0%} of the "
            "bandwidth",
            highlight=False,
        )


def _terms(memory: Mapping[str, int]) -> str:
    ordered = sorted(memory.items(), key=lambda term: -term[1])
    return ", ".join(f"{name} {amount(size, 'B')}" for name, size in ordered if size)


def assumptions(found: Estimate, hardware: Hardware) -> list[str]:
    """What an estimate takes for granted."""
    lines = [
        f"{hardware.name}: products reach {hardware.efficiency:.0%} of "
        f"{amount(hardware.flops.get('bf16', hardware.flops['float32']), 'FLOP/s')}, the ledger's FLOPs counted "
        "(recomputation included, attention as a full square)",
        f"messages: {amount(hardware.link_bandwidth, 'B/s')} a device inside a node of {hardware.devices_per_node}, "
        f"{amount(hardware.network_bandwidth, 'B/s')} between nodes; those of shards go on beside products",
        "a device keeps 8 % of its memory free for context, libraries and fragmentation",
    ]
    if found.busy_fraction < 0.99:
        lines.append(
            f"a step's sequences keep {found.busy_fraction:.0%} of the devices' time busy: raise training.batch_size, "
            "or use fewer devices"
        )
    return lines
