"""Perplexity over windows, against the plain dense computation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from limbeck.config import build
from limbeck.errors import ConfigError
from limbeck.evaluate import perplexity
from limbeck.evaluate.perplexity import PerplexityConfig, read_text, token_windows, window_sums
from limbeck.evaluate.stage import EvaluateStageConfig, run
from limbeck.models.load import load_model
from limbeck.models.tiny import ScratchConfig, scratch_model, symbol_tokenizer
from limbeck.traces.render import RenderConfig
from limbeck.traces.sources import TraceConfig

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}


def random_windows(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (length,), generator=generator).tolist() for length in lengths]


def dense_sums(model, reference, ids):  # type: ignore[no-untyped-def]
    """The sums of one window from its whole logits in float64."""
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        q = reference(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    nll = functional.nll_loss(p, torch.tensor(ids[1:]), reduction="sum")
    return float(nll), float((q.exp() * (q - p)).sum())


def test_sums_are_those_of_the_dense_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small enough that batches mix lengths and the head's rows cross windows.
    monkeypatch.setattr(perplexity, "_BATCH_TOKENS", 40)
    monkeypatch.setattr(perplexity, "HEAD_ROWS", 7)
    model, reference = (scratch_model(ScratchConfig(**SHAPE, seed=seed)).eval() for seed in (0, 1))
    windows = random_windows([2, 17, 9, 33, 17, 5])
    sums = window_sums(model, windows, reference)
    expected = np.array([dense_sums(model, reference, ids) for ids in windows])
    np.testing.assert_allclose(sums.nll, expected[:, 0], rtol=1e-5)
    assert sums.kl is not None
    np.testing.assert_allclose(sums.kl, expected[:, 1], rtol=1e-4, atol=1e-6)
    assert sums.tokens.tolist() == [1, 16, 8, 32, 16, 4]
    summary = sums.summary()
    assert summary["nats_per_token"] == pytest.approx(expected[:, 0].sum() / 77, rel=1e-5)
    assert summary["perplexity"] == pytest.approx(np.exp(expected[:, 0].sum() / 77), rel=1e-5)
    assert summary["perplexity_low"] < summary["perplexity"] < summary["perplexity_high"]
    assert summary["kl_to_reference"] == pytest.approx(expected[:, 1].sum() / 77, rel=1e-4)


def test_a_model_does_not_differ_from_itself() -> None:
    model = scratch_model(ScratchConfig(**SHAPE)).eval()
    sums = window_sums(model, random_windows([20, 20]), model)
    assert sums.kl is not None
    assert np.abs(sums.kl).max() == 0
    assert window_sums(model, random_windows([20])).kl is None


def test_windows_cover_the_text_once(tmp_path: Path) -> None:
    tokenizer = symbol_tokenizer()
    (tmp_path / "text.txt").write_text("a+b=12\n" * 20)
    ids = tokenizer("a+b=12\n" * 20, add_special_tokens=False)["input_ids"]
    config = PerplexityConfig(text=str(tmp_path / "text.txt"), window_tokens=16)
    windows = token_windows(config, tokenizer, RenderConfig())
    assert [token for window in windows for token in window] == ids[: len(ids) - (len(ids) % 16 == 1)]
    assert {len(window) for window in windows[:-1]} == {16}
    few = token_windows(PerplexityConfig(text=config.text, window_tokens=16, max_tokens=20), tokenizer, RenderConfig())
    assert [len(window) for window in few] == [16, 4]


def test_windows_of_traces_do_not_run_into_each_other() -> None:
    traces = TraceConfig(source="builtin:chain", num_traces=3)
    config = PerplexityConfig(traces=traces, window_tokens=100_000)
    windows = token_windows(config, symbol_tokenizer(), RenderConfig())
    assert len(windows) == 3


def test_prose_is_the_story_alone() -> None:
    story = read_text("prose")
    assert len(story.split()) > 5000
    assert "gutenberg.org" not in story.lower()


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_texts_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="perplexity"):
        token_windows(PerplexityConfig(text=str(path)), symbol_tokenizer(), RenderConfig())


def test_stage_writes_the_summary(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a=3\nb=a+4\n" * 10)
    tree = {
        "model": "tiny-student",
        "perplexity": {"text": str(tmp_path / "text.txt"), "window_tokens": 20, "reference": "tiny-teacher"},
    }
    summary = run(build(EvaluateStageConfig, tree, "test"), tmp_path / "out").metrics
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    ids = symbol_tokenizer()("a=3\nb=a+4\n" * 10, add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + 20] for start in range(0, len(ids), 20)]
    sums = window_sums(load_model("tiny-student"), windows, load_model("tiny-teacher"))
    assert summary["perplexity"] == sums.summary()["perplexity"]
    assert summary["kl_to_reference"] > 0


def test_stage_wants_problems_or_a_text() -> None:
    with pytest.raises(ConfigError, match=r"problems\.source"):
        EvaluateStageConfig(model="tiny-student")
