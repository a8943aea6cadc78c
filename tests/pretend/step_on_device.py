"""Training on the pretend device: every kind of run gives what the CPU gives, and a step keeps to its budgets."""

import json

import pytest
import torch
from device_contracts import DIVERGENCES, RUNS, config_of, losses, save_models
from pretend.device import COUNTS, DEVICE, Mixed
from tiny_runs import run_config, save_model

from limbeck.distill import train
from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.fused import fused_loss
from limbeck.distill.rows import Terms
from limbeck.errors import LimbeckError
from limbeck.placement import asking
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.topk import TopKTargets

LAYERS = 10
MOST_LAUNCHES = 80
"""A layer of student and teacher together, forward and backward, all else of the step shared out."""
MOST_BYTES = 24
"""Of an entry of [rows, V]."""
SAMPLE = ("grouped queries", "bf16", "norms of heads", "two teachers", "divergence jsd", "its own texts")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow, id=n) for n in RUNS])
def test_a_run_is_that_of_the_cpu(models, name, tmp_path):
    config = config_of(models, RUNS[name])
    COUNTS.clear()
    found = losses(config, tmp_path / "device", "cuda")
    assert COUNTS.total_launches > 500, "the device was not used"
    on_cpu = losses(config, tmp_path / "cpu", "cpu")
    # Noise comes from each device's own generator, and rounding ends some texts elsewhere.
    is_free = "bf16" in name or "own texts" in name or "asgld" in name
    assert found == pytest.approx(on_cpu, rel=0.1 if is_free else 2e-4)
    machine = json.loads((tmp_path / "device" / "limbeck.json").read_text())["machine"]
    assert machine["device"] == "cuda:0" and machine["accelerators"][0]["name"] == "Pretend"


def counted_steps(config, out, monkeypatch):
    """(launches, waits by place) of each step but the first, which finds out what the device can do."""
    found, whole = [], train._step

    def step(setup, number):
        COUNTS.clear()
        done = whole(setup, number)
        # The numbers of this step are read when the next is under way.
        done.numbers.read()
        found.append((COUNTS.total_launches, dict(COUNTS.waits)))
        return done

    monkeypatch.setattr(train, "_step", step)
    train.run(config, out)
    return found[1:]


@pytest.mark.parametrize("source", ["live", "cache"])
def test_a_step_waits_once_and_launches_little(tmp_path, monkeypatch, source):
    with asking("cpu"):
        shape = {"num_layers": LAYERS, "num_heads": 4, "kv_heads": 2}
        name = save_model(tmp_path / "model", sharpness=8.0, **shape)
    changes = {"student.model": name, "teacher.model": name, "training.max_steps": 4, "training.batch_size": 6}
    if source == "cache":
        from limbeck.distill import caching
        from limbeck.distill.caching import CacheStageConfig

        traces = run_config(changes).traces
        caching.run(CacheStageConfig(teacher=name, traces=traces), tmp_path / "cache")
        changes = {
            **{k: v for k, v in changes.items() if k != "teacher.model"},
            "teacher.cache": str(tmp_path / "cache"),
        }
    for launches, waits in counted_steps(run_config(changes), tmp_path / "out", monkeypatch):
        assert sum(waits.values()) <= 1, waits
        assert launches <= MOST_LAUNCHES * LAYERS, (launches, COUNTS.launches.most_common(30))


def test_a_step_that_is_not_finite_changes_nothing_and_ends_the_run(models, tmp_path, monkeypatch):
    config, kept, whole = config_of(models, {"training.max_steps": 3}), {}, train._update

    def update(setup, number, work, losses):
        parameter = next(setup.student.model.parameters())
        if number == 1:
            parameter.grad.fill_(float("nan"))
            kept["before"] = parameter.detach().cpu().clone()
        done = whole(setup, number, work, losses)
        kept["after"] = parameter.detach().cpu().clone()
        return done

    monkeypatch.setattr(train, "_update", update)
    with pytest.raises(LimbeckError, match=r"step 2: the loss is .* and the gradient norm nan"):
        train.run(config, tmp_path / "out")
    torch.testing.assert_close(kept["after"], kept["before"], rtol=0, atol=0)


def loss_bytes(divergence, topk=None, ce=0.5, kd=0.5):
    """Bytes of an entry of the student's logits that the fused loss moves."""
    rows, vocab, width = 64, 3000, 48
    random = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, generator=random)

    labels = torch.randint(0, vocab, (rows,), generator=random)
    targets = DenseTargets(made(rows, width).to(DEVICE), made(vocab, width).to(DEVICE))
    if topk:
        values, ids = made(rows, vocab).log_softmax(-1).topk(topk)
        targets = TopKTargets(ids.to(DEVICE), values.to(DEVICE), torch.log1p(-values.exp().sum(-1)).to(DEVICE))
    hidden, head = (made(*shape).to(DEVICE).requires_grad_() for shape in ((rows, width), (vocab, width)))
    coefs = {"ce_coef": torch.full((rows,), ce / rows).to(DEVICE), "kd_coef": torch.full((rows,), kd / rows).to(DEVICE)}
    given = (hidden, head, labels.to(DEVICE))
    COUNTS.clear()
    with torch.autocast("cuda", torch.bfloat16):
        loss = fused_loss(
            *given, **coefs, targets=targets, divergence=DivergenceConfig(name=divergence), terms=Terms(ce > 0, kd > 0)
        )
    loss.total.backward()
    assert COUNTS.total_waits == 0, COUNTS.waits
    return sum(COUNTS.bytes_over(shape) for shape in ((rows, vocab), (vocab, rows))) / (rows * vocab)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bytes_of_the_loss(divergence):
    assert 10 <= loss_bytes(divergence) <= (18 if divergence in ("forward_kl", "reverse_kl", "combined_kl") else 22)


def test_bytes_of_the_loss_without_a_dense_teacher():
    assert loss_bytes("forward_kl", topk=50) <= MOST_BYTES
    assert loss_bytes("forward_kl", ce=1.0, kd=0.0) <= 14


def test_the_device_refuses_tensors_of_the_host():
    with pytest.raises(Mixed, match="same device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)
    assert (torch.ones(3, device=DEVICE) + torch.tensor(1.0)).device == DEVICE
