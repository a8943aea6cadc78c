"""The contracts of the pretend device on a real one, and what only a real one can show. `pytest -m gpu`."""

import warnings

import pytest
import torch
from device_contracts import DIVERGENCES, RUNS, STAGES, compare, config_of, losses, named, run_stage, save_models
from tiny_runs import metrics_of, weights_of

from limbeck.distill import device_loss, train
from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.fused import fused_loss
from limbeck.distill.parallel import join
from limbeck.engine.complete import complete
from limbeck.engine.sampling import SamplingConfig
from limbeck.models.load import load_model
from limbeck.placement import asking
from limbeck.stage import How
from limbeck.teacher.dense import DenseTargets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator"),
]
PROMPTS = [[1, 16 + i, 17, 20, 21 + i] + [18] * (i % 4) for i in range(12)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_the_cpu(models, name, tmp_path):
    config = config_of(models, RUNS[name])
    found, on_cpu = (losses(config, tmp_path / device, device) for device in ("cuda", "cpu"))
    is_free = "bf16" in name or "own texts" in name or "asgld" in name
    assert found == pytest.approx(on_cpu, rel=0.1 if is_free else 2e-3)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_layouts_agree_in_bf16(models, kind, layout, tmp_path):
    changes = {"student.model": kind, "teacher.model": kind, "training.precision": "bf16", "training.layout": layout}
    with asking("cuda"):
        train.run(config_of(models, changes), tmp_path / "device")
    expected = losses(config_of(models, {**changes, "training.precision": "float32"}), tmp_path / "cpu", "cpu")
    found = [row["loss"] for row in metrics_of(tmp_path / "device")]
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_makes_what_a_cpu_makes(models, name, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("12+3=15\n15*2=30\n30-4=26\n" * 30)
    fields = named(STAGES[name], {**models, "chain": str(text)})
    made = []
    for device in ("cuda", "cpu"):
        with asking(device, "float32"):
            made.append(run_stage(name, fields, tmp_path / device))
    compare(made[0].metrics, made[1].metrics)


def test_moments_are_used_where_the_blocks_are(models, tmp_path):
    with asking("cuda"):
        run_stage("moments", named(STAGES["moments"], models), tmp_path / "moments")
        for name in ("prune", "quantize"):
            run_stage(name, {**named(STAGES[name], models), "moments": str(tmp_path / "moments")}, tmp_path / name)


def test_a_resumed_run_goes_on(models, tmp_path, monkeypatch):
    config = config_of(models, {"training.save_every_steps": 2, "training.max_steps": 4})
    with asking("cuda"):
        train.run(config, tmp_path / "whole")
        whole = train._step

        def step(setup, number):
            if number == 3:
                raise KeyboardInterrupt
            return whole(setup, number)

        with monkeypatch.context() as patch:
            patch.setattr(train, "_step", step)
            with pytest.raises(KeyboardInterrupt):
                train.run(config, tmp_path / "out")
        train.run(config, tmp_path / "out", how=How(resume=True))
    for name, weight in weights_of(tmp_path / "whole").items():
        torch.testing.assert_close(weights_of(tmp_path / "out")[name], weight, rtol=1e-3, atol=1e-4)


def test_a_step_waits_for_nothing_but_its_numbers(models):
    with asking("cuda", "bf16"):
        setup = train.set_up(config_of(models, {"training.max_steps": 4, "training.precision": "bf16"}), join())
        setup.student.model.train()
        for number in range(2):
            train._step(setup, number).row()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step = train._step(setup, 2)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        step.row()
    assert len([w for w in seen if "synchronizing" in str(w.message)]) <= 1, [str(w.message) for w in seen]


@pytest.mark.parametrize("way", ["greedy", "drawn"])
def test_texts_are_those_of_a_cpu(models, way):
    config = SamplingConfig(max_new_tokens=40, batch_size=8, temperature=0.0 if way == "greedy" else 0.8)
    texts = [
        complete(load_model(models["llama"], torch.float32, device=device), PROMPTS, config, [2], 3)
        for device in ("cuda", "cpu")
    ]
    same = [one[0].token_ids == other[0].token_ids for one, other in zip(*texts, strict=True)]
    assert sum(same) >= 0.8 * len(same)  # rounding ends some greedy texts elsewhere


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_loss(name, dtype, monkeypatch):
    if device_loss.kernels() is None:
        pytest.skip("triton is not installed")
    random = torch.Generator().manual_seed(0)
    shapes = ((300, 64), (5000, 64), (300, 96), (5000, 96))
    hidden, head, teacher, teacher_head = (torch.randn(s, generator=random).cuda() for s in shapes)
    labels, coef = torch.randint(0, 5000, (300,), generator=random).cuda(), torch.full((300,), 1 / 300).cuda()
    found = []
    for use in (True, False):
        if not use:
            monkeypatch.setattr(device_loss, "takes", lambda *_: False)
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = fused_loss(
                *leaves,
                labels,
                ce_coef=coef,
                kd_coef=coef,
                targets=DenseTargets(teacher, teacher_head),
                divergence=DivergenceConfig(name=name),
            )
        loss.total.backward()
        found.append([loss.total.detach(), *(x.grad for x in leaves)])
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, **tolerance)
