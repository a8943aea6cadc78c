"""A teacher cache: prefixes share rows, every row is the teacher's, nothing is guessed, no damage goes unseen."""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import run_config, save_model

from limbeck.cli import main
from limbeck.config import build
from limbeck.distill import caching
from limbeck.distill.data import prepare
from limbeck.distill.pair import load_teacher
from limbeck.distill.parallel import Ranks
from limbeck.errors import CheckpointError, LimbeckError, PairError
from limbeck.ledger import Ledger
from limbeck.models.load import load_model, model_hash
from limbeck.models.tiny import symbol_tokenizer
from limbeck.teacher import build as building
from limbeck.teacher.build import build_cache, share_prefixes, spec_of, verify, write_cache
from limbeck.teacher.cache import CHECKSUMS, SHARDS, CacheConfig, TeacherCache, seal
from limbeck.teacher.codec import Entries, decode, encode
from limbeck.teacher.score import draw, keep, reconstruction_kl
from limbeck.teacher.shard import Shard, Stored, write_shard
from limbeck.traces.batch import collate

VOCAB = 49
CPU = torch.device("cpu")
IDS = st.integers(0, 300)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), sharpness=60.0)


@pytest.fixture(scope="module")
def teacher(name):
    return load_model(name, layout="packed")


def examples(**changes):
    return prepare(run_config(changes), symbol_tokenizer()).train


def asked(found):
    return [Stored(example.sample.input_ids, example.kd_weight > 0) for example in found]


def stored(*sequences):
    return [Stored(np.array(s, dtype=np.int32), np.arange(len(s)) > 0) for s in sequences]


def fill(teacher, name, sequences, out, shard_positions=200, **config):
    """A finished cache, without a manifest."""
    spec = spec_of(teacher, name, model_hash(name), VOCAB, CacheConfig(**config))
    counts = build_cache(teacher, spec, sequences, out, shard_positions=shard_positions)
    seal(out)
    return counts


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def read_all(directory, found):
    cache = TeacherCache(directory)
    for example in found:
        batch = collate([example], "packed", 0)
        cache.targets(batch, [example], batch.target_rows(), Ledger())


# What is stored


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(IDS, min_size=1, max_size=5), min_size=1, max_size=12))
def test_a_shard_finds_every_beginning_of_what_it_holds(tmp_path_factory, sequences):
    roots = share_prefixes(stored(*sequences))
    assert [list(root.ids) for root in roots] == sorted(list(root.ids) for root in roots)
    unique = {tuple(s) for s in sequences}
    kept = {tuple(root.ids.tolist()) for root in roots}
    assert kept == {s for s in unique if not any(o[: len(s)] == s and o != s for o in unique)}
    path = tmp_path_factory.mktemp("shard") / "shard-a.bin"
    write_shard(path, roots, [bytes([i]) for i in range(len(roots))], 301, {})
    shard = Shard(path, 301)
    for sequence in unique:
        for length in range(1, len(sequence) + 1):
            found = [tuple(shard.sequence(i).ids.tolist()) for i in shard.find(np.array(sequence[:length]))]
            assert found == sorted(k for k in kept if k[:length] == sequence[:length])
    assert not list(shard.find(np.array([300, 300, 300, 300, 300, 300])))
    assert shard.record(0) == b"\0"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.sampled_from([2, 49, 256, 257, 49152, 151936]), st.randoms(use_true_random=False))
def test_records_come_back_as_they_were(num_rows, vocab, rng):
    rows = [sorted(rng.sample(range(vocab), rng.randint(1, min(vocab, 255)))) for _ in range(num_rows)]
    counts = np.array([len(row) for row in rows])
    levels = np.array([rng.randint(1, 1023) for _ in range(counts.sum())])
    tails = np.array([rng.randint(0, 65535) for _ in rows])
    entries = Entries(counts, np.concatenate(rows), levels, tails)
    back = decode(encode(entries, vocab), num_rows, vocab)
    for field in ("counts", "ids", "levels", "tails"):
        np.testing.assert_array_equal(getattr(back, field), getattr(entries, field))
    some = np.array([num_rows - 1, 0])
    np.testing.assert_array_equal(back.select(some).ids, np.concatenate([rows[-1], rows[0]]))


