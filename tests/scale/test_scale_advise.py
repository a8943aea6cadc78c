"""Advice on formats and cuts: the rule table of production, from bytes and FLOPs."""

import json

import pytest

from limbeck.cli import main
from limbeck.config import build
from limbeck.cost.hardware import DEVICES, measure
from limbeck.errors import ConfigError
from limbeck.scale.advise import AdviseConfig, advise
from limbeck.scale.roofline import Requests


def advice(hardware, **fields):
    return advise(build(AdviseConfig, fields), DEVICES[hardware])


@pytest.mark.parametrize(
    ("hardware", "workload", "more", "expected"),
    [
        ("h100", "ranking", {}, "fp8"),
        ("h100", "batch", {}, "fp8"),
        ("a100", "ranking", {}, "w8a8"),
        ("a100", "reasoning", {"requests_per_second": 0.1}, "w4a16"),
        ("laptop-cpu", "ranking", {"model": "qwen3-0.6b"}, "w8a8"),
        ("laptop-cpu", "reasoning", {"model": "qwen3-0.6b", "requests_per_second": 0.01}, "w4a16"),
    ],
)
def test_the_rule_table(hardware, workload, more, expected):
    """2502.14305: H100 fp8 for both; A100 int8 where prompts dominate, 4-bit weights where decoding does."""
    assert advice(hardware, workload=workload, **more).chosen == expected


def test_a_model_that_fits_only_in_few_bits():
    found = advice("l40s", model="qwen3-32b", workload="ranking")
    assert [row.fits for row in found.formats if row.name == "bf16"] == [False]
    assert next(row for row in found.formats if row.name == found.chosen).fits


def test_smaller_shapes_are_faster_and_lighter():
    found = advice("h100", workload="reasoning")
    sizes = [row.weight_bytes for row in found.cuts]
    speeds = [row.times.requests_per_second for row in found.cuts]
    assert sizes == sorted(sizes, reverse=True) and speeds == sorted(speeds)


def test_times_add_up():
    for row in advice("h100", workload="reasoning", new_tokens=100).formats:
        assert row.times.request == pytest.approx(row.times.prefill + 100 * row.times.step)
    for row in advice("h100", workload="ranking").formats:
        assert row.times.step == 0 and row.times.requests_per_second == pytest.approx(1 / row.times.prefill)


def test_more_requests_are_decoded_together():
    rare, frequent = (advice("h100", workload="reasoning", requests_per_second=rate) for rate in (0.01, 5.0))
    assert rare.formats[0].times.batch == 1 < frequent.formats[0].times.batch


def test_a_shared_prefix_is_paid_once():
    shared = Requests(prefix_tokens=500, items=50, item_tokens=10, new_tokens=0)
    assert shared.prompt_tokens == 1000
    assert shared.pairs < 50 * 510**2 / 2


def test_this_machine_is_measured():
    found = measure()
    assert found.flops["float32"] > 1e8 and found.bandwidth > 1e8 and found.memory_bytes > 1e8


@pytest.mark.parametrize("changes", [{"requests_per_second": 0}, {"items": 0}, {"new_tokens": -1}])
def test_impossible_workloads_are_refused(changes):
    with pytest.raises(ConfigError):
        build(AdviseConfig, changes)


def test_advice_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["advise", "qwen3-4b", "--hardware", "a100"])
    assert stopped.value.code == 0 and "take w8a8" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["advise", "--model", "tiny-student", "--json"])
    tree = json.loads(capsys.readouterr().out)
    assert tree["take"] in [row["name"] for row in tree["formats"]] and tree["hardware"]["name"] == "measured"
