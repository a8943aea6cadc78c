"""A model beside its baselines, slices, reliability, scores from a file, and what `rank show` prints."""

import json

import numpy as np
import pytest

import limbeck
from limbeck.config import build
from limbeck.errors import ConfigError, DataError
from limbeck.ranking import show
from limbeck.ranking.beside import beside_baselines, headline, reliability, slices_of
from limbeck.ranking.evaluate import RankEvaluateConfig
from limbeck.ranking.interaction import Interaction, Request
from limbeck.ranking.scored import Scored, measures, read_scores, write_scores
from limbeck.ranking.train import RankTrainConfig
from limbeck.report import page


def scored(log_odds, labels, owner):
    log_odds, labels = np.array(log_odds, dtype=float), np.array(labels, dtype=bool)
    probability = 1 / (1 + np.exp(-log_odds))
    return Scored(np.array(owner), labels, log_odds, probability, np.ones(len(labels)), labels.astype(float))


def made(seed=0, requests=60, size=6, strength=2.0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=requests * size)
    labels = rng.random(len(truth)) < 1 / (1 + np.exp(-truth * strength))
    return scored(truth * strength, labels, np.repeat(np.arange(requests), size)), truth, rng


@pytest.mark.parametrize(
    ("noise", "words"), [(3.0, "m beats the best"), (0.0, "cannot be told from"), (-1.0, "m loses to the best")]
)
def test_the_headline_says_who_is_ahead_by_the_paired_interval(noise, words):
    model, truth, rng = made()
    baseline = truth + abs(noise) * rng.normal(size=len(truth))
    if noise < 0:
        model = model._replace(log_odds=baseline)
        baseline = truth
    told = {
        "model": "m",
        **measures(model),
        **beside_baselines(model, {"weak": rng.random(360), "good": baseline}, 5, 0),
    }
    assert told["best_baseline"] == "good" and set(told["baselines"]) == {"weak", "good"}
    assert words in headline(told) and f"{told['auc_over_best_baseline']:+.4f}" in headline(told)
    assert told["auc_over_best_baseline"] == pytest.approx(told["auc"] - told["baselines"]["good"]["auc"])
    assert told["ndcg_at_5_over_best_baseline_low"] <= told["ndcg_at_5_over_best_baseline"]


def requests_of(model, values):
    owners = model.owner.tolist()
    return [
        Request(
            request_id=f"r{owner}",
            member_id="m",
            member={},
            time=0.0,
            history=(),
            context={"page": "home" if owner % 2 else "cart"},
            candidates=tuple(
                Interaction(item_id=f"i{n}", item={"kind": values[n]}, label=bool(model.labels[n]), time=0.0)
                for n in range(len(owners))
                if owners[n] == owner
            ),
        )
        for owner in dict.fromkeys(owners)
    ]


def test_slices_of_requests_and_of_items():
    model, _, _ = made()
    kinds = ["book" if n % 3 else "film" for n in range(len(model.labels))]
    rows = slices_of(model, requests_of(model, kinds), ("page", "kind"), 5, 0)
    assert [(row["feature"], row["value"]) for row in rows] == [
        ("page", "cart"), ("page", "home"), ("kind", "book"), ("kind", "film"),
    ]  # fmt: skip
    assert sum(row["pairs"] for row in rows) == 2 * len(model.labels)
    chosen = np.array(kinds) == "film"
    alone = scored(model.log_odds[chosen], model.labels[chosen], model.owner[chosen])
    assert rows[3]["auc"] == measures(alone)["auc"] and "ndcg_at_5" in rows[0] and "ndcg_at_5" not in rows[3]


def test_a_calibrated_model_lies_on_the_diagonal():
    model, _, _ = made(requests=400)
    bins = reliability(model)
    assert sum(row["pairs"] for row in bins) == len(model.labels)
    assert all(
        row["share_of_yes_low"] - 0.03 <= row["mean_probability"] <= row["share_of_yes_high"] + 0.03 for row in bins
    )


def test_scores_go_through_a_file(tmp_path):
    model, _, _ = made(requests=5)
    write_scores(tmp_path / "scores.jsonl", requests_of(model, ["x"] * 30), model)
    for found, own in zip(read_scores(tmp_path), model, strict=True):
        np.testing.assert_allclose(found, own)


