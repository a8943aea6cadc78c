"""Stored targets: prefixes share rows, every row is the teacher's, and nothing is guessed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_runs import run_config, save_model

from limbeck.distill.data import prepare
from limbeck.errors import CheckpointError, PairError
from limbeck.ledger import Ledger
from limbeck.models.load import load_model
from limbeck.models.tiny import symbol_tokenizer
from limbeck.teacher.store import FILE, TargetStore, build_store, share_prefixes
from limbeck.traces.batch import collate

VOCAB = 49
IDS = st.integers(0, 300)


def arrays(*sequences):
    return [np.array(sequence, dtype=np.int32) for sequence in sequences]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_model(save_model(tmp_path_factory.mktemp("teacher"), sharpness=60.0), layout="packed")


def examples(**changes):
    return prepare(run_config(changes), symbol_tokenizer()).train


def test_prefixes_and_duplicates_share_rows():
    roots, index = share_prefixes(arrays([1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 9], [5], [1, 2], [256], [1]))
    assert sorted(map(list, roots)) == [[1, 2, 3, 4], [1, 2, 9], [5], [256]]
    assert len(index["keys"]) == 7 == len(index["keys"].unique())


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(IDS, min_size=1, max_size=5), min_size=1, max_size=12))
def test_every_sequence_stands_at_its_offset(sequences):
    sequences = arrays(*sequences)
    roots, index = share_prefixes(sequences)
    rows = np.concatenate(roots)
    unique = {tuple(sequence) for sequence in sequences}
    stored = {
        tuple(rows[offset : offset + length])
        for offset, length in zip(index["offsets"].tolist(), index["lengths"].tolist(), strict=True)
    }
    assert stored == unique
    kept = {tuple(root) for root in roots}
    assert kept == {s for s in unique if not any(o[: len(s)] == s and o != s for o in unique)}
    assert len(rows) == sum(map(len, kept))


def dense_log_probs(teacher, ids):
    """[T V] by a plain forward of one sequence."""
    model = teacher
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(torch.tensor(ids, dtype=torch.int64)[None]).logits[0, :, :VOCAB]
    model.set_attn_implementation("limbeck_packed")
    return logits.log_softmax(-1)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_rows_are_the_teachers(tmp_path, teacher, layout):
    whole, cut = examples(), examples(**{"truncation.lead_fraction": 0.5})
    ending = examples(**{"truncation.lead_fraction": 0.5, "truncation.keep_ending": True})
    sequences = [example.sample.input_ids for example in [*whole, *cut, *ending]]
    ledger = Ledger()
    counts = build_store(teacher, sequences, tmp_path, top_k=6, vocab_size=VOCAB, batch_tokens=150, ledger=ledger)
    tokens = sum(map(len, whole)) + sum(map(len, ending))
    assert counts["tokens_scored"] == tokens == ledger.counts["tokens"]
    assert counts["tokens_asked"] == tokens + sum(map(len, cut)) and counts["sequences"] == 27
    assert ledger.flops["teacher"] > 0 == ledger.flops["student"]
    store = TargetStore(tmp_path)
    masses = []
    for batch_examples in (whole[:4], cut[:4], ending[2:5]):
        batch = collate(batch_examples, layout, 0)
        rows = batch.target_rows()
        targets = store.targets(batch, batch_examples, rows, Ledger())
        expected = [
            dense_log_probs(teacher, example.sample.input_ids)[:-1][example.ce_weight[1:] + example.kd_weight[1:] > 0]
            for example in batch_examples
        ]
        log_probs = torch.cat(expected)
        torch.testing.assert_close(log_probs.gather(1, targets.ids), targets.log_probs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(log_probs.topk(6).values, targets.log_probs, rtol=1e-4, atol=1e-4)
        total = targets.log_probs.exp().sum(1) + targets.log_tail.exp()
        torch.testing.assert_close(total, torch.ones(len(total)), rtol=1e-5, atol=1e-5)
        assert targets.ids.max() < VOCAB
        masses.append(targets.log_probs.exp().sum(1).mean())
    assert counts["mass_kept"] == pytest.approx(float(torch.stack(masses).mean()), abs=0.1)


def test_all_entries_leave_no_tail(tmp_path, teacher):
    counts = build_store(teacher, arrays([3, 4, 5]), tmp_path, top_k=1000, vocab_size=VOCAB)
    tensors = load_file(tmp_path / FILE)
    assert counts["top_k"] == VOCAB == tensors["ids"].shape[1]
    assert counts["mass_kept"] == 1.0 and torch.isneginf(tensors["log_tail"]).all()
    assert counts["bytes_per_token"] > VOCAB * 8


def test_a_sequence_that_is_missing_is_an_error(tmp_path, teacher):
    whole, ending = examples(), examples(**{"truncation.lead_fraction": 0.5, "truncation.keep_ending": True})
    build_store(teacher, [example.sample.input_ids for example in whole], tmp_path, top_k=4)
    batch = collate(ending[:1], "packed", 0)
    message = rf"no targets for .* as it is cut here \({len(ending[0])} tokens\); build the store from"
    with pytest.raises(PairError, match=message):
        TargetStore(tmp_path).targets(batch, ending[:1], batch.target_rows(), Ledger())


def truncated(file, tensors):
    file.write_bytes(file.read_bytes()[:-9])


def without_index(file, tensors):
    save_file({name: tensor for name, tensor in tensors.items() if name != "offsets"}, file)


def short_index(file, tensors):
    save_file(tensors | {"lengths": tensors["lengths"][:0]}, file)


def foreign_index(file, tensors):
    save_file(tensors | {"offsets": tensors["offsets"] + 1}, file)


def words(file, tensors):
    file.write_text("not tensors at all")


def nothing(file, tensors):
    file.unlink()


@pytest.mark.parametrize("damage", [truncated, without_index, short_index, foreign_index, words, nothing])
def test_a_damaged_store_is_named(tmp_path, teacher, damage):
    build_store(teacher, arrays([3, 4, 5], [6, 7]), tmp_path, top_k=4)
    damage(tmp_path / FILE, load_file(tmp_path / FILE))
    with pytest.raises(CheckpointError, match=r"targets.safetensors: .*build it again") as caught:
        TargetStore(tmp_path)
    assert "\n" not in str(caught.value)
