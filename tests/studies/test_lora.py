"""The study of LoRA from zero, on the built-in student: what cannot move does not, and one kick is enough."""

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.traces.sources import TraceConfig
from studies import lora

SMALL = {
    "model": "tiny-student",
    "traces": TraceConfig(source="builtin:chain", num_traces=40, chain_min_steps=2, chain_max_steps=3),
    "row_tokens": 32,
    "held_out_rows": 2,
    "steps": 4,
    "measure_every": 2,
    "lr": 1e-2,
}


def test_rows_are_the_text_of_the_traces_in_order():
    rows = lora.token_rows(lora.LoraConfig(**SMALL))
    assert rows.shape[1] == 32
    assert rows.dtype == torch.int64


def test_only_a_kick_leaves_both_factors_at_zero(tmp_path):
    result = lora.run(lora.LoraConfig(**SMALL), tmp_path / "out")
    (zero,), (momentum,), (jitter,) = (result[name] for name in ("zero", "zero_momentum", "zero_jitter"))
    (perturb,), (standard,) = (result[name] for name in ("zero_perturb", "standard"))
    for stuck in (zero, momentum):
        assert not stuck["has_moved"]
        assert len(set(stuck["losses"])) == 1
    for moving in (jitter, perturb, standard):
        assert moving["has_moved"]
        assert moving["losses"][-1] < moving["losses"][0]
    assert perturb["fires"] == 1
    assert (tmp_path / "out" / "lora.png").stat().st_size > 1000


@pytest.mark.parametrize("wrong", [{"methods": ("zeros",)}, {"steps": 0}], ids=str)
def test_configs_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError):
        lora.LoraConfig(**wrong)


def test_too_little_text_is_refused():
    with pytest.raises(ConfigError, match="give more of them"):
        lora.token_rows(lora.LoraConfig(**{**SMALL, "row_tokens": 5_000}))
