"""The guard against over-fitting: best weights, patience, held-out divergence, and the same bits when resumed."""

import json

import pytest
import torch
from tiny_runs import assert_same_bits, metrics_of, run_config, save_model, train_on_ranks, weights_of

from limbeck.checkpoint import Checkpoint
from limbeck.distill import train
from limbeck.distill.data import prepare
from limbeck.distill.guard import Guard
from limbeck.errors import ConfigError
from limbeck.models.load import load_model, vocabulary_size
from limbeck.models.tiny import symbol_tokenizer
from limbeck.stage import How


def overfit(**changes):
    """Two training traces, a high rate: the held-out loss falls for a few steps and rises from then on."""
    return run_config(
        {
            "traces.num_traces": 8,
            "num_validation": 6,
            "training.batch_size": 2,
            "training.max_steps": 40,
            "training.validate_every_steps": 2,
            "training.save_every_steps": 3,
            "training.keep_best": "ce",
            "optimizer.learning_rate": 0.02,
            "schedule": {"name": "constant", "warmup_fraction": 0.0},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    out = tmp_path_factory.mktemp("guarded") / "out"
    train.run(overfit(), out)
    return out


def validations(out):
    return {row["step"]: row["validation_ce"] for row in metrics_of(out) if "validation_ce" in row}


def test_the_best_weights_are_written(tmp_path, guarded):
    """Equal to those of a run that ends at the best step; the rate is constant, so that both take the same steps."""
    values = validations(guarded)
    best = min(values, key=values.get)
    assert 2 < best < 40 and values[40] > values[best] + 0.1, "the example does not over-fit"
    metrics = Checkpoint(guarded).manifest["metrics"]
    assert metrics["kept_step"] == best
    assert metrics["validation_ce"] == values[best]
    train.run(overfit(**{"training.keep_best": None, "training.max_steps": best}), tmp_path / "short")
    for name, weight in weights_of(tmp_path / "short").items():
        assert torch.equal(weights_of(guarded)[name], weight), name
    assert not list(guarded.glob("best*")) and not list(guarded.glob("state*"))


def test_a_run_never_ends_worse_than_it_began(tmp_path, guarded):
    """Started from the best weights at a rate that spoils them, it writes what it started from, also when resumed."""
    config = overfit(**{"student.model": str(guarded), "optimizer.learning_rate": 0.5, "training.max_steps": 6})
    metrics = train.run(config, tmp_path / "out").manifest["metrics"]
    assert min(validations(tmp_path / "out").values()) > metrics["validation_ce"]
    assert metrics["kept_step"] == 0 and metrics["loss"] is None
    for name, weight in weights_of(guarded).items():
        assert torch.equal(weights_of(tmp_path / "out")[name], weight), name


def test_patience_ends_the_run(tmp_path, guarded):
    values = validations(guarded)
    best = min(values, key=values.get)
    train.run(overfit(**{"training.patience": 3}), tmp_path / "out")
    rows = metrics_of(tmp_path / "out")
    misses = [step for step in values if step > best][:3]
    assert rows[-1]["step"] == misses[-1] < 40
    metrics = Checkpoint(tmp_path / "out").manifest["metrics"]
    assert metrics["kept_step"] == best
    assert Checkpoint(tmp_path / "out").manifest["ledger"]["steps"] == misses[-1]
    for name, weight in weights_of(guarded).items():
        assert torch.equal(weights_of(tmp_path / "out")[name], weight), name


@pytest.mark.parametrize("steps", [1, 8, 15])
def test_resumed_run_is_the_same(tmp_path, guarded, monkeypatch, steps):
    config = overfit(**{"training.patience": 3})
    train.run(config, tmp_path / "whole")
    step = train._step

    def interrupted(setup, number):
        if number == steps:
            raise KeyboardInterrupt
        return step(setup, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "out")
    train.run(config, tmp_path / "out", how=How(resume=True))
    assert_same_bits(tmp_path / "out", tmp_path / "whole")
    metrics = [Checkpoint(tmp_path / name).manifest["metrics"] for name in ("out", "whole")]
    assert metrics[0] == metrics[1]


def test_two_ranks_stop_together(tmp_path, guarded):
    config = overfit(**{"training.patience": 2})
    train.run(config, tmp_path / "one")
    train_on_ranks(config, tmp_path / "two")
    one, two = (Checkpoint(tmp_path / name).manifest["metrics"] for name in ("one", "two"))
    assert one["kept_step"] == two["kept_step"]
    assert len(metrics_of(tmp_path / "one")) == len(metrics_of(tmp_path / "two")) < 40
    assert two["validation_ce"] == pytest.approx(one["validation_ce"], rel=1e-5)


@pytest.mark.parametrize("kd_ratio", [0.0, 1.0])
def test_held_out_divergence_is_the_kl_to_the_teacher(tmp_path, kd_ratio):
    """With or without a KD term in the loss, and whatever its normalization and the run's selection of tokens."""
    teacher = save_model(tmp_path / "teacher", sharpness=30.0)
    changes = {"teacher.model": teacher, "loss.kd_ratio": kd_ratio, "training.keep_best": "kd"}
    changes |= {"loss.normalization": "sequence_mean", "training.microbatch_tokens": 200}
    changes |= {"supervision.select": {"by": "divergence", "fraction": 0.3}} if kd_ratio else {}
    config = overfit(**{"training.max_steps": 4, **changes})
    train.run(config, tmp_path / "out")
    metrics = Checkpoint(tmp_path / "out").manifest["metrics"]
    tokenizer = symbol_tokenizer()
    vocab = vocabulary_size(tokenizer)
    models = [load_model(name) for name in (teacher, str(tmp_path / "out"))]
    total = ce = count = 0.0
    for example in prepare(config, tokenizer).validation:
        ids = torch.from_numpy(example.sample.input_ids.astype("int64"))[None]
        weight = torch.from_numpy(example.kd_weight[1:])
        with torch.no_grad():
            theirs, mine = (torch.log_softmax(model(ids).logits[0, :-1, :vocab], -1) for model in models)
        total += float(((theirs.exp() * (theirs - mine)).sum(-1) * weight).sum())
        ce -= float((mine.gather(1, ids[0, 1:, None])[:, 0] * weight).sum())
        count += float(weight.sum())
    assert metrics["validation_kd"] == pytest.approx(total / count, rel=1e-4)
    assert metrics["validation_ce"] == pytest.approx(ce / count, rel=1e-4)
    measured = train.measure(config, str(tmp_path / "out"))
    assert measured["validation_kd"] == pytest.approx(metrics["validation_kd"], rel=1e-5)


def test_validation_costs_the_training_nothing(tmp_path):
    teacher = save_model(tmp_path / "teacher", sharpness=30.0)
    flops = {}
    for name, best in (("plain", None), ("guarded", "kd")):
        train.run(
            overfit(**{"teacher.model": teacher, "training.max_steps": 4, "training.keep_best": best}),
            tmp_path / name,
        )
        flops[name] = Checkpoint(tmp_path / name).manifest["ledger"]["flops"]
    assert flops["plain"] == flops["guarded"]


def row(step, value):
    return {"step": step, "validation_ce": value}


def test_only_needed_files_stay(tmp_path):
    model, guard = torch.nn.Linear(2, 2), Guard(tmp_path, "validation_ce", None)
    names = lambda: sorted(path.name[5:13] for path in tmp_path.iterdir())  # noqa: E731
    guard.watch(row(1, 3.0), model)
    guard.saved(1)
    guard.watch({"step": 2}, model)
    guard.watch(row(3, 2.0), model)
    guard.watch(row(4, 1.0), model)
    assert names() == ["00000001", "00000004"], "a run resumed from the state needs step 1"
    guard.saved(4)
    assert names() == ["00000004"]
    again = Guard(tmp_path, "validation_ce", 2)
    again.replay(json.loads(json.dumps([row(1, 3.0), row(4, 1.0), row(5, 1.5)])))
    assert (again.best, again.is_over) == (row(4, 1.0), False)
    again.watch(row(6, 1.0), model)
    assert again.is_over, "as good is not better"


def test_without_a_finite_loss_the_last_weights_stay(tmp_path):
    model, guard = torch.nn.Linear(2, 2), Guard(tmp_path, "validation_ce", 1)
    before = model.weight.clone()
    guard.watch(row(1, float("nan")), model)
    guard.load_best(model)
    assert guard.is_over and guard.best is None and torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.validate_every_steps": 0}, "set validate_every_steps"),
        ({"training.keep_best": None, "training.patience": 2}, "patience needs keep_best"),
        ({"training.patience": 0}, "patience must be at least 1"),
        ({"num_validation": 0}, "keep_best needs held-out traces"),
        ({"training.keep_best": "kd"}, "keep_best kd needs teacher.model"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        overfit(**changes)


def test_every_state_that_is_kept_keeps_its_best_weights(tmp_path):
    model, guard = torch.nn.Linear(2, 2), Guard(tmp_path, "validation_ce", None)
    for step, value in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 1.0)):
        guard.watch(row(step, value), model)
        if step in (1, 3):
            guard.saved(step)
            (tmp_path / f"state-{step:08d}").mkdir()
    best = {int(path.stem.removeprefix("best-")) for path in tmp_path.glob("best-*")}
    assert best == {1, 2, 4}
    (tmp_path / "state-00000001").rmdir()
    guard.saved(4)
    assert {int(path.stem.removeprefix("best-")) for path in tmp_path.glob("best-*")} == {2, 4}
