"""A teacher's distribution through the student's frozen head is worth the whole vocabulary, in value and gradient."""

import dataclasses

import pytest
import torch
from tiny_runs import run_config, save_model

from limbeck.config import config_hash
from limbeck.distill import caching, train
from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.fused import fused_loss
from limbeck.errors import ConfigError, PairError
from limbeck.models.anatomy import Head
from limbeck.teacher import DenseTargets, ProjectedTargets
from limbeck.teacher.cache import CacheConfig, Spec
from limbeck.teacher.projected import decode, encode, project

ROWS, VOCAB, WIDTH = 7, 19, 5
FORWARD_KL = DivergenceConfig()


def problem(temperature=1.0, with_ce=False, bias=True):
    """Inputs of the loss, the teacher dense, and what is projected of it."""
    torch.manual_seed(3)
    double = {"dtype": torch.float64}
    head = Head(torch.randn(VOCAB, WIDTH, **double), torch.randn(VOCAB, **double) if bias else None, None)
    dense = DenseTargets(torch.randn(ROWS, 6, **double), torch.randn(VOCAB, 6, **double))
    log_probs = (dense.logits() / temperature).log_softmax(-1)
    given = {
        "hidden": torch.randn(ROWS, WIDTH, **double),
        "head_weight": head.weight,
        "head_bias": head.bias,
        "labels": torch.randint(VOCAB, (ROWS,)),
        "ce_coef": torch.rand(ROWS, **double) * with_ce,
        "kd_coef": torch.rand(ROWS, **double).index_fill(0, torch.tensor([2]), 0.0),
        "divergence": FORWARD_KL,
        "temperature": temperature,
    }
    return given, dense, ProjectedTargets(*project(log_probs, head, temperature), temperature)


def solve(given, targets, **changes):
    hidden = given["hidden"].clone().requires_grad_()
    loss = fused_loss(**given | {"hidden": hidden, "targets": targets} | changes)
    loss.total.backward()
    return loss, hidden.grad


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("with_ce", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_are_those_of_the_whole_vocabulary(temperature, with_ce, bias):
    given, dense, projected = problem(temperature, with_ce, bias)
    for chunk_bytes in (10**6, 400):
        (exact, gradient), (found, ours) = (solve(given, t, chunk_bytes=chunk_bytes) for t in (dense, projected))
        torch.testing.assert_close(found.total, exact.total, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.kd_sum, exact.kd_sum, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours, gradient, rtol=1e-11, atol=1e-12)


def test_rows_without_a_kd_term_are_not_read():
    given, dense, projected = problem()
    blank = given["kd_coef"] == 0
    broken = dataclasses.replace(projected, mean_rows=projected.mean_rows.masked_fill(blank[:, None], torch.nan))
    torch.testing.assert_close(solve(given, broken)[1], solve(given, dense)[1], rtol=1e-11, atol=1e-12)


def test_a_head_that_trains_and_other_divergences_are_refused():
    given, _, projected = problem()
    with pytest.raises(ConfigError, match="a head that is not trained"):
        solve(given, projected, head_weight=given["head_weight"].clone().requires_grad_())
    with pytest.raises(ConfigError, match="reverse_kl"):
        solve(given, projected, divergence=DivergenceConfig(name="reverse_kl"))
    with pytest.raises(ConfigError, match=r"temperature 1 and .*temperature 2"):
        solve(given, projected, temperature=2.0)


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-6), ("bf16", 4e-3), ("int8", 5e-3)])
def test_a_record_gives_back_what_was_stored(precision, bound):
    mean_rows, constants = torch.randn(4, 33), torch.randn(4)
    found, numbers = decode(encode(mean_rows, constants, precision), 4, precision)
    assert torch.equal(numbers, constants)
    assert float((found - mean_rows).abs().max()) <= bound * float(mean_rows.abs().max())


def test_caches_of_other_modes_keep_their_identity():
    spec = Spec("tiny", "abc", 49, 32, "float32", CacheConfig())
    before = {
        "teacher": "",
        "teacher_hash": "abc",
        "vocab_size": 49,
        "hidden_size": 32,
        "dtype": "float32",
        "config": {"mode": "top_k", "top_k": 128, "min_probability": 9e-4, "num_samples": 50},
    }
    assert spec.identity == config_hash(before)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return [save_model(tmp_path_factory.mktemp(role), sharpness=30.0, seed=seed) for seed, role in enumerate("st")]


def write(pair, out, **changes):
    traces = run_config({"student.model": pair[0]}).traces
    cache = CacheConfig(mode="projected", student=pair[0], **changes)
    return caching.run(caching.CacheStageConfig(teacher=pair[1], traces=traces, cache=cache), out)


def train_on(pair, out, **changes):
    settings = {"student.model": pair[0], "student.train_head": False, "training.max_steps": 3, **changes}
    return train.run(run_config(settings), out)


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("bf16", 5e-3), ("int8", 5e-3)])
def test_a_run_on_the_cache_ends_as_one_with_the_live_teacher(pair, tmp_path, precision, bound):
    cache = write(pair, tmp_path / "cache", precision=precision)
    assert cache.metrics["rounding_error"] <= bound
    live = train_on(pair, tmp_path / "live", **{"teacher.model": pair[1]})
    stored = train_on(pair, tmp_path / "stored", **{"teacher.cache": str(cache.path)})
    theirs, ours = (dict(run.load()[0].named_parameters()) for run in (live, stored))
    head = "lm_head.weight" if "lm_head.weight" in ours else "model.embed_tokens.weight"
    assert torch.equal(ours[head], theirs[head])
    moved = sum(float((ours[name] - theirs[name]).detach().abs().max()) for name in ours)
    assert moved <= 2e-2 * (bound / 1e-5) ** 0.5
    assert stored.cost["flops"]["teacher"] == 0


def test_runs_that_would_be_wrong_are_refused_before_they_start(pair, tmp_path):
    cache = {"teacher.cache": str(write(pair, tmp_path / "cache").path)}
    with pytest.raises(ConfigError, match=r"student\.train_head false"):
        train_on(pair, tmp_path / "a", **cache, **{"student.train_head": True})
    with pytest.raises(ConfigError, match="jsd at 1"):
        train_on(pair, tmp_path / "b", **cache, **{"loss.divergence.name": "jsd"})
    with pytest.raises(ConfigError, match="forward_kl at 2"):
        train_on(pair, tmp_path / "c", **cache, **{"loss.temperature": 2.0})
    with pytest.raises(PairError, match="the student's is another"):
        train_on([pair[1], pair[1]], tmp_path / "d", **cache)
    with pytest.raises(ConfigError, match="needs one"):
        CacheConfig(mode="projected")
    with pytest.raises(ConfigError, match="needs one"):
        CacheConfig(student="tiny-student")
