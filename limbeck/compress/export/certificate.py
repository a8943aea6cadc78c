"""The hand-over certificate: the proof, beside an export, of what others read in it and how far it is from its source.

The export's next-token log-probabilities on a probe set are compared with those of the model that went in, and, where
one is named, of the one before that. Then every consumer that is at hand loads the export, and is compared with what we
read in it; the rest is listed as not run. `certificate.json` is for machines, `certificate.md` for people.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from limbeck.checkpoint import hash_path, write_json
from limbeck.compress.export.consumers import ConsumerResult
from limbeck.compress.export.lint import Finding


class Probes(NamedTuple):
    """What the comparison runs on."""

    origin: str
    """Where the text is from."""
    ids: list[list[int]]
    """Token ids of each probe, two or more."""
    texts: dict[str, list[int]]
    """Texts and our tokenizer's ids for them, without special tokens; for consumers with a tokenizer of their own."""


class Difference(NamedTuple):
    """How far the export is from another model, over all positions."""

    model: str
    kl_nats: float | None
    """Mean KL(model || export) a token; None where it is not finite."""
    same_best: float
    """Share of the positions with the same most likely token."""
    limit_nats: float | None
    """More is no longer what such rounding does; None has no limit."""

    @property
    def is_near(self) -> bool:
        """Whether it keeps to its limit."""
        return self.limit_nats is None or (self.kl_nats is not None and self.kl_nats <= self.limit_nats)


def distance(
    name: str, model: Sequence[torch.Tensor], export: Sequence[torch.Tensor], limit_nats: float | None = None
) -> Difference:
    """Compare log-probabilities [T - 1, V] of each probe; ids that only one of the two has do not count."""
    kl = 0.0
    same = positions = 0
    for log_p, log_q in zip(model, export, strict=True):
        width = min(log_p.shape[1], log_q.shape[1])
        p, q = log_p[:, :width], log_q[:, :width]
        kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        same += int((p.argmax(1) == q.argmax(1)).sum())
        positions += len(p)
    mean = kl / positions
    return Difference(name, mean if math.isfinite(mean) else None, same / positions, limit_nats)


def is_clean(
    verdicts: Sequence[ConsumerResult], findings: Sequence[Finding], distances: Sequence[Difference]
) -> bool | None:
    """Whether nothing differs, fails, is far from its source or known as a trap; None if nobody could be asked."""
    outcomes = {verdict.outcome for verdict in verdicts}
    is_sound = outcomes <= {"agrees", "not run"} and all(finding.severity != "error" for finding in findings)
    if not is_sound or not all(found.is_near for found in distances):
        return False
    return True if "agrees" in outcomes else None


def write_certificate(
    directory: Path,
    export: Path,
    probes: Probes,
    verdicts: Sequence[ConsumerResult],
    findings: Sequence[Finding],
    distances: Sequence[Difference],
) -> dict[str, Any]:
    """Write both files; returns what stands in the one for machines."""
    tree = {
        "export_hash": hash_path(export),
        "probes": {
            "origin": probes.origin,
            "sequences": len(probes.ids),
            "tokens": sum(map(len, probes.ids)),
        },
        "distances": [found._asdict() for found in distances],
        "consumers": [asdict(verdict) for verdict in verdicts],
        "findings": [finding._asdict() for finding in findings],
        "is_clean": is_clean(verdicts, findings, distances),
    }
    write_json(directory / "certificate.json", tree)
    (directory / "certificate.md").write_text(_page(tree), encoding="utf-8")
    return tree


_RESULTS = {True: "clean", False: "not clean", None: "not proved: no consumer was at hand"}


def _page(tree: dict[str, Any]) -> str:
    probes = tree["probes"]
    lines = [
        "# Hand-over certificate",
        "",
        f"Result: **{_RESULTS[tree['is_clean']]}**. Export {tree['export_hash']}; compared on "
        f"{probes['tokens']} tokens in {probes['sequences']} sequences ({probes['origin']}).",
        "",
        "| from | KL a token, nats | at most | same best token |",
        "|---|---|---|---|",
    ]
    for found in tree["distances"]:
        numbers = [_number(found[key]) for key in ("kl_nats", "limit_nats", "same_best")]
        lines.append(f"| {found['model']} | {' | '.join(numbers)} |")
    lines += [
        "",
        "| consumer | outcome | positions | largest difference, nats | mean, nats | same best token | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in tree["consumers"]:
        numbers = [_number(found[key]) for key in ("max_difference", "mean_difference", "same_best")]
        note = found["note"].replace("|", "/")
        lines.append(
            f"| {found['consumer']} | {found['outcome']} | {found['positions']} | {' | '.join(numbers)} | {note} |"
        )
    lines += ["", "Findings:", ""] if tree["findings"] else ["", "No known trap was found."]
    lines += [f"- {finding['severity']}, {finding['code']}: {finding['text']}" for finding in tree["findings"]]
    lines += ["", "A consumer's differences are of log-probabilities of its ten most likely next tokens from ours."]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