def dense_log_probs(teacher, ids):
    """[T V] by a plain forward of one sequence."""
    teacher.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = teacher(torch.tensor(ids, dtype=torch.int64)[None]).logits[0, :, :VOCAB]
    teacher.set_attn_implementation("limbeck_packed")
    return logits.log_softmax(-1)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_one_cache_serves_cuts_layouts_and_supervisions(tmp_path, teacher, name, layout):
    whole, ending = examples(), examples(**{"truncation.lead_fraction": 0.5, "truncation.keep_ending": True})
    counts = fill(teacher, name, asked([*whole, *ending]), tmp_path, top_k=6, min_probability=0.0)
    assert counts["shards_written"] > 2
    cache = TeacherCache(tmp_path)
    cut = examples(**{"truncation.lead_fraction": 0.5})
    answers = examples(**{"supervision.preset": "answer"})
    for batch_examples in (whole[:4], cut[:4], ending[2:5], answers[:3]):
        batch = collate(batch_examples, layout, 0)
        targets = cache.targets(batch, batch_examples, batch.target_rows(), Ledger())
        log_probs = torch.cat(
            [dense_log_probs(teacher, e.sample.input_ids)[:-1][e.ce_weight[1:] + e.kd_weight[1:] > 0]
             for e in batch_examples]
        )  # fmt: skip
        error = log_probs.gather(1, targets.ids).exp() - targets.log_probs.exp()
        assert error.abs().max() < 2e-3
        top = log_probs.topk(6)
        assert torch.equal(top.indices.sort(1).values, targets.ids)
        total = targets.log_probs.exp().sum(1) + targets.log_tail.exp()
        torch.testing.assert_close(total, torch.ones(len(total)), rtol=1e-5, atol=1e-5)


def test_entries_under_the_threshold_go_to_the_tail():
    log_probs = torch.tensor([[0.6, 0.3, 0.06, 0.04], [0.04, 0.9, 0.05, 0.01]]).log()
    targets = keep(log_probs, CacheConfig(top_k=3, min_probability=0.045)).targets()
    assert targets.ids.tolist() == [[0, 1, 2], [1, 2, 2]]
    assert targets.log_probs.exp()[0].tolist() == pytest.approx([0.6, 0.3, 0.06], abs=1e-3)
    assert targets.log_probs[1, 2] == -torch.inf
    assert targets.log_tail.exp().tolist() == pytest.approx([0.04, 0.05], abs=1e-4)
    even = keep(log_probs, CacheConfig(top_k=1, min_probability=0.99))
    assert even.counts.tolist() == [1, 1]
    stored_probs = torch.tensor([[0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3], [0.1 / 3, 0.9, 0.1 / 3, 0.1 / 3]])
    expected = (log_probs.exp() * (log_probs - stored_probs.log())).sum(-1)
    torch.testing.assert_close(reconstruction_kl(log_probs, even.targets()), expected, rtol=1e-3, atol=1e-4)


def test_draws_average_to_the_teacher():
    log_probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(4)
    for _ in range(400):
        targets = draw(log_probs, 10, generator).targets(num_draws=10)
        total.scatter_add_(0, targets.ids[0], targets.log_probs[0].exp())
        assert targets.log_tail[0] == -torch.inf
    assert (total / 400).tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.02)


def test_what_is_not_stored_is_an_error(tmp_path, teacher, name):
    whole, ending = examples(), examples(**{"truncation.lead_fraction": 0.5, "truncation.keep_ending": True})
    answers = examples(**{"supervision.preset": "answer"})
    fill(teacher, name, asked(answers), tmp_path)
    with pytest.raises(PairError, match="no sequence that begins as this one of"):
        read_all(tmp_path, ending)
    with pytest.raises(PairError, match=r"not stored at .* of the positions asked for .first: token"):
        read_all(tmp_path, whole)
    fill(teacher, name, asked(whole), tmp_path)
    read_all(tmp_path, [*whole, *answers])


def test_further_traces_are_added_and_old_shards_stay(tmp_path, teacher, name):
    whole, ending = examples(), examples(**{"truncation.lead_fraction": 0.5, "truncation.keep_ending": True})
    fill(teacher, name, asked(whole[:5]), tmp_path)
    before = contents(tmp_path)
    fill(teacher, name, asked([*whole, *ending]), tmp_path)
    after = contents(tmp_path)
    assert {n: b for n, b in before.items() if n.startswith("shard")}.items() <= after.items()
    read_all(tmp_path, [*whole, *ending])
    assert fill(teacher, name, asked([*whole, *ending]), tmp_path)["shards_written"] == 0
    assert contents(tmp_path) == after
    stored_once = [tuple(s.sequence(i).ids) for s in TeacherCache(tmp_path).shards for i in range(len(s))]
    assert len(stored_once) == len(set(stored_once))


