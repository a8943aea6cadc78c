"""Replicates put together: runs that differ in nothing but the seed are one group, with one point in a plot.

A group's number is the mean over its seeds, and so are the ends of its interval. Each interval is over problems; the
mean of the intervals therefore still speaks about the choice of problems, and the spread over seeds is shown as single
points beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from limbeck.report.apart import Difference, difference
from limbeck.report.rows import Estimate, Row
from limbeck.sweep.frontier import on_frontier

CUT_AXES = (
    *("policy", "unit", "budget_tokens", "mask_only", "whole_fraction", "max_weight"),
    *("cut_schedule", "final_fraction", "stop_control"),
)  # fmt: skip
"""Axes that say how traces are cut, beside lead_fraction and keep_ending."""
UNFRACTIONED = ("budget", "first_derivation", "probed")
"""Policies that cut although lead_fraction is 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs with the same settings and different seeds."""

    rows: tuple[Row, ...]

    @property
    def lead_fraction(self) -> float | None:
        """Share of the tokens kept."""
        return self.rows[0].lead_fraction

    @property
    def keep_ending(self) -> bool:
        """Whether the ending was re-attached behind the cut."""
        return self.rows[0].keep_ending

    @property
    def settings(self) -> dict[str, str]:
        """The other axes, the sweep among them where there are several."""
        source = {"sweep": self.rows[0].source} if self.rows[0].source else {}
        return source | dict(self.rows[0].settings)

    @property
    def is_control(self) -> bool:
        """Whether it is whole traces at the cost of a cut."""
        return bool(self.rows[0].control_of)

    @property
    def line(self) -> tuple[tuple[str, str], ...]:
        """All settings but the lead fraction: groups that agree here form one line of a plot."""
        control = ("control", str(self.is_control).lower())
        return (*self.settings.items(), ("keep_ending", str(self.keep_ending).lower()), control)

    @property
    def family(self) -> tuple[tuple[str, str], ...]:
        """All settings but those of the cut: groups that agree here are compared with the same uncut run."""
        return tuple((axis, value) for axis, value in self.settings.items() if short_axis(axis) not in CUT_AXES)

    @property
    def has_fraction(self) -> bool:
        """Whether the lead fraction says how much was kept."""
        policies = [value for axis, value in self.settings.items() if short_axis(axis) == "policy"]
        is_cut_by_it = not self.is_control and not any(policy in UNFRACTIONED for policy in policies)
        return self.lead_fraction is not None and is_cut_by_it

    @property
    def is_uncut(self) -> bool:
        """Whether every token of every trace was kept."""
        return self.lead_fraction == 1 and self.has_fraction

    def get(self, name: str) -> float | None:
        """Mean over the seeds; None where a seed did not measure it."""
        values = [row.get(name) for row in self.rows]
        known = [value for value in values if value is not None]
        return fmean(known) if len(known) == len(values) else None

    def estimate(self, name: str) -> Estimate | None:
        """Mean over the seeds of value and interval ends."""
        value = self.get(name)
        return None if value is None else Estimate(value, self.get(f"{name}_low"), self.get(f"{name}_high"))

    @property
    def problem_scores(self) -> dict[str, float]:
        """Mean over the seeds of the score of every problem by its key; none where the seeds have not the same."""
        tables = [row.problem_scores for row in self.rows]
        if any(table.keys() != tables[0].keys() for table in tables):
            return {}
        return {key: fmean(table[key] for table in tables) for key in tables[0]}

    def difference_from(self, other: Group) -> Difference | None:
        """Score of this group minus that of another; None where one of them was not scored."""
        own, theirs = self.estimate("accuracy"), other.estimate("accuracy")
        if own is None or theirs is None:
            return None
        return difference(own, theirs, self.problem_scores, other.problem_scores)


def group_rows(rows: Sequence[Row]) -> list[Group]:
    """Groups in the order in which their first runs come."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        setting = (row.source, row.settings, row.lead_fraction, row.keep_ending, bool(row.failed))
        groups.setdefault((*setting, _controlled(row, rows)), []).append(row)
    return [Group(rows=tuple(members)) for members in groups.values()]


