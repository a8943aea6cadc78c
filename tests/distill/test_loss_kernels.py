"""The loss in Triton: interpreted on the CPU against the plain loss, and compiled for the accelerators in use."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from limbeck.distill import device_loss
from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.fused import fused_loss
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.topk import TopKTargets

pytest.importorskip("triton", reason="triton is not installed; make test-kernels brings it")

CONFIGS = [
    DivergenceConfig(name="forward_kl"),
    DivergenceConfig(name="reverse_kl"),
    DivergenceConfig(name="combined_kl", forward_ratio=0.3),
    DivergenceConfig(name="jsd", beta=0.2),
    DivergenceConfig(name="jsd", beta=0.0),
    DivergenceConfig(name="jsd", beta=1.0),
    DivergenceConfig(name="skew_kl", skew_alpha=0.1),
    DivergenceConfig(name="skew_reverse_kl", skew_alpha=0.3),
    DivergenceConfig(name="tvd"),
]
ROWS, WIDTH = 6, 16


def ids(config):
    return f"{config.name}-{config.beta}" if config.name == "jsd" else config.name


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run by Triton's interpreter, on tensors of the CPU, wherever the loss would take them on a device."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(
            "TRITON_INTERPRET=1 has to be set before triton is imported; there is a GPU, which conftest.py leaves to it"
        )
    module = importlib.import_module("limbeck.distill.kernels")
    monkeypatch.setattr(module, "BLOCK", 256)  # the vocabularies here have several parts
    monkeypatch.setattr(device_loss, "kernels", lambda: module)
    taken = []

    def takes(student, teacher, compute, part):
        taken.append(student.bias is None and student.softcap is None)
        return taken[-1]

    def use(is_used):
        monkeypatch.setattr(device_loss, "takes", takes if is_used else lambda *_: False)

    yield use
    assert any(taken)


def problem(vocab, common, seed=0, ce=True, kd=True):
    random = torch.Generator().manual_seed(seed)

    def made(*shape):
        return 0.7 * torch.randn(*shape, generator=random)

    coefs = [torch.rand(ROWS, generator=random) / ROWS * is_there for is_there in (ce, kd)]
    return {
        "hidden": made(ROWS, WIDTH),
        "head_weight": made(vocab, WIDTH),
        "labels": torch.randint(0, common, (ROWS,), generator=random),
        "ce_coef": coefs[0],
        "kd_coef": coefs[1],
        "targets": DenseTargets(made(ROWS, WIDTH), made(common, WIDTH)),
    }


def results(given, config, temperature):
    hidden, head = (given[name].clone().requires_grad_() for name in ("hidden", "head_weight"))
    loss = fused_loss(**given | {"hidden": hidden, "head_weight": head}, divergence=config, temperature=temperature)
    loss.total.backward()
    return loss, hidden.grad, head.grad


def assert_same(use, given, config, temperature=1.0):
    use(False)
    plain, *expected = results(given, config, temperature)
    use(True)
    found, *gradients = results(given, config, temperature)
    for name in ("ce_sum", "kd_sum"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(plain, name)), abs=2e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
@pytest.mark.parametrize(("vocab", "common", "temperature"), [(777, 777, 1.0), (700, 640, 2.0)])
def test_dense_targets(interpreted, config, vocab, common, temperature):
    assert_same(interpreted, problem(vocab, common), config, temperature)


@pytest.mark.parametrize("config", CONFIGS[:4], ids=ids)
def test_topk_targets(interpreted, config):
    given = problem(500, 500, 1)
    values, kept = torch.randn(ROWS, 500, generator=torch.Generator().manual_seed(2)).log_softmax(-1).topk(9)
    values[1, 5:] = -torch.inf  # a row with fewer entries
    tail = torch.log1p(-values.exp().sum(-1))
    labels = given["labels"].clone()
    labels[0] = kept[0, 3]  # one that is kept, others that are not
    assert_same(interpreted, given | {"targets": TopKTargets(kept, values, tail), "labels": labels}, config, 1.5)


@pytest.mark.parametrize(("ce", "kd"), [(True, False), (False, True)])
def test_one_term_alone(interpreted, ce, kd):
    assert_same(interpreted, problem(600, 600, 3, ce, kd), CONFIGS[0])


def test_half_precision_is_rounded_once(interpreted):
    """In bf16 the gradient is that of the rounded logits, to the rounding of what is written."""
    module = device_loss.kernels()
    random = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(ROWS, 600, generator=random) for _ in range(2))
    labels, coef = torch.randint(0, 600, (ROWS,), generator=random), torch.rand(ROWS, generator=random)
    numbers = device_loss.numbers_of(CONFIGS[0])
    wide, low = student.bfloat16().float(), student.bfloat16()
    values = module.dense_loss_(wide, teacher.bfloat16(), labels, coef, coef, 0, numbers, 1.0)
    found = module.dense_loss_(low, teacher.bfloat16(), labels, coef, coef, 0, numbers, 1.0)
    torch.testing.assert_close(found, values)
    torch.testing.assert_close(low, wide.bfloat16())
    interpreted(True)
    results(problem(300, 300), CONFIGS[0], 1.0)


COMPILE = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_spills(capability):
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, COMPILE, str(capability)], capture_output=True, text=True, env=environ)
    assert found.returncode == 0, found.stderr[-2000:]
    lines = found.stdout.splitlines()
    assert len(lines) >= 8
    for line in lines:
        assert "0 bytes spill stores, 0 bytes spill loads" in line, line
