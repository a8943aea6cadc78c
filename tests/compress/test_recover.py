"""Recovery: rounds end at the one-shot size with equal tokens, zeros survive, and a kill anywhere changes nothing."""

import json
import random
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import SHAPE, save_model, start

from limbeck.checkpoint import MANIFEST, Checkpoint
from limbeck.cli import main
from limbeck.compress import recover, turns
from limbeck.compress.calibrate import CalibrationConfig, calibration_rows
from limbeck.compress.masks import read_masks
from limbeck.compress.prune import stage as prune
from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.recover import RecoverConfig
from limbeck.compress.rounds import plan_rounds, round_patterns, round_shapes
from limbeck.config import build, to_dict
from limbeck.distill import train
from limbeck.distill.config import StudentConfig
from limbeck.distill.data import prepare
from limbeck.errors import CheckpointError, ConfigError
from limbeck.models.load import load_model, load_tokenizer
from limbeck.stage import How

TRACES = {"source": "builtin:chain", "num_traces": 24, "chain_min_steps": 1, "chain_max_steps": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose layers weigh enough that removing some of them shows in what it predicts."""
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, sharpness=5.0, kv_heads=2, num_heads=4, num_layers=3, vocab_size=49)
    weights = load_file(directory / "model.safetensors")
    louder = {name: tensor * 10 if "_proj" in name else tensor for name, tensor in weights.items()}
    save_file(louder, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


def recipe(model, rounds=1, distill=None, **cut):
    return {
        "prune": {"model": model, "gate": {"sequences": 0}, **({} if "method" in cut else {"multiple_of": 4}), **cut},
        "distill": {
            "traces": TRACES,
            "num_validation": 6,
            "loss": {"kd_ratio": 1.0},
            "training": {"batch_size": 3, "max_steps": 6, "save_every_steps": 1},
            "optimizer": {"learning_rate": 1e-3},
            **(distill or {}),
        },
        "rounds": rounds,
    }


def config(model, rounds=1, distill=None, **cut):
    return build(RecoverConfig, recipe(model, rounds, distill, **cut))


def weights_of(out):
    return {name: tensor for file in sorted(out.glob("model*.safetensors")) for name, tensor in load_file(file).items()}


def test_the_model_is_named_once(model):
    found = config(model, pattern="0.5")
    assert found.distill.student.model == found.distill.teacher.model == model
    assert found.prune.calibration.traces == found.distill.traces
    tree = recipe(model)
    tree["distill"]["teacher"] = {"model": "tiny-teacher"}
    tree["prune"]["calibration"] = {"text": "some.txt"}
    given = build(RecoverConfig, tree)
    assert given.distill.teacher.model == "tiny-teacher" and given.prune.calibration.traces is None
    assert build(RecoverConfig, to_dict(found)) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"distill": {"student": {"model": "tiny-student"}}}, r"recovery trains prune.model .*leave the student out"),
        ({"distill": {"student": {"scratch": SHAPE}}}, "exactly one of model and scratch"),
        ({"moments": "there", "rounds": 2}, "prune.moments are those of the unpruned model"),
        ({"method": "magnitude", "distill": {"lora": {"rank": 2}}}, "merging adapters fills the zeros"),
        ({"method": "magnitude", "pattern": "2:4", "rounds": 3}, "use 1 to 2 rounds"),
        ({"method": "magnitude", "pattern": "0.1", "rounds": 3}, "fewer than 5% zeros"),
    ],
)
def test_what_cannot_work_is_refused(model, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(model, **changes)


@pytest.mark.parametrize(
    ("pattern", "rounds", "expected"),
    [
        ("0.6", 1, ["0.6"]),
        ("0.6", 3, [0.2, 0.4, 0.6]),
        ("2:4", 1, ["2:4"]),
        ("2:4", 2, ["3:4", "2:4"]),
        ("4:8", 2, ["6:8", "4:8"]),
        ("1:8", 3, ["6:8", "3:8", "1:8"]),
    ],
)
def test_patterns_grow_evenly(pattern, rounds, expected):
    found = round_patterns(pattern, rounds)
    assert found[-1] == pattern
    assert [p if ":" in p else float(p) for p in found] == [
        p if isinstance(p, str) and ":" in p else pytest.approx(float(p)) for p in expected
    ]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_shapes_end_where_one_cut_ends(model, rounds):
    cut = PruneConfig(model=model, neuron_sparsity=0.6, kv_group_sparsity=0.5, drop_layers=2, multiple_of=4)
    shapes = round_shapes(cut, load_model(model).config, rounds)
    assert len(shapes) == rounds + 1
    sizes = [(shape.neurons, shape.kv_groups, len(shape.layers)) for shape in shapes]
    assert sizes[0] == (32, 2, 3) and sizes[-1] == (12, 1, 1)
    assert sizes == sorted(sizes, reverse=True)


def test_a_round_that_removes_nothing_is_refused(model):
    found = config(model, 3, neuron_sparsity=0.25, multiple_of=8)
    with pytest.raises(ConfigError, match=r"round \d of 3 would remove nothing .*use fewer rounds"):
        plan_rounds(found.prune, found.distill, found.rounds)


@pytest.mark.parametrize("budget", [{"max_steps": 7}, {"max_steps": None, "epochs": 2.5}, {"max_tokens": 2000}])
def test_tokens_are_equal_whatever_the_rounds(model, budget):
    one, three = (
        config(model, rounds, {"training": {"batch_size": 2, **budget}}, neuron_sparsity=0.5) for rounds in (1, 3)
    )
    data = prepare(one.distill, load_tokenizer(model))

    def tokens(found):
        planned = plan_rounds(found.prune, found.distill, found.rounds)
        steps = [step for r in planned for step in train.planned_steps(r.training, data)]
        return sum(len(data.train[i]) for step in steps for i in step.indices), planned

    (whole, _), (split, rounds) = tokens(one), tokens(three)
    longest = 2 * max(map(len, data.train))
    assert whole <= split < whole + longest
    shares = [r.training.training.max_tokens for r in rounds]
    assert max(shares) - min(shares) <= 2 * longest and len({r.training.training.seed for r in rounds}) == 3


@pytest.fixture(scope="module")
def gradual(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("gradual") / "out"
    longer = {"training": {"batch_size": 3, "max_steps": 60}, "optimizer": {"learning_rate": 3e-3}}
    metrics = recover.run(config(model, 2, longer, neuron_sparsity=0.5, kv_group_sparsity=0.5), out).metrics
    return out, metrics


def test_gradual_structured_recovery(model, gradual, tmp_path):
    out, metrics = gradual
    smaller = load_model(str(out))
    assert (smaller.config.intermediate_size, smaller.config.num_key_value_heads) == (16, 1)
    once = PruneConfig(
        model=model,
        neuron_sparsity=0.5,
        kv_group_sparsity=0.5,
        multiple_of=4,
        calibration=config(model).prune.calibration,
    )
    pruned_once = prune.run(once, tmp_path / "once").metrics
    assert metrics["parameters"] == pruned_once["parameters"] == sum(p.numel() for p in smaller.parameters())
    first, second = metrics["rounds"]
    assert first["neurons"] == [32, 24] and second["neurons"] == [24, 16]
    assert metrics["unpruned"]["kl"] == pytest.approx(0, abs=1e-6)
    assert second["recovered"] == {"ce": metrics["validation_ce"], "kl": metrics["validation_kl"]}
    for record in (first, second):
        assert record["recovered"]["kl"] < record["pruned"]["kl"]
        assert record["tokens"] > 0 and record["flops"] > 0 and record["train_seconds"] > 0
    manifest = Checkpoint(out).manifest
    assert manifest["stage"] == "recover" and manifest["metrics"] == metrics
    assert manifest["ledger"]["tokens"] == first["tokens"] + second["tokens"]
    assert manifest["ledger"]["flops"]["total"] == first["flops"] + second["flops"]
    measured = recover.DistilledBack(config(model)).measure(str(out))
    assert measured["kl"] == pytest.approx(metrics["validation_kl"], rel=1e-5)
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert not list(out.glob("state*")) and not list(out.glob("unpruned*"))


def test_the_output_says_what_it_was_calibrated_on(gradual):
    out, _ = gradual
    rows = calibration_rows(CalibrationConfig(sequences=4), load_tokenizer(str(out)), str(out))
    assert len(rows.input_ids) == 4


def test_one_round_is_pruning_then_distilling(model, tmp_path):
    found = config(model, 1, neuron_sparsity=0.5)
    recover.run(found, tmp_path / "out")
    prune.run(found.prune, tmp_path / "pruned")
    student = StudentConfig(model=str(tmp_path / "pruned"))
    train.run(replace(found.distill, student=student), tmp_path / "trained")
    ours, theirs = weights_of(tmp_path / "out"), weights_of(tmp_path / "trained")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("pattern", "rounds"), [("2:4", 2), ("0.6", 2)])
def test_zeros_survive(model, tmp_path, pattern, rounds):
    metrics = recover.run(config(model, rounds, method="wanda", pattern=pattern), tmp_path / "out").metrics
    weights, masks = weights_of(tmp_path / "out"), read_masks(tmp_path / "out")
    before = weights_of(tmp_path / "out" / f"round-{rounds}" / "pruned")
    assert len(masks) == 3 * 7
    for name, mask in masks.items():
        assert torch.equal(weights[name] != 0, mask), name
        assert not torch.equal(weights[name], before[name]), f"{name} has not trained"
        if pattern == "2:4":
            assert bool((mask.view(-1, 4).sum(-1) == 2).all())
    shares = [record["sparsity"] for record in metrics["rounds"]]
    assert shares == pytest.approx([0.25, 0.5] if pattern == "2:4" else [0.3, 0.6], abs=0.02)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "out").glob("model-*.safetensors")}
    load_model(str(tmp_path / "out"))


class PulledPlug(BaseException):
    """Stands for a kill."""


PLACES = ["prune", "first step", "later step", "held out", "second prune", "second step", "moving", "manifest"]


def pull(patch, place):
    """Stop at a place of the second or first round."""
    counts = {}

    def at(module, name, wanted):
        whole = getattr(module, name)

        def interrupted(*arguments, **named):
            counts[name] = counts.get(name, 0) + 1
            if counts[name] == wanted:
                raise PulledPlug
            return whole(*arguments, **named)

        patch.setattr(module, name, interrupted)

    targets = {
        "prune": (prune, "run", 1),
        "first step": (train, "_step", 1),
        "later step": (train, "_step", 3),
        "held out": (recover.DistilledBack, "measure", 3),
        "second prune": (prune, "run", 2),
        "second step": (train, "_step", 5),
        "moving": (turns, "_add_mask", 1),
        "manifest": (turns, "write_manifest", 1),
    }
    at(*targets[place])


@pytest.fixture(scope="module")
def sparse(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse") / "out"
    recover.run(config(model, 2, method="wanda", pattern="0.5"), out)
    return out


@pytest.mark.parametrize("place", PLACES)
def test_interrupted_anywhere_it_goes_on_to_the_same_bits(model, sparse, tmp_path, monkeypatch, place):
    found, out = config(model, 2, method="wanda", pattern="0.5"), tmp_path / "out"
    with monkeypatch.context() as patch:
        pull(patch, place)
        with pytest.raises(PulledPlug):
            recover.run(found, out)
    assert not out.exists()
    finished = [path.parent for path in (tmp_path / "out.partial").glob(f"round-*/*/{MANIFEST}")]
    with monkeypatch.context() as patch:
        refuse_finished(patch, finished)
        recover.run(found, out, how=How(resume=True))
    ours, theirs = weights_of(out), weights_of(sparse)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    keys = ("parameters", "validation_ce", "validation_kl", "unpruned")
    mine, whole = (Checkpoint(path).manifest["metrics"] for path in (out, sparse))
    assert {key: mine[key] for key in keys} == {key: whole[key] for key in keys}
    assert [r["tokens"] for r in mine["rounds"]] == [r["tokens"] for r in whole["rounds"]]
    assert {path.name for path in out.iterdir()} == {path.name for path in sparse.iterdir()}


def refuse_finished(patch, finished):
    """What is finished must not be done again."""
    for module, place in ((prune, 1), (train, 1)):
        whole = module.run

        def checked(*arguments, whole=whole, place=place, **named):
            assert arguments[place] not in finished, f"{arguments[place]} is done again"
            return whole(*arguments, **named)

        patch.setattr(module, "run", checked)


def recover_in_process(tree, out, resume):
    """What a child process runs."""
    torch.set_num_threads(1)
    recover.run(build(RecoverConfig, tree), out, how=How(resume=resume))


def test_killed_at_random_moments_until_it_is_done(model, sparse, tmp_path):
    tree, out, rng = to_dict(config(model, 2, method="wanda", pattern="0.5")), tmp_path / "out", random.Random(1)
    for kill in range(4):
        child = start(recover_in_process, tree, out, kill > 0)
        written = {path for path in tmp_path.rglob("*") if path.is_dir()}
        while child.is_alive() and {path for path in tmp_path.rglob("*") if path.is_dir()} <= written:
            time.sleep(0.01)
        time.sleep(rng.random())
        child.kill()
        child.join()
    if not out.exists():
        recover.run(build(RecoverConfig, tree), out, how=How(resume=True))
    ours, theirs = weights_of(out), weights_of(sparse)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path.name for path in out.iterdir()} == {path.name for path in sparse.iterdir()}


def test_another_config_does_not_go_on(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        pull(patch, "first step")
        with pytest.raises(PulledPlug):
            recover.run(config(model, neuron_sparsity=0.5), tmp_path / "out")
    with pytest.raises(CheckpointError, match="has another config or model"):
        recover.run(config(model, neuron_sparsity=0.25), tmp_path / "out", how=How(resume=True))
    assert (tmp_path / "out.partial" / "round-1" / "pruned" / MANIFEST).exists()
    recover.run(config(model, neuron_sparsity=0.25), tmp_path / "out", how=How(overwrite=True))
    assert load_model(str(tmp_path / "out")).config.intermediate_size == 24


def test_command(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recover.yaml").write_text(json.dumps(recipe(model, 2, neuron_sparsity=0.5)))
    with pytest.raises(SystemExit) as ended:
        main(["recover", "recover.yaml", "--kd-ratio", "0", "--json"])
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["out"] == "runs/recover" and len(result["rounds"]) == 2
    assert load_model("runs/recover").config.intermediate_size == 16
    assert result["validation_kl"] > 0, "the divergence is measured, though nothing trains on it"
    with pytest.raises(SystemExit) as ended:
        main(["recover", "recover.yaml"])
    assert ended.value.code == 2 and "exists already" in capsys.readouterr().err