# Other teachers, other forms


def test_another_teacher_is_refused(tmp_path, teacher, name):
    other = save_model(tmp_path / "other", seed=8)
    whole = examples()
    fill(teacher, name, asked(whole), tmp_path / "cache")
    spec = spec_of(teacher, other, model_hash(other), VOCAB, CacheConfig())
    with pytest.raises(
        PairError, match=rf"another cache .*teacher_hash {model_hash(name)} there and {model_hash(other)}"
    ):
        build_cache(teacher, spec, asked(whole), tmp_path / "cache")
    with pytest.raises(PairError, match=r"config .* there and .* here"):
        fill(teacher, name, asked(whole), tmp_path / "cache", top_k=3)
    config = run_config({"teacher.cache": str(tmp_path / "cache"), "teacher.model": other})
    with pytest.raises(PairError, match="written with another teacher"):
        load_teacher(config, Ranks(0, 1, CPU))
    fill(load_model(other, layout="packed"), other, asked(whole), tmp_path / "foreign")
    foreign = next((tmp_path / "foreign").glob(SHARDS))
    foreign.rename(tmp_path / "cache" / foreign.name)
    seal(tmp_path / "cache")
    with pytest.raises(PairError, match="of another teacher or form than the cache around it"):
        TeacherCache(tmp_path / "cache")


def test_a_directory_that_is_no_cache_is_left_alone(tmp_path, teacher, name):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty, and no teacher cache"):
        fill(teacher, name, asked(examples()), tmp_path)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


# Damage


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory, name):
    out = tmp_path_factory.mktemp("whole") / "cache"
    write_cache(name, CacheConfig(), asked(examples()), out, CacheConfig())
    return out


def copy(source, target):
    target.mkdir(exist_ok=True)
    for file, data in contents(source).items():
        (target / file).write_bytes(data)
    return target


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_damage_anywhere_is_found_and_named(tmp_path, whole_cache, kind):
    rng, intact = random.Random(3), contents(whole_cache)
    work = copy(whole_cache, tmp_path)
    verify(work)
    places = [(file, rng.randrange(len(intact[file]))) for file in intact for _ in range(50)]
    for file, place in places:
        data = bytearray(intact[file])
        if kind == "flip":
            data[place] ^= 1 << rng.randrange(8)
        else:
            del data[place:]
        (work / file).write_bytes(bytes(data))
        with pytest.raises(CheckpointError) as caught:
            verify(work)
        named = file in str(caught.value) or file == CHECKSUMS
        assert named and "\n" not in str(caught.value), (file, place)
        (work / file).write_bytes(intact[file])
    verify(work)


def test_a_damaged_record_is_found_when_it_is_read(tmp_path, whole_cache):
    """Without a whole verification, and with checksums of the files that fit the damage."""
    work = copy(whole_cache, tmp_path)
    path = next(work.glob(SHARDS))
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))
    seal(work)
    with pytest.raises(CheckpointError, match=r"shard-.*damaged .the checksum of its record"):
        read_all(work, examples())


def test_a_missing_or_strange_file_is_named(tmp_path, whole_cache):
    work = copy(whole_cache, tmp_path)
    path = next(work.glob(SHARDS))
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        TeacherCache(work)


def test_a_damaged_shard_alone_is_rebuilt(tmp_path, teacher, name, monkeypatch):
    sequences = asked(examples())
    fill(teacher, name, sequences, tmp_path)
    intact = contents(tmp_path)
    shards = [file for file in intact if file.startswith("shard")]
    assert len(shards) > 2
    path = tmp_path / shards[1]
    path.write_bytes(intact[shards[1]][:-5])
    (tmp_path / shards[2]).unlink()
    scored = []
    original = building.score_shard
    monkeypatch.setattr(building, "score_shard", lambda *a: (scored.append(a[3].name), original(*a)))
    assert fill(teacher, name, sequences, tmp_path)["shards_written"] == 2
    assert scored == shards[1:3]
    assert contents(tmp_path) == intact


