"""What was found, in plain words, computed from the groups.

A difference is claimed only where the intervals allow it: of a cut and its uncut run by the paired interval of the
retention, of any other two groups by the interval of their difference (`apart`), and the sentence says which it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from limbeck.report.collect import Source
from limbeck.report.groups import Group, cuts_beside_controls, frontier, namer, setting, uncut_of, varied_axes
from limbeck.report.rows import Row
from limbeck.report.tables import ratio
from limbeck.report.units import digits, interval, percent, percent_interval, quantity

_LISTED = 6
_HEADLINES = 4
_COST_WORDS = {"flops": "FLOPs", "train_seconds": "training seconds", "peak_bytes": "peak memory"}


def findings(groups: Sequence[Group], models: Sequence[Row], sources: Sequence[Source]) -> list[str]:
    """Sentences for the top of the page, the most telling first."""
    if all(group.get("accuracy") is None for group in groups):
        return ["No run has been scored yet: there are costs, but no quality to set beside them. Run limbeck evaluate."]
    headlines = [sentence for family in _families(groups) for sentence in _headlines(family, groups)]
    lead = headlines[:_HEADLINES] or [_best(groups)]
    rest = [_failed(groups), _models(groups, models), *_gains(groups), _verdicts(groups), _endings(groups)]
    rest += [_stopping(groups), _frontier(groups), _undefined(groups), _caveat(groups, sources)]
    return [*lead, *(sentence for sentence in rest if sentence)]


def verdict(group: Group) -> str | None:
    """`below` or `above` the uncut run, or `not distinguishable`, by the paired interval; None where undefined."""
    retention = group.estimate("retention")
    if retention is None or retention.low is None or retention.high is None:
        return None
    if retention.high < 1:
        return "below"
    return "above" if retention.low > 1 else "not distinguishable"


def _families(groups: Sequence[Group]) -> list[list[Group]]:
    families: dict[object, list[Group]] = {}
    for group in groups:
        families.setdefault(group.family, []).append(group)
    return list(families.values())


def _headlines(family: Sequence[Group], groups: Sequence[Group]) -> list[str]:
    """For the cut nearest one half, with and without the ending: what was kept, at which cost."""
    cuts = [group for group in family if not group.is_uncut and group.has_fraction and verdict(group)]
    if not cuts:
        return []
    nearest = min(map(_lead, cuts), key=lambda fraction: abs(fraction - 0.5))
    chosen = sorted((group for group in cuts if _lead(group) == nearest), key=lambda group: group.keep_ending)
    return [_headline(group, groups) for group in chosen]


def _headline(group: Group, groups: Sequence[Group]) -> str:
    retention, uncut = group.estimate("retention"), uncut_of(group, groups)
    assert retention is not None
    shares = [(word, ratio(group, uncut, name)) for name, word in _COST_WORDS.items()]
    costs = [f"{percent(value)} of the {word}" for word, value in shares if value is not None]
    kept = f"{_subject(group, groups)} kept {percent_interval(retention)} of the score"
    tail = {
        "below": "The interval lies below 100 %: this loss is more than the choice of problems explains.",
        "above": "The interval lies above 100 %: this gain is more than the choice of problems explains.",
        "not distinguishable": "The interval includes 100 %: not distinguishable from whole traces on these problems.",
    }[verdict(group) or "not distinguishable"]
    return f"{kept}{' at ' + _listed(costs) if costs else ''} of whole traces. {tail}"


def _gains(groups: Sequence[Group]) -> list[str]:
    """What each cut kept of the gain, beside fewer whole traces at its cost; no more than fit on a page."""
    name, found = namer(groups), []
    for cut, control in cuts_beside_controls(groups):
        kept, fewer = cut.estimate("gain_kept"), control.estimate("gain_kept")
        if kept is None or fewer is None:
            continue
        cost = ratio(cut, uncut_of(cut, groups), "flops")
        at = f" at {percent(cost)} of the FLOPs" if cost is not None else ""
        word, apart = "not distinguishable from", cut.difference_from(control)
        if apart is not None and apart.is_clear:
            word = "more than" if apart.value > 0 else "less than"
        found.append(
            f"Of what whole traces gain over the base student, {name(cut)} kept {percent_interval(kept)}{at}, {word} "
            f"fewer whole traces at that cost, which kept {percent_interval(fewer)}"
            f"{f' ({apart} of the score)' if apart is not None else ''}."
        )
    return found[:_HEADLINES]


def _failed(groups: Sequence[Group]) -> str | None:
    """Which runs failed, and why."""
    failed = [(row.name, row.failed) for group in groups for row in group.rows if row.failed]
    return f"Failed: {'; '.join(f'{name} ({reason})' for name, reason in failed)}" if failed else None


def _subject(group: Group, groups: Sequence[Group]) -> str:
    fraction = group.lead_fraction or 0
    whole = "all tokens" if "common_length" in group.settings.values() else "each trace"
    part = f"Half of {whole}" if fraction == 0.5 else f"{100 * fraction:.3g} % of {whole}"
    has_endings = len({other.keep_ending for other in groups}) > 1
    ending = (" with its ending re-attached" if group.keep_ending else " without its ending") if has_endings else ""
    settings = ", ".join(setting(axis, group.settings.get(axis, "–")) for axis in varied_axes(groups))
    return f"{part}{ending}{f' ({settings})' if settings else ''}"


def _models(groups: Sequence[Group], models: Sequence[Row]) -> str | None:
    """Where the student started, where the teacher stands, what whole traces gave."""
    parts = []
    for model in models:
        score, parameters = model.estimate("accuracy"), model.get("parameters")
        if score is not None:
            size = f" ({quantity(parameters, 'number')} parameters)" if parameters else ""
            parts.append(f"{model.name}{size} scores {interval(score)}")
    scored = [group for group in groups if group.is_uncut and group.get("accuracy") is not None]
    if scored:
        best = max(scored, key=_score)
        words = "the best student trained on whole traces" if len(scored) > 1 else "the student trained on whole traces"
        parts.append(f"{words} scores {interval(best.estimate('accuracy'))}")
    return _capital("; ".join(parts)) + "." if parts else None


def _verdicts(groups: Sequence[Group]) -> str | None:
    """Which cuts can be told from whole traces, and which cannot."""
    name = namer(groups)
    found: dict[str, list[str]] = {}
    for group in groups:
        if not group.is_uncut and (word := verdict(group)):
            found.setdefault(word, []).append(name(group))
    titles = {
        "not distinguishable": "not distinguishable from whole traces",
        "below": "below whole traces",
        "above": "above whole traces",
    }
    parts = [f"{title}: {_shortened(found[word])}" for word, title in titles.items() if word in found]
    return _capital("; ".join(parts)) + "." if parts else None


def _endings(groups: Sequence[Group]) -> str | None:
    """What re-attaching the ending did to the score, cut by cut."""
    found: dict[str, list[str]] = {}
    for cut, kept in _ending_pairs(groups):
        label, apart = namer(groups)(cut), kept.difference_from(cut)
        if apart is not None and apart.is_clear:
            word = "raised" if apart.value > 0 else "lowered"
            found.setdefault(word, []).append(f"{label} ({apart})")
        else:
            found.setdefault("same", []).append(f"{label} ({apart})" if apart is not None else label)
    parts = [f"{word} the score at {_shortened(found[word])}" for word in ("raised", "lowered") if word in found]
    if "same" in found:
        parts.append(f"made no distinguishable difference at {_shortened(found['same'])}")
    return f"Re-attaching the ending {'; it '.join(parts)}." if parts else None


def _ending_pairs(groups: Sequence[Group]) -> Iterator[tuple[Group, Group]]:
    """Each scored cut without its ending, and with it."""
    for group in groups:
        twin = _without_ending(group, groups) if group.keep_ending and not group.is_uncut else None
        if twin is not None and None not in (group.get("accuracy"), twin.get("accuracy")):
            yield twin, group


def _without_ending(group: Group, groups: Sequence[Group]) -> Group | None:
    """The same cut without its ending."""
    twins = [g for g in groups if (g.settings, g.lead_fraction) == (group.settings, group.lead_fraction)]
    return next((twin for twin in twins if not twin.keep_ending), None)


def _stopping(groups: Sequence[Group]) -> str | None:
    """How often students stop by themselves after the smallest cut, with and without the ending, and after none."""
    known = [group for group in groups if group.has_fraction and group.get("stop_rate") is not None]
    cuts = list(itertools.filterfalse(_is_uncut, known))
    if not cuts:
        return None
    chosen = [group for group in cuts if (_lead(group), group.family) == (min(map(_lead, cuts)), cuts[0].family)]
    uncut = uncut_of(chosen[0], known)
    parts = [_stops(group, groups) for group in (chosen if uncut is None else [*chosen, uncut])]
    return f"Stopping. {'; '.join(parts)}."


def _stops(group: Group, groups: Sequence[Group]) -> str:
    rate, length = group.estimate("stop_rate"), group.get("output_tokens")
    assert rate is not None
    tokens = f", {digits(length)} tokens on average" if length is not None else ""
    return f"{namer(groups)(group)}: {percent_interval(rate)} of outputs stopped by themselves{tokens}"


def _frontier(groups: Sequence[Group]) -> str | None:
    on = [group for group, flag in zip(groups, frontier(groups, "flops"), strict=True) if flag]
    if len(groups) < 2 or not on:
        return None
    if len(on) == len(groups):
        return "Every run is on the frontier of score against FLOPs: none scored as much for less."
    labels = [f"{namer(groups)(group)} ({group.get('accuracy'):.2f})" for group in sorted(on, key=_flops)]
    return f"No run beats these in score at their FLOPs: {_shortened(labels)}. Neighbours may differ by chance."


def _best(groups: Sequence[Group]) -> str:
    """Without a cut to talk about: the best score, and who cannot be told from it."""
    scored = [group for group in groups if group.get("accuracy") is not None]
    best = max(scored, key=_score)
    top = best.estimate("accuracy")
    apart = [(group, group.difference_from(best)) for group in scored if group is not best]
    near = [(group, found) for group, found in apart if found is None or not found.is_clear]
    name, how = namer(groups), {found.how for _, found in near if found is not None}
    by = f" by the {' or '.join(sorted(how))} difference" if how else ""
    rest = f" Not distinguishable from it{by}: {_shortened([name(group) for group, _ in near])}." if near else ""
    return f"The best score is {interval(top)}, by {name(best)}.{rest}"


def _undefined(groups: Sequence[Group]) -> str | None:
    """Which groups have no retention, and why."""
    missing = [
        group for group in groups if not group.is_uncut and group.get("accuracy") is not None and not verdict(group)
    ]
    if not missing:
        return None
    name = namer(groups)
    reasons: dict[str, list[str]] = {}
    for group in missing:
        reasons.setdefault(_reason(uncut_of(group, groups)), []).append(name(group))
    parts = [f"{_shortened(labels)} ({reason})" for reason, labels in reasons.items()]
    return f"Retention is undefined for {'; '.join(parts)}."


def _reason(uncut: Group | None) -> str:
    score = uncut.estimate("accuracy") if uncut is not None else None
    if score is None:
        return "no scored uncut run has the same settings"
    if not score.value or not score.low:
        return "the score of the uncut run cannot be told from zero"
    return "not compared with the uncut run problem by problem, as a sweep does"


def _caveat(groups: Sequence[Group], sources: Sequence[Source]) -> str:
    """What the intervals cover, and what was held equal."""
    problems = sorted({str(s.task["num_problems"]) for s in sources if s.task.get("num_problems")})
    over = f"the {' or '.join(problems)} problems" if problems else "the problems"
    seeds = {len(group.rows) for group in groups}
    replicates = (
        "each setting was trained with one seed, so nothing is known here about another seed"
        if seeds == {1}
        else "values and interval ends are means over the seeds, whose spread is shown as single points"
    )
    equal = {"examples": "examples: every run saw the same traces", "tokens": "tokens: every run saw as many tokens"}
    matches = [equal[s.match] for s in sources if s.match in equal]
    tail = f" Runs are compared at equal {matches[0]}." if len(set(matches)) == 1 else ""
    return f"Intervals are over {over} (bootstrap); {replicates}.{tail}"


def _is_uncut(group: Group) -> bool:
    return group.is_uncut


def _lead(group: Group) -> float:
    return group.lead_fraction or 0.0


def _score(group: Group) -> float:
    return group.get("accuracy") or 0.0


def _flops(group: Group) -> float:
    return group.get("flops") or 0.0


def _shortened(labels: Sequence[str]) -> str:
    shown = list(labels) if len(labels) <= _LISTED + 1 else [*labels[:_LISTED], f"{len(labels) - _LISTED} more"]
    return "; ".join(shown) if any("," in label for label in labels) else _listed(shown)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
