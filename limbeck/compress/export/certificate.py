"""The hand-over certificate: the proof, beside an export, that others read what we wrote.

Every consumer that is at hand loads the export, and its next-token log-probabilities on a probe set are compared with
ours; the rest is listed as not run. `certificate.json` is for machines, `certificate.md` for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.checkpoint import hash_path, write_json
from limbeck.compress.export.consumers import (
    Verdict,
    in_llama_cpp,
    in_transformers,
    in_vllm,
    log_probs_of,
)
from limbeck.compress.export.gguf import Weights
from limbeck.compress.export.lint import Finding, lint
from limbeck.models.load import load_model


class Probes(NamedTuple):
    """What the comparison runs on."""

    origin: str
    """Where the text is from."""
    ids: list[list[int]]
    """Token ids of each probe, two or more."""
    texts: dict[str, list[int]]
    """Texts and our tokenizer's ids for them, without special tokens; for consumers with a tokenizer of their own."""


def certify_directory(directory: Path, probes: Probes, vllm_python: Path | None) -> dict[str, Any]:
    """Certify a Hugging Face directory: transformers and, where its Python is named, vLLM."""
    ours = log_probs_of(load_model(str(directory)), probes.ids)
    verdicts = [in_transformers(directory, ours, probes.ids), in_vllm(directory, ours, probes.ids, vllm_python)]
    return _write(directory, directory, probes, verdicts, lint(directory))


def certify_gguf(file: Path, source: str, gguf_type: str, probes: Probes) -> dict[str, Any]:
    """Certify a GGUF file in llama.cpp, against the source model with its weights rounded as the file has them.

    Computed from the source's own names and layout, so that a mistake in the file's shows.
    """
    weights = Weights(source)
    rounded = {name: weights.rounded(name, gguf_type).view_as(tensor) for name, tensor in weights.state.items()}
    weights.model.load_state_dict(rounded, strict=False)
    ours = log_probs_of(weights.model, probes.ids)
    fallback = [
        name
        for name, tensor in weights.state.items()
        if tensor.ndim > 1 and gguf_type != "f16" and weights.block_type(name, gguf_type) == "f16"
    ]
    findings = []
    if fallback:
        text = f"{len(fallback)} tensors stay F16: their rows are no multiple of 32 ({fallback[0]})"
        findings.append(Finding("sizes", "warning", text))
    return _write(file.parent, file, probes, [in_llama_cpp(file, ours, probes.ids, probes.texts)], findings)


def _write(
    directory: Path, export: Path, probes: Probes, verdicts: Sequence[Verdict], findings: Sequence[Finding]
) -> dict[str, Any]:
    tree = {
        "export_hash": hash_path(export),
        "probes": {
            "origin": probes.origin,
            "sequences": len(probes.ids),
            "tokens": sum(map(len, probes.ids)),
        },
        "consumers": [asdict(verdict) for verdict in verdicts],
        "findings": [finding._asdict() for finding in findings],
        "is_clean": _is_clean(verdicts, findings),
    }
    write_json(directory / "certificate.json", tree)
    (directory / "certificate.md").write_text(_page(tree), encoding="utf-8")
    return tree


def _is_clean(verdicts: Sequence[Verdict], findings: Sequence[Finding]) -> bool:
    """At least one consumer agreed, none disagreed, and no known trap was found."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return "agrees" in outcomes and outcomes <= {"agrees", "not run"} and all(f.severity != "error" for f in findings)


def _page(tree: dict[str, Any]) -> str:
    probes = tree["probes"]
    lines = [
        "# Hand-over certificate",
        "",
        f"Result: **{'clean' if tree['is_clean'] else 'not clean'}**. Export {tree['export_hash']}; compared on "
        f"{probes['tokens']} tokens in {probes['sequences']} sequences ({probes['origin']}).",
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
    lines += [f"- {found['severity']}, {found['code']}: {found['text']}" for found in tree["findings"]]
    lines += ["", "Differences are of log-probabilities of the consumer's ten most likely next tokens."]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
