"""Distillation from scores: any scorer that has given its log-odds of every pair, whatever it is and reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from limbeck.errors import ConfigError, DataError
from limbeck.ledger import Ledger
from limbeck.models.anatomy import NOTHING_GIVEN, Given
from limbeck.progress import track
from limbeck.ranking.examples import log_odds_of
from limbeck.ranking.featurize import EncodedRequest
from limbeck.ranking.interaction import Request
from limbeck.ranking.scored import SCORES
from limbeck.teacher.labels import LabelTargets
from limbeck.traces.batch import Batch, Example

COLUMN = "column"
"""Value of teacher.scores for the column that data.fields.teacher names."""


@dataclass(frozen=True, slots=True)
class ScoreTeacher:
    """A scorer that has spoken: its log-odds stand with the pairs."""

    in_step: ClassVar[bool] = False

    def targets(
        self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger, given: Given = NOTHING_GIVEN
    ) -> LabelTargets:
        """Logits of the two labels for the pairs of the batch, in order."""
        return LabelTargets.of_log_odds(log_odds_of(examples).to(rows.device))


def with_scores(source: str, requests: Sequence[Request], encoded: Sequence[EncodedRequest]) -> list[EncodedRequest]:
    """The requests with the log-odds of a scorer.

    Args:
      source: `column`, or a directory with `scores.jsonl`, or such a file: request_id, item_id, log_odds a line.
      requests: those that were encoded.
    Raises: DataError for a pair without a score; ConfigError where there are no scores at all.
    """
    if source == COLUMN:
        found = list(encoded)
        if any(request.teacher is None or np.isnan(request.teacher).any() for request in found):
            raise ConfigError("teacher.scores column: name the column of log-odds (data.fields.teacher)")
        return found
    table = _read_scores(Path(source))
    found = []
    for request, tokens in zip(requests, encoded, strict=True):
        keys = [(request.request_id, candidate.item_id) for candidate in request.candidates]
        missing = next((key for key in keys if key not in table), None)
        if missing is not None:
            raise DataError(
                f"{source}: no score of item {missing[1]} in request {missing[0]}; score the training part."
            )
        found.append(replace(tokens, teacher=np.array([table[key] for key in keys])))
    return found


def write_pair_scores(requests: Sequence[Request], predict: Callable[[list[tuple[str, str]]], Any], path: Path) -> None:
    """Scores of a scorer of pairs of texts, such as a cross-encoder, in the file that `teacher.scores` reads.

    Args:
      requests: a part of `read_requests`.
      predict: gives the log-odds of (query, item) pairs; without a query the member's features take its place.
      path: of the file; its directory is made.
    Example:
        from sentence_transformers import CrossEncoder  # any other scorer of pairs will do

        split, _ = read_requests(data)
        encoder = CrossEncoder("cross-encoder/ms-marco-MiniLM-L6-v2", activation_fn=torch.nn.Identity())
        write_pair_scores(split.train, encoder.predict, Path("runs/teacher-scores/scores.jsonl"))
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for request in track(requests, "scoring"):
            asked = request.query or " ".join(request.member.values())
            scores = predict([(asked, " ".join(candidate.item.values())) for candidate in request.candidates])
            for candidate, score in zip(request.candidates, scores, strict=True):
                row = {"request_id": request.request_id, "item_id": candidate.item_id, "log_odds": float(score)}
                file.write(json.dumps(row) + "\n")


def _read_scores(path: Path) -> dict[tuple[str, str], float]:
    file = path / SCORES if path.is_dir() else path
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {(str(row["request_id"]), str(row["item_id"])): float(row["log_odds"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: no scores; expected request_id, item_id and log_odds a line, as rank evaluate writes ({error})."
        ) from error
