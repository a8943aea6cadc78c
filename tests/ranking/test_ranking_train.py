"""Training scorers: the loss at the label token, whole requests together, exact under any split, resumable."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_models import made_model
from tiny_runs import SHAPE, assert_same_bits

from limbeck.checkpoint import Checkpoint
from limbeck.config import build
from limbeck.distill import train as loop
from limbeck.distill.config import TrainingConfig
from limbeck.distill.microbatch import MicroBatch, StepLoss, step_totals
from limbeck.distill.parallel import Ranks
from limbeck.errors import CheckpointError, ConfigError
from limbeck.flags import set_field
from limbeck.ledger import Ledger, flop_counter
from limbeck.models.anatomy import causal_lm_of, head_of
from limbeck.models.load import load_tokenizer
from limbeck.ranking import train
from limbeck.ranking.evaluate import RankEvaluateConfig
from limbeck.ranking.examples import plan_requests
from limbeck.ranking.featurize import EncodedRequest
from limbeck.ranking.objective import RankingObjective
from limbeck.ranking.train import RankTrainConfig
from limbeck.stage import How
from limbeck.traces.batch import collate

ALONE = Ranks(0, 1, torch.device("cpu"))


def config(changes=None):
    tree = {
        "student": {"scratch": {**SHAPE, "seed": 1}},
        "data": {"source": "synthetic", "synthetic": {"requests": 20, "candidates": 3, "history": 1, "topics": 2}},
        "vocabulary_tokens": 300,
        "training": {"batch_size": 4, "max_steps": 3, "save_every_steps": 1},
        "optimizer": {"learning_rate": 1e-3},
    }
    for path, value in (changes or {}).items():
        set_field(RankTrainConfig, tree, path, value, flag=path)
        if path == "student.model":
            tree["student"].pop("scratch", None)
    return build(RankTrainConfig, tree)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher with spread logits, and the tokenizer of its texts."""
    out = tmp_path_factory.mktemp("teacher") / "out"
    run = config({"student.scratch": {**SHAPE, "hidden_size": 24, "seed": 3}, "optimizer.learning_rate": 0.02})
    train.run(run, out)
    return str(out)


