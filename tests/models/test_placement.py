"""The decision on device and number format: who may ask, what is refused, and that it reaches what it has to."""

import json

import pytest
import torch
from made_models import made_model

import limbeck
from limbeck import placement
from limbeck.errors import ConfigError
from limbeck.models import lean, lean_device
from limbeck.models.load import load_model
from limbeck.models.placement import here
from limbeck.models.varlen import Cuts
from limbeck.runner.process import in_process


def asked_there() -> tuple[str, str]:
    return tuple(placement.asked())


def test_the_nearest_word_counts(monkeypatch):
    monkeypatch.setenv("LIMBECK_DEVICE", "auto")
    monkeypatch.setenv("LIMBECK_DTYPE", "bf16")
    assert placement.asked() == ("auto", "bf16")
    with placement.asking("cpu"):
        assert placement.asked() == ("cpu", "bf16")
        with placement.asking(dtype="float32"):
            assert placement.asked() == ("cpu", "float32")
            assert in_process(asked_there) == ("cpu", "float32")
    assert placement.asked() == ("auto", "bf16")


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("gpu", None, "--device 'gpu': takes auto, cpu, cuda or cuda:N"),
        ("cpu:1", None, "--device 'cpu:1'"),
        (None, "bf15", "--dtype 'bf15': takes auto, float32, bf16; did you mean 'bf16'"),
    ],
)
def test_other_words_are_refused(device, dtype, message):
    with pytest.raises(ConfigError, match=message), placement.asking(device, dtype):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there_is_refused():
    with placement.asking("cuda:1"), pytest.raises(ConfigError, match="device cuda:1: there is no CUDA device here"):
        here()


def test_each_process_of_a_machine_takes_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    found = torch.device
    for count, local, expected in ((4, "2", found("cuda", 2)), (1, "3", found("cuda", 0))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": local}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with placement.asking("auto"):
            from limbeck.models.placement import _device

            assert _device("auto") == expected
            assert _device("cpu") == found("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 3 of this machine asks for cuda:3, of 2 there"):
        _device("cuda")


def test_models_are_loaded_as_asked():
    with placement.asking("cpu", "bf16"):
        assert next(load_model("tiny-student").parameters()).dtype == torch.bfloat16
    assert next(load_model("tiny-student").parameters()).dtype == torch.float32
    assert placement.found() == {"device": "cpu", "dtype": "float32"}


def test_the_manifest_names_them_and_a_command_without_models_takes_none(tmp_path):
    chain = {"source": "builtin:chain", "num_traces": 3, "chain_min_steps": 2, "chain_max_steps": 2}
    fields = {"model": "tiny-student", "problems": chain, "max_new_tokens": 3, "checker": "exact"}
    found = limbeck.evaluate(**fields, out=tmp_path / "out", device="cpu", dtype="bf16")
    machine = json.loads((found.path / "limbeck.json").read_text())["machine"]
    assert (machine["device"], machine["dtype"]) == ("cpu", "bf16")
    with pytest.raises(ConfigError, match="device means nothing here"):
        limbeck.import_traces(traces=chain, out=tmp_path / "traces", device="cpu")


@pytest.mark.parametrize("frozen", [False, True])
def test_the_lean_pass_for_devices_is_the_lean_pass(frozen):
    """In float32, with its attention a sequence at a time, on the CPU: values and all gradients."""
    lengths, needed = [9, 4, 12], torch.tensor([3, 4, 6, 10, 12, 20])
    ids = torch.randint(96, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths])
    found = {}
    for way in ("lean", "device"):
        backbone = made_model("llama").model.train().requires_grad_(not frozen)
        if way == "lean":
            hidden = lean.packed_rows(backbone, ids, positions, lean.plan_packed(ids, lengths, needed))
        else:
            hidden = lean_device.packed_rows(backbone, ids, positions, lean_device.plan_on_host(ids, lengths, needed))
        if not frozen:
            hidden.square().sum().backward()
        found[way] = hidden.detach(), {name: p.grad for name, p in backbone.named_parameters()}
    torch.testing.assert_close(found["device"][0], found["lean"][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found["lean"][1].items():
        if gradient is not None:
            torch.testing.assert_close(found["device"][1][name], gradient, rtol=1e-4, atol=1e-4)


def test_cuts_are_where_sequences_begin_and_end():
    cuts = Cuts.of([3, 1, 5], torch.device("cpu"))
    assert cuts.starts.tolist() == [0, 3, 4, 9] and cuts.starts.dtype == torch.int32 and cuts.longest == 5
