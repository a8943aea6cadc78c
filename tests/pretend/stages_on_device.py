"""All stages on the pretend device: they use it, no two devices meet, and what they make is what a CPU makes."""

import json

import pytest
from device_contracts import STAGES, compare, named, run_stage, save_models
from pretend.device import COUNTS
from safetensors.torch import load_file

from limbeck import placement
from limbeck.placement import asking

SAMPLE = ("traces generate", "traces probe", "teacher cache", "evaluate", "prune", "quantize", "rank train")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def stages():
    return [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow, id=n) for n in STAGES]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("12+3=15\n15*2=30\n30-4=26\n" * 30)
    return str(file)


@pytest.mark.parametrize("name", stages())
def test_a_stage_uses_the_device_and_makes_what_a_cpu_makes(name, models, tmp_path, text):
    fields = named(STAGES[name], {**models, "chain": text})
    COUNTS.clear()
    with asking("cuda", "float32"):
        found = run_stage(name, fields, tmp_path / "device")
    assert COUNTS.total_launches > 100, "the device was not used"
    assert placement.found()["device"] == "cuda:0"
    with asking("cpu", "float32"):
        expected = run_stage(name, fields, tmp_path / "cpu")
    for file in expected.path.glob("model*.safetensors"):
        ours, theirs = load_file(found.path / file.name), load_file(file)
        same = sum(float((ours[n].float() - theirs[n].float()).abs().max() < 1e-3) for n in theirs)
        assert same >= 0.9 * len(theirs), "weights differ"
    compare(found.metrics, expected.metrics)


@pytest.mark.parametrize("name", ["traces generate", "teacher cache", "evaluate", "traces probe"])
def test_what_is_not_trained_is_in_bf16_there(name, models, tmp_path, text):
    out = run_stage(name, named(STAGES[name], {**models, "chain": text}), tmp_path / "out")
    assert json.loads((out.path / "limbeck.json").read_text())["machine"]["dtype"] == "bf16"
    assert placement.found()["dtype"] == "bf16"


def test_moments_are_used_where_the_blocks_are(models, tmp_path):
    run_stage("moments", named(STAGES["moments"], models), tmp_path / "moments")
    for name in ("prune", "quantize", "prune neurons"):
        fields = {**named(STAGES[name], models), "moments": str(tmp_path / "moments")}
        found = run_stage(name, fields, tmp_path / name.replace(" ", "-"))
        assert found.metrics["mean_layer_error"] > 0