def test_a_damaged_description_is_written_anew(tmp_path, name, whole_cache):
    work = copy(whole_cache, tmp_path)
    (work / "cache.json").write_text("{")
    write_cache(name, CacheConfig(), asked(examples()), work, CacheConfig())
    verify(work)
    assert contents(work)["cache.json"] == contents(whole_cache)["cache.json"]


# Interruption


def build_slowly(name, out):
    torch.set_num_threads(1)
    original = building.score_shard

    def slow(*arguments):
        original(*arguments)
        time.sleep(0.3)

    building.score_shard = slow
    fill(load_model(name, layout="packed"), name, asked(examples()), out)


def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path, teacher, name):
    fill(teacher, name, asked(examples()), tmp_path / "whole")
    out = tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=build_slowly, args=(name, out))
    process.start()
    deadline = time.monotonic() + 60
    while len(list(out.glob(SHARDS))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    survivors = {path.name: path.stat().st_mtime_ns for path in out.glob(SHARDS)}
    assert 2 <= len(survivors) < len(list((tmp_path / "whole").glob(SHARDS)))
    with pytest.raises(CheckpointError, match="not finished"):
        TeacherCache(out)
    (out / "shard-half.bin.partial").write_bytes(b"half")
    counts = fill(teacher, name, asked(examples()), out)
    assert counts["shards_kept"] == len(survivors)
    assert contents(out) == contents(tmp_path / "whole")
    assert all((out / file).stat().st_mtime_ns == stamp for file, stamp in survivors.items())


# The stage


@pytest.mark.parametrize("mode", ["top_k", "sampled", "hidden"])
def test_the_command_line_from_end_to_end(tmp_path, capsys, mode):
    out = tmp_path / "cache"
    flags = ["--teacher", "tiny-teacher", "--source", "builtin:chain", "--num-traces", "12", "--mode", mode]

    def limbeck(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        return caught.value.code, capsys.readouterr()

    assert limbeck("teacher", "cache", *flags, "--out", str(out))[0] == 0
    code, said = limbeck("teacher", "stats", str(out))
    assert code == 0 and "bytes_per_token" in said.out and "kl_to_full_teacher_nats" in said.out
    assert limbeck("teacher", "verify", str(out))[0] == 0
    before = contents(out)
    assert limbeck("teacher", "cache", *flags, "--out", str(out))[0] == 0
    assert contents(out) == before
    recipe = ["--student.model", "tiny-student", "--traces.source", "builtin:chain", "--num-traces", "12"]
    recipe += ["--num-validation", "2", "--max-steps", "1", "--teacher.cache", str(out), "--lead-fraction", "0.6"]
    assert limbeck("distill", *recipe, "--out", str(tmp_path / "run"))[0] == 0
    path = next(out.glob(SHARDS))
    path.write_bytes(path.read_bytes()[:-1])
    code, said = limbeck("teacher", "verify", str(out))
    assert code == 2 and path.name in said.err.replace("\n", "")
    assert limbeck("teacher", "cache", *flags, "--out", str(out))[0] == 0
    assert {n: b for n, b in contents(out).items() if n.startswith(("shard", "cache"))} == {
        n: b for n, b in before.items() if n.startswith(("shard", "cache"))
    }


def test_the_manifest_reports_cost_and_fidelity(tmp_path):
    tree = {"teacher": "tiny-teacher", "traces": {"source": "builtin:chain", "num_traces": 12}}
    kept = {}
    for top_k in (1, 8):
        config = build(caching.CacheStageConfig, {**tree, "cache": {"top_k": top_k, "min_probability": 0.0}})
        made = caching.run(config, tmp_path / str(top_k))
        kept[top_k] = {**made.metrics, **building.stats(made.path), "flops": made.cost["flops"]["total"]}
    assert kept[1]["entries_per_position"] == 1 and kept[8]["entries_per_position"] == 8
    assert 0 <= kept[8]["kl_to_full_teacher_nats"] < kept[1]["kl_to_full_teacher_nats"]
    assert kept[1]["mass_kept"] < kept[8]["mass_kept"] <= 1 + 1e-6
    assert kept[1]["bytes_per_token"] < kept[8]["bytes_per_token"]
    assert kept[8]["flops"] > 0 and kept[8]["positions"] < kept[8]["tokens"]
    with pytest.raises(LimbeckError):
        caching.run(build(caching.CacheStageConfig, tree), tmp_path / "8")
