"""Targets written as columns for other trainers say what the cache says, and come back."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import run_config, save_model

from limbeck.distill import caching, train
from limbeck.errors import ConfigError, DataError
from limbeck.teacher import exchange
from limbeck.teacher.cache import CacheConfig, TeacherCache
from limbeck.teacher.columns import ABSENT, IGNORED, READERS, WRITERS, Sequence, entries_of

VOCAB = 49


@st.composite
def stored(draw):
    """A sequence with rows of 1 to 6 entries at some of its tokens."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = random.integers(0, VOCAB, draw(st.integers(2, 9)))
    positions = np.sort(random.choice(np.arange(1, len(ids)), draw(st.integers(1, len(ids) - 1)), replace=False))
    counts = random.integers(1, 7, len(positions))
    entry_ids = np.concatenate([np.sort(random.choice(VOCAB, count, replace=False)) for count in counts])
    masses = random.uniform(0.5, 0.99, len(counts))
    probs = np.concatenate([random.dirichlet(np.ones(c)) * m for c, m in zip(counts, masses, strict=True)])
    return Sequence(ids, positions, counts, entry_ids, np.log(probs), np.log1p(-masses))


def same_rows(one, other, tolerance=1e-5):
    assert one.positions.tolist() == other.positions.tolist()
    assert one.counts.tolist() == other.counts.tolist()
    assert one.entry_ids.tolist() == other.entry_ids.tolist()
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=tolerance, rtol=tolerance)


@settings(max_examples=60, deadline=None)
@given(stored(), st.sampled_from(["parquet", "distillkit"]))
def test_what_is_written_is_read_again(sequence, name):
    row = WRITERS[name](sequence, int(sequence.counts.max()))
    found = READERS[name][1](row)
    same_rows(found, sequence)
    np.testing.assert_allclose(np.exp(found.log_tail), np.exp(sequence.log_tail), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(stored())
def test_axolotl_rows_are_normalised_and_masked(sequence):
    row = WRITERS["axolotl"](sequence, int(sequence.counts.max()))
    mask, log_probs = np.stack(row["target_mask"]).astype(bool), np.stack(row["target_logprobs"])
    assert (mask.sum(1)[sequence.positions - 1] == sequence.counts).all()
    assert mask.sum() == sequence.counts.sum()
    np.testing.assert_allclose(np.where(mask, np.exp(log_probs), 0).sum(1)[sequence.positions - 1], 1, atol=1e-5)
    assert ((row["labels"] != IGNORED) == np.isin(np.arange(len(sequence.ids)), sequence.positions)).all()
    found = READERS["axolotl"][1](row)
    assert found.entry_ids.tolist() == sequence.entry_ids.tolist()


@settings(max_examples=60, deadline=None)
@given(stored(), st.integers(1, 5))
def test_the_likeliest_entries_stay_and_the_rest_joins_the_tail(sequence, top_k):
    found, start = sequence.kept(top_k), 0
    assert found.counts.max() <= top_k
    for row, count in enumerate(sequence.counts):
        best = np.sort(sequence.log_probs[start : start + count])[::-1][:top_k]
        kept = found.log_probs[found.counts[:row].sum() : found.counts[: row + 1].sum()]
        np.testing.assert_allclose(np.sort(kept)[::-1], best)
        if count > top_k:
            assert math.isclose(math.exp(found.log_tail[row]) + np.exp(kept).sum(), 1, abs_tol=1e-9)
        start += count


@settings(max_examples=40, deadline=None)
@given(stored())
def test_entries_are_the_caches_own(sequence):
    targets = entries_of(sequence).targets()
    rows = np.repeat(np.arange(len(sequence.counts)), sequence.counts)
    for row in range(len(sequence.counts)):
        given_probs = np.exp(sequence.log_probs[rows == row])
        found = targets.log_probs[row, : sequence.counts[row]].exp().numpy()
        np.testing.assert_allclose(found, given_probs, atol=2e-3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), sharpness=60.0)


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    config = caching.CacheStageConfig(teacher=teacher, traces=run_config().traces, cache=CacheConfig(top_k=5))
    return caching.run(config, tmp_path_factory.mktemp("made") / "cache").path