def with_teacher(teacher, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return config({"teacher.model": teacher, "loss.kd_ratio": 0.7, "loss.temperature": 2.0, **changes})


def gradients(run, groups=None):
    """Loss, gradients and ledger of one step over the first six requests, in micro-batches of the given requests."""
    setup, _ = train.set_up(run, ALONE)
    sizes = 3
    everything = setup.data.train[: 6 * sizes]
    wanted = StepLoss(run.loss, run.kd_ratio, step_totals(everything, run.loss.normalization))
    student, value, ledger = setup.student, 0.0, Ledger()
    student.model.train()
    with flop_counter() as counter:
        for group in groups or [range(6)]:
            examples = [everything[i * sizes + n] for i in group for n in range(sizes)]
            batch = collate(examples, run.training.layout, student.tokenizer.pad_token_id)
            loss = setup.objective(MicroBatch(student, setup.teacher, batch, examples, wanted, ledger))
            loss.total.backward()
            value += float(loss.ce_sum + loss.kd_sum)
    found = {name: p.grad for name, p in setup.student.model.named_parameters()}
    return value, found, ledger, counter.get_total_flops(), setup


@pytest.mark.parametrize("support", ["labels", "vocabulary"])
@pytest.mark.parametrize(("listwise", "order"), [(0.0, 0.0), (0.4, 0.5), (1.0, 1.0)])
def test_any_split_of_whole_requests_and_any_layout_give_the_same_gradient(teacher, support, listwise, order):
    terms = {"ranking__listwise_ratio": listwise, "ranking__order": "ranknet", "ranking__order_ratio": order}
    run = with_teacher(teacher, ranking__support=support, **terms)
    value, expected, ledger, _, _ = gradients(run)
    for groups, layout in (([[0, 3], [5], [1, 2, 4]], "packed"), ([[i] for i in range(6)], "padded")):
        other = replace(run, training=replace(run.training, layout=layout))
        split_value, found, split_ledger, _, _ = gradients(other, groups)
        assert split_value == pytest.approx(value, rel=1e-5)
        assert split_ledger.counts["supervised_tokens"] == ledger.counts["supervised_tokens"] == 18
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("listwise", [0.0, 0.4])
def test_the_loss_is_what_the_formula_says(teacher, listwise):
    run = with_teacher(teacher, ranking__listwise_ratio=listwise)
    value, _, _, _, setup = gradients(run)
    labels = setup.objective.labels
    ce, pair, request = [], [], []
    for number in range(6):
        logits = []
        for example in setup.data.train[number * 3 : number * 3 + 3]:
            ids = torch.from_numpy(example.sample.input_ids[:-1].astype(np.int64))[None]
            with torch.no_grad():
                hidden = [
                    causal_lm_of(m).model(ids, sequence_lengths=(ids.shape[1],)).last_hidden_state[0, -1]
                    for m in (setup.student.model.eval(), setup.teacher.model)
                ]
                both = [
                    h @ head_of(m).weight[list(labels)].T
                    for h, m in zip(hidden, (setup.student.model, setup.teacher.model), strict=True)
                ]
            logits.append(both)
            is_yes = example.sample.input_ids[-1] == labels.yes
            ce.append(-torch.log_softmax(both[0], -1)[0 if is_yes else 1])
            pair.append(kl(both[1] / 2, both[0] / 2))
        scores, theirs = (torch.stack([z[side][0] - z[side][1] for z in logits]) for side in (0, 1))
        request.append(kl(theirs / 2, scores / 2))
    pair_term, request_term = torch.stack(pair).mean(), torch.stack(request).mean()
    expected = 0.3 * torch.stack(ce).mean() + 0.7 * 4 * ((1 - listwise) * pair_term + listwise * request_term)
    assert value == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("support", ["labels", "vocabulary"])
def test_a_mixture_of_experts_teaches(teacher, support, tmp_path):
    tokenizer = load_tokenizer(teacher)
    mixture = made_model("mixtral", vocab_size=len(tokenizer), max_position_embeddings=1024)
    mixture.save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    changes = {"ranking__support": support, "loss__kd_ratio": 1.0}
    run = with_teacher(str(tmp_path / "mixture"), **changes)
    value, found, ledger, _, setup = gradients(run)
    rows = list(setup.objective.labels) if support == "labels" else list(range(len(tokenizer)))
    expected = []
    for example in setup.data.train[:18]:
        ids = torch.from_numpy(example.sample.input_ids[:-1].astype(np.int64))[None]
        with torch.no_grad():
            theirs = mixture(ids).logits[0, -1, rows]
            ours = causal_lm_of(setup.student.model.eval())(ids, sequence_lengths=(ids.shape[1],)).logits[0, -1, rows]
        expected.append(4 * kl(theirs / 2, ours / 2))
    assert value == pytest.approx(float(torch.stack(expected).mean()), rel=1e-3)
    assert ledger.flops["teacher"] > 0 and found["model.embed_tokens.weight"].abs().sum() > 0
    assert train.run(run, tmp_path / "out").metrics["loss"] > 0


def kl(teacher_logits, logits):
    log_t, log_s = torch.log_softmax(teacher_logits, -1), torch.log_softmax(logits, -1)
    return (log_t.exp() * (log_t - log_s)).sum()


@pytest.mark.parametrize("support", ["labels", "vocabulary"])
@pytest.mark.parametrize("listwise", [0.0, 0.5, 1.0])
def test_flops_are_those_that_torch_counts(teacher, support, listwise):
    _, _, ledger, counted, _ = gradients(
        with_teacher(teacher, ranking__support=support, ranking__listwise_ratio=listwise)
    )
    assert sum(ledger.flops.values()) == pytest.approx(counted, rel=0.002)


def test_only_label_rows_are_trained_beside_the_embeddings_that_are_read(teacher):
    _, found, _, _, setup = gradients(with_teacher(teacher))
    read = {int(i) for e in setup.data.train[:18] for i in e.sample.input_ids[:-1]} | set(setup.objective.labels)
    moved = {int(i) for i in torch.nonzero(found["model.embed_tokens.weight"].abs().sum(1))[:, 0]}
    assert moved <= read and set(setup.objective.labels) <= moved


def test_steps_hold_whole_requests():
    sizes = [1, 4, 2, 3, 5, 1, 2]
    requests = [
        EncodedRequest(str(i), np.zeros(3, np.int32), (np.zeros(2, np.int32),) * n, np.zeros(n, bool))
        for i, n in enumerate(sizes)
    ]
    owner = np.repeat(np.arange(7), sizes)
    for batch_size, microbatch_tokens, world_size in itertools.product((1, 3), (1, 20, 4096), (1, 2)):
        training = TrainingConfig(batch_size=batch_size, microbatch_tokens=microbatch_tokens, epochs=2)
        steps = plan_requests(requests, training, world_size)
        for step in steps:
            assert len(step.microbatches) == world_size
            groups = [group for rank in step.microbatches for group in rank]
            for group in groups:
                for request in set(owner[list(group)]):
                    assert [i for i in group if owner[i] == request] == np.flatnonzero(owner == request).tolist()
                if microbatch_tokens == 1:
                    assert len(set(owner[list(group)])) == 1
            members = [i for group in groups for i in group]
            assert len(members) == len(set(members)) and len(set(owner[members])) <= batch_size
        assert sum(len(step.indices) for step in steps) == 2 * sum(sizes)


def test_training_lowers_the_loss_and_writes_a_checkpoint(tmp_path):
    out = tmp_path / "out"
    result = train.run(config({"training.max_steps": 25, "optimizer.learning_rate": 0.01}), out).metrics
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([row["loss"] for row in rows[-5:]]) < rows[0]["loss"] - 0.02
    manifest = Checkpoint(out).manifest
    assert manifest["stage"] == "rank train" and manifest["counts"]["best_auc"]["validation"] > 0.6
    assert result["validation_auc_low"] <= result["validation_auc"] <= result["validation_auc_high"]
    # Six epochs of 14 requests in 4 steps each, one step more, and 3 candidates a request.
    assert manifest["ledger"]["supervised_tokens"] == manifest["ledger"]["sequences"] == (6 * 14 + 4) * 3
    audit = manifest["ledger"]["flops_audit"]
    assert audit["formula_flops"] == pytest.approx(audit["counted_flops"], rel=0.002)
    assert build(RankEvaluateConfig, {"model": str(out)}).data == config().data


class PulledPlug(BaseException):
    pass


def test_resumed_is_the_same_run_and_another_loss_is_refused(teacher, tmp_path, monkeypatch):
    run = with_teacher(teacher, ranking__listwise_ratio=0.5)
    train.run(run, tmp_path / "whole")
    whole_step = loop._step

    def step(setup, number):
        if number == 2:
            raise PulledPlug
        return whole_step(setup, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", step)
        with pytest.raises(PulledPlug):
            train.run(run, tmp_path / "out")
    with pytest.raises(CheckpointError, match="another config"):
        train.run(with_teacher(teacher, ranking__listwise_ratio=0.6), tmp_path / "out", how=How(resume=True))
    train.run(run, tmp_path / "out", how=How(resume=True))
    assert_same_bits(tmp_path / "out", tmp_path / "whole")


def test_the_best_held_out_weights_are_kept(teacher, tmp_path):
    run = with_teacher(teacher, training__keep_best="kd", training__validate_every_steps=1, ranking__listwise_ratio=0.5)
    result = train.run(run, tmp_path / "out").metrics
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert result["validation_kd"] <= min(row["validation_kd"] for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranking.listwise_ratio": 0.5}, "name a teacher"),
        ({"ranking.listwise_ratio": 2}, r"in \[0, 1\]"),
        ({"loss.kd_ratio": 0.5}, "needs teacher"),
        ({"vocabulary_tokens": 10}, "at least 300"),
        (
            {"data.split.validation_fraction": 0, "training.keep_best": "ce", "training.validate_every_steps": 1},
            "held-out requests",
        ),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(changes)


def test_pairs_that_are_too_long_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="longer than the student's 20 positions"):
        train.run(config({"student.scratch.max_positions": 20}), tmp_path / "out")


def test_the_objective_of_a_step_without_a_teacher_is_cross_entropy(tmp_path):
    value, _, _, _, setup = gradients(config())
    assert isinstance(setup.objective, RankingObjective)
    assert 0 < value < 2 and setup.teacher is None


def test_training_rows_of_one_label_are_told(capsys):
    requests = [SimpleNamespace(candidates=(SimpleNamespace(label=False), SimpleNamespace(label=False)))] * 3
    train._tell_one_sided(requests)
    assert "all 6 training rows are negative; without a positive one" in " ".join(capsys.readouterr().err.split())
    requests[0] = SimpleNamespace(candidates=(SimpleNamespace(label=True), SimpleNamespace(label=False)))
    train._tell_one_sided(requests)
    assert capsys.readouterr().err == ""
