"""An export in the hands of those who will use it: load it there and compare next-token log-probabilities with ours."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from limbeck.compress import fidelity
from limbeck.models.load import quiet

TOP = 10
"""Entries that are compared at a position: the consumer's most likely ones."""
TOLERANCES = {
    "transformers": (1e-4, 1e-5),
    "vllm": (0.3, 0.05),
    "llama.cpp": (0.6, 0.15),
}
"""Largest and mean difference in nats that still agree. transformers computes the same in the same order. vLLM and
llama.cpp round inputs to 8 bits with other scales, in blocks of their own; a wrong layout differs by several nats."""
_PATIENCE_SECONDS = 540
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""Small and alone on a machine without an accelerator; what the user has set goes first."""

Scores = list[list[dict[int, float]]]
"""For each probe and each position behind the first, log-probabilities by token id."""


@dataclass(frozen=True, slots=True)
class ConsumerResult:
    """What came of one consumer."""

    consumer: str
    outcome: str
    """agrees | differs | failed | not run"""
    note: str = ""
    positions: int = 0
    max_difference: float | None = None
    """Largest |difference| of a log-probability, in nats, over the consumer's ten most likely tokens."""
    mean_difference: float | None = None
    same_best: float | None = None
    """Share of the positions with the same most likely token."""


@torch.inference_mode()
def log_probs_of(model: Any, probes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Log-probabilities [T - 1, V] of the token after each prefix of every probe, float32."""
    return [fidelity.log_probs_of(model, torch.tensor([list(probe)])) for probe in probes]


def compare(consumer: str, ours: Sequence[torch.Tensor], theirs: Scores, note: str = "") -> ConsumerResult:
    """Judge a consumer's scores by ours."""
    differences: list[float] = []
    same = positions = 0
    for expected, found in zip(ours, theirs, strict=True):
        for row, entries in zip(expected, found, strict=True):
            best = max(entries, key=lambda token: entries[token])
            # Ties that rounding decides are no difference.
            same += bool(row[int(best)] >= row.max() - 1e-4)
            positions += 1
            differences += [abs(float(row[int(token)]) - value) for token, value in entries.items()]
    largest, mean = max(differences), statistics.fmean(differences)
    limits = TOLERANCES[consumer]
    # NaN is above no limit, so it has to be below.
    outcome = "agrees" if largest <= limits[0] and mean <= limits[1] else "differs"
    return ConsumerResult(consumer, outcome, note, positions, largest, mean, same / positions)


def in_transformers(directory: Path, ours: Sequence[torch.Tensor], probes: Sequence[Sequence[int]]) -> ConsumerResult:
    """transformers, with the compressed-tensors library where the checkpoint needs it."""
    tree = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in tree and importlib.util.find_spec("compressed_tensors") is None:
        return ConsumerResult("transformers", "not run", "needs pip install compressed-tensors")
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, local_files_only=True, use_safetensors=True
            ).eval()
            # The first pass makes the weights dense, with a bar for it.
            found = [rows.topk(min(TOP, rows.shape[1])) for rows in log_probs_of(model, probes)]
    except Exception as error:  # whatever a consumer raises is the finding
        return ConsumerResult("transformers", "failed", " ".join(str(error).split())[:400])
    scores = [
        [dict(zip(ids, values, strict=True)) for ids, values in zip(top[1].tolist(), top[0].tolist(), strict=True)]
        for top in found
    ]
    return compare("transformers", ours, scores, f"transformers {transformers.__version__}, float32")


def in_vllm(
    directory: Path, ours: Sequence[torch.Tensor], probes: Sequence[Sequence[int]], python: Path | None
) -> ConsumerResult:
    """vLLM, in the environment of the given Python."""
    if python is None:
        return ConsumerResult("vllm", "not run", "no vllm_python was given")
    answer = _ask(python, "score_vllm.py", directory, {"probes": [list(p) for p in probes], "top": TOP})
    if isinstance(answer, str):
        return ConsumerResult("vllm", "failed", answer)
    return compare("vllm", ours, answer["scores"], "float32, eager")


def in_llama_cpp(
    file: Path, ours: Sequence[torch.Tensor], probes: Sequence[Sequence[int]], texts: dict[str, list[int]]
) -> ConsumerResult:
    """llama.cpp by the xllamacpp wheel; its tokenizer is compared too, with `texts` and our ids for them."""
    if importlib.util.find_spec("xllamacpp") is None:
        return ConsumerResult("llama.cpp", "not run", "needs pip install xllamacpp")
    asked = {"probes": [list(p) for p in probes], "top": TOP, "texts": list(texts)}
    answer = _ask(Path(sys.executable), "score_llama_cpp.py", file, asked)
    if isinstance(answer, str):
        return ConsumerResult("llama.cpp", "failed", answer)
    other = [text for text, found in zip(texts, answer["tokens"], strict=True) if found != texts[text]]
    if other:
        return ConsumerResult(
            "llama.cpp", "differs", f"tokenizes {other[0][:60]!r} and {len(other) - 1} more texts otherwise"
        )
    return compare("llama.cpp", ours, answer["scores"], f"{len(texts)} texts tokenized alike")


def _ask(python: Path, script: str, model: Path, asked: dict[str, Any]) -> dict[str, Any] | str:
    """The JSON that a scoring script prints last, or what went wrong."""
    # The text, not the file: the script's directory would come first on the path there, and hide `gguf` from engines.
    text = Path(__file__).with_name(script).read_text(encoding="utf-8")
    command = [str(python.absolute()), "-c", text, str(model.resolve())]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
            env=_ENVIRONMENT | os.environ,
            cwd=model.resolve().parent,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return " ".join(str(error).split())[:400]
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line or "error" in line]
        return f"exit code {done.returncode}: {' '.join((lines or done.stderr.splitlines() or [''])[-1].split())[:400]}"
    return json.loads(done.stdout.strip().splitlines()[-1])