@pytest.mark.parametrize("name", ["parquet", "distillkit"])
def test_a_cache_that_went_out_and_in_trains_the_same_student(cache, teacher, tmp_path, name):
    exchange.export_cache(exchange.ExportCacheConfig(cache=cache, format=name), tmp_path / "out")
    back = exchange.import_cache(exchange.ImportCacheConfig(source=tmp_path / "out", teacher=teacher), tmp_path / "in")
    TeacherCache(back.path).verify()
    runs = [
        train.run(run_config({"teacher.cache": str(directory), "training.max_steps": 2}), tmp_path / str(number))
        for number, directory in enumerate((cache, back.path))
    ]
    ours, theirs = (dict(run.load()[0].named_parameters()) for run in runs)
    assert max(float((ours[key] - theirs[key]).detach().abs().max()) for key in ours) < 1e-3


def test_exported_columns_give_the_loss_that_their_trainers_compute(cache, tmp_path):
    """Their formula over the columns, by hand, is the forward KL over the kept entries of what the cache says."""
    exchange.export_cache(exchange.ExportCacheConfig(cache=cache, format="axolotl"), tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "targets.parquet").to_pylist()
    torch.manual_seed(0)
    by_columns = by_cache = 0.0
    reader = TeacherCache(cache)
    first = reader.shards[0]
    for number, row in enumerate(rows[: len(first)]):
        log_student = torch.randn(len(row["input_ids"]), VOCAB).log_softmax(-1)
        mask = torch.tensor(row["target_mask"], dtype=torch.bool)
        target = torch.tensor(row["target_logprobs"])
        kept = log_student.gather(1, torch.tensor(row["target_token_ids"]))
        by_columns += float((target.exp() * (target - kept))[mask].sum())
        sequence = first.sequence(number)
        assert sequence.ids.tolist() == row["input_ids"]
        targets = entries_of(next(s for s in exchange._read_cache(reader, 5) if s.ids.tolist() == row["input_ids"]))
        said = targets.targets()
        normal = said.log_probs.log_softmax(-1)
        at = log_student[np.flatnonzero(sequence.positions) - 1].gather(1, said.ids)
        is_entry = torch.isfinite(normal)
        by_cache += float((normal.exp() * (normal - at))[is_entry].sum())
    assert math.isclose(by_columns, by_cache, rel_tol=1e-4)


def test_what_cannot_be_exchanged_is_refused(cache, teacher, tmp_path):
    hidden = caching.CacheStageConfig(teacher=teacher, traces=run_config().traces, cache=CacheConfig(mode="hidden"))
    caching.run(hidden, tmp_path / "hidden")
    with pytest.raises(ConfigError, match="mode hidden"):
        exchange.export_cache(exchange.ExportCacheConfig(cache=tmp_path / "hidden", format="parquet"), tmp_path / "o")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"input_ids": [[1, 2]], "compressed_logprobs": [[[1]]]}), other)
    with pytest.raises(DataError, match=r"compressed_logprobs, input_ids; expected .*token_ids, top_values"):
        exchange.import_cache(exchange.ImportCacheConfig(source=other, teacher=teacher), tmp_path / "i")
    wild = {"input_ids": [[1, 2]], "token_ids": [[[VOCAB], [0]]], "top_values": [[[-0.1], [ABSENT]]]}
    pq.write_table(pa.table(wild), other)
    with pytest.raises(DataError, match="row 0 has token ids outside the vocabulary of 49"):
        exchange.import_cache(exchange.ImportCacheConfig(source=other, teacher=teacher), tmp_path / "i")
    assert not (tmp_path / "i").exists()