def _controlled(row: Row, rows: Sequence[Row]) -> tuple[object, ...]:
    """The settings of the cuts that a control stands beside, whatever their seeds."""
    cuts = [other for other in rows if other.source == row.source and other.name in row.control_of]
    return tuple((cut.settings, cut.lead_fraction, cut.keep_ending) for cut in cuts)


def uncut_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """The uncut group that differs from `group` in nothing but the cut, if there is one."""
    uncut = [other for other in groups if other.is_uncut and other.family == group.family]
    return next((other for other in uncut if other.line == group.line), uncut[0] if uncut else None)


def cuts_beside_controls(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Every cut that has one, with its control."""
    return [
        (cut, control)
        for control in groups
        for cut in groups
        if any(row.name in control.rows[0].control_of for row in cut.rows)
    ]


def lines_of(groups: Sequence[Group]) -> dict[tuple[tuple[str, str], ...], list[Group]]:
    """The lines of a plot, each by rising lead fraction.

    A line whose own uncut group was not run, since the uncut run is the same with and without the ending, ends in the
    uncut group of its family.
    """
    lines: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in groups:
        if group.has_fraction:
            lines.setdefault(group.line, []).append(group)
    for members in lines.values():
        uncut = uncut_of(members[0], groups)
        if uncut is not None and all(group.lead_fraction != 1 for group in members):
            members.append(uncut)
    return {line: sorted(members, key=_lead) for line, members in lines.items()}


def frontier(groups: Sequence[Group], cost: str) -> list[bool]:
    """Which groups no other beats in score at their cost; groups without score or cost are not on it."""

    def numbers(name: str) -> list[float]:
        values = [group.get(name) for group in groups]
        return [math.nan if value is None else value for value in values]

    return on_frontier(numbers(cost), numbers("accuracy"))


def namer(groups: Sequence[Group], *, with_lead: bool = True) -> Callable[[Group], str]:
    """A function from group to a label that names only what varies among `groups`."""
    varied = varied_axes(groups)
    has_endings = len({group.keep_ending for group in groups}) > 1
    names_lead = with_lead and len({group.lead_fraction for group in groups}) > 1

    def name(group: Group) -> str:
        cuts = [other for other in groups if any(row.name in group.rows[0].control_of for row in other.rows)]
        if group.is_control:
            return f"whole traces at the cost of {' and '.join(map(name, cuts)) or 'a cut'}"
        parts = [setting(axis, group.settings.get(axis, "–")) for axis in varied]
        if names_lead and group.has_fraction:
            parts.insert(0, "whole traces" if group.is_uncut else f"lead {group.lead_fraction:.4g}")
        if has_endings and not with_lead:
            parts.append("ending kept" if group.keep_ending else "ending cut")
        elif group.keep_ending and not group.is_uncut:
            parts[0] = f"{parts[0]} + ending" if parts else "ending kept"
        return ", ".join(parts) or group.rows[0].name

    return name


def varied_axes(groups: Sequence[Group]) -> list[str]:
    """Axes beside lead fraction and ending that take more than one value."""
    return [axis for axis in _axes(groups) if len({group.settings.get(axis) for group in groups}) > 1]


def setting(axis: str, value: str) -> str:
    """`forward_kl`, but `rank 16`: a word speaks for itself, a number or a switch does not."""
    is_word = value[:1].isalpha() and value not in ("true", "false", "null")
    return value if is_word else f"{short_axis(axis)} {value}"


def short_axis(axis: str) -> str:
    """The last name of a dotted path that says something: `divergence` of `loss.divergence.name`."""
    parts = axis.split(".")
    return parts[-2] if parts[-1] in ("name", "model") and len(parts) > 1 else parts[-1]


def _axes(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(axis for group in groups for axis in group.settings))


def _lead(group: Group) -> float:
    return group.lead_fraction or 0.0