DATA = {
    "source": "synthetic",
    "synthetic": {"requests": 60, "members": 9, "items": 12, "candidates": 4, "history": 1, "topics": 2},
}
SCORER = {
    "student": {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}},
    "data": DATA,
    "vocabulary_tokens": 330,
    "training": {"max_steps": 2, "batch_size": 8, "microbatch_tokens": 4096},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("scorer")
    first = limbeck.train_ranker(build(RankTrainConfig, SCORER), out=str(out / "first"))
    for part in ("train", "test"):
        limbeck.evaluate_ranker(first, part=part, out=str(out / part))
    return out


def test_scores_of_any_scorer_teach_a_student_with_another_tokenizer(trained, tmp_path):
    tree = SCORER | {"vocabulary_tokens": 400, "teacher": {"scores": str(trained / "train")}, "loss": {"kd_ratio": 1.0}}
    student = limbeck.train_ranker(build(RankTrainConfig, tree), out=str(tmp_path / "s"))
    lines = [json.loads(line) for line in (student.path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["kd"]) and line["kd"] > 0 for line in lines if "kd" in line)
    with pytest.raises(DataError, match="no score of item"):
        wrong = tree | {"teacher": {"scores": str(trained / "test")}}
        limbeck.train_ranker(build(RankTrainConfig, wrong), out=str(tmp_path / "w"))
    with pytest.raises(ConfigError, match="of the two labels only"):
        build(RankTrainConfig, tree | {"ranking": {"support": "vocabulary"}})
    with pytest.raises(ConfigError, match="takes scores, or a model"):
        build(RankTrainConfig, tree | {"teacher": {"scores": "column", "model": "tiny-teacher"}})


@pytest.mark.parametrize("order", ["ranknet", "lambdaloss", "listmle"])
def test_losses_on_order_train(tmp_path, order):
    tree = SCORER | {"ranking": {"order": order, "order_ratio": 1.0}}
    done = limbeck.train_ranker(build(RankTrainConfig, tree), out=str(tmp_path / order))
    assert done.metrics["validation_auc"] is not None


def test_an_evaluation_tells_baselines_and_makes_a_report(trained, tmp_path):
    told = json.loads((trained / "test" / "summary.json").read_text())
    assert {"random order", "item rate", "factor model"} <= set(told["baselines"])
    assert told["best_baseline"] in told["baselines"] and told["reliability"] and "mrr_low" in told
    again = build(
        RankEvaluateConfig, {"model": str(trained / "first"), "reference": str(trained / "test"), "baselines": False}
    )
    compared = limbeck.evaluate_ranker(again, out=str(tmp_path / "again")).metrics
    assert compared["auc_difference"] == 0 and "baselines" not in compared
    text = page.write_report([trained / "test"], tmp_path / "report").with_suffix(".md").read_text()
    first = next(line for line in text.splitlines() if line.startswith("- "))
    assert "the best baseline" in first and "paired difference" in first
    assert "| baseline: factor model " in text and (tmp_path / "report/plots/reliability.png").is_file()


def test_requests_are_shown_as_the_model_reads_them(trained, capsys):
    config = build(show.ShowRequestsConfig, {"model": str(trained / "first"), "part": "test", "num": 2})
    shown = show.run(config)
    assert len(shown.requests) == 2 and shown.total == 12
    request = shown.requests[0]
    assert "".join(request.prefix_tokens) == request.prefix and request.prefix.startswith("Will the member")
    assert "".join(request.candidates[0].tokens) == request.candidates[0].text
    assert {c.label_text for c in request.candidates} <= {" yes", " no"}
    show.print_requests(shown)
    printed = capsys.readouterr().out
    assert f"prefix ends, {len(request.prefix_tokens)} tokens" in printed and "2 of 12 requests" in printed
    plain = show.run(build(show.ShowRequestsConfig, {"data": DATA}))
    assert plain.requests[0].prefix_tokens is None and shown.as_dict()["total"] == 12
    with pytest.raises(ConfigError, match="has 12 requests"):
        show.run(build(show.ShowRequestsConfig, {"data": DATA, "part": "test", "start": 12}))
