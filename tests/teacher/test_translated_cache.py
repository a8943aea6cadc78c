"""A cache for a student with another tokenizer: the teacher's words about the same text, in the student's tokens."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_tokenizers import byte_tokenizer
from tiny_runs import metrics_of, run_config, save_model

from limbeck.config import build
from limbeck.distill import caching, train
from limbeck.distill.caching_cost import predict_cache
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import prepare
from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.fused import fused_loss
from limbeck.errors import ConfigError, PairError
from limbeck.models.load import load_model, load_tokenizer
from limbeck.teacher.build import stats, write_cache
from limbeck.teacher.cache import CacheConfig, TeacherCache
from limbeck.teacher.exchange import ExportCacheConfig, export_cache
from limbeck.teacher.reading import Reader
from limbeck.traces.batch import collate
from limbeck.traces.render import render
from limbeck.traces.sources import read_traces
from limbeck.traces.trace import Trace, write_jsonl

MERGES = ("Ġ 7", "1 +", "i v", "Ċ a")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), sharpness=40.0)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Of the same shape, with a byte-level tokenizer."""
    place, tokenizer = tmp_path_factory.mktemp("student"), byte_tokenizer(merges=MERGES)
    save_model(place, vocab_size=len(tokenizer), seed=3)
    tokenizer.save_pretrained(place)
    return str(place)


def config_of(teacher, tokenizer, segments="cot+answer", **cache):
    tree = {"teacher": teacher, "traces": run_config().traces, "segments": segments}
    return build(caching.CacheStageConfig, tree | {"cache": {"tokenizer": tokenizer, **cache}})


@pytest.fixture(scope="module")
def cache(teacher, student, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "cache"
    caching.run(config_of(teacher, student), out)
    return out


def targets_of(directory, examples):
    batch = collate(examples, "packed", 0)
    return TeacherCache(directory).look_up(batch, examples, batch.target_rows())


def test_of_the_teachers_own_tokenizer_it_is_the_plain_cache(teacher, tmp_path):
    plain = caching.run(config_of(teacher, ""), tmp_path / "plain")
    translated = caching.run(config_of(teacher, teacher), tmp_path / "translated")
    found = translated.metrics
    assert (found["vocabulary_matched"], found["positions_with_target"], found["positions_same_start"]) == (1, 1, 1)
    assert found["positions_over_several"] == 0
    assert found["mass_exact"] > 1 - 1e-3
    assert found["tokens_asked"] == plain.metrics["tokens_asked"]
    examples = prepare(run_config(), load_tokenizer(teacher)).train
    one, other = targets_of(tmp_path / "plain", examples), targets_of(tmp_path / "translated", examples)
    assert torch.equal(one.ids, other.ids)
    torch.testing.assert_close(other.log_probs, one.log_probs, rtol=0, atol=2e-3)
    torch.testing.assert_close(other.log_tail.exp(), one.log_tail.exp(), rtol=0, atol=1e-4)


def test_the_text_is_as_likely_as_the_teacher_says(teacher, student, cache):
    """Tokens of both multiply to the probability of the whole response, wherever their borders lie."""
    run = run_config({"student.model": student})
    trace = read_traces(run.traces)[0][0]
    sample = render(trace, load_tokenizer(student), run.render)
    reading = Reader(teacher, student, run.render).read(sample, trace.messages)
    answered = sample.segment_ids > 0
    assert (reading.spans.first[answered] > 0).all()
    assert (reading.spans.first[~answered] == -1).all()
    ids = torch.from_numpy(reading.ids.astype(np.int64))
    with torch.no_grad():
        log_probs = load_model(teacher)(ids[None]).logits[0].log_softmax(-1)
    first = int(reading.spans.first[answered].min())
    theirs = float(log_probs[torch.arange(first - 1, len(ids) - 1), ids[first:]].sum())
    example = next(e for e in prepare(run, load_tokenizer(student)).train if e.sample.trace_key == sample.trace_key)
    targets = targets_of(cache, [example])
    own = torch.from_numpy(sample.input_ids[answered].astype(np.int64))
    is_own = targets.ids == own[:, None]
    is_own &= torch.isfinite(targets.log_probs)
    stored = is_own.any(1)
    assert stored.float().mean() > 0.3
    ours = float(torch.where(is_own, targets.log_probs, 0.0).sum())
    # What is not stored was below the least probability; the tail says nothing of it alone.
    assert ours > theirs
    assert load_tokenizer(teacher).decode(reading.ids).endswith("<|im_end|>")


def test_a_student_learns_from_it_as_from_any_cache(student, teacher, cache, tmp_path):
    settings = {"student.model": student, "teacher.cache": cache, "loss.kd_ratio": 1.0, "training.max_steps": 25}
    settings |= {"optimizer.learning_rate": 2e-2}
    train.run(run_config(settings), tmp_path / "run")
    losses = [line["kd_term"] for line in metrics_of(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]
    train.run(run_config({**settings, "teacher.model": teacher, "training.max_steps": 1}), tmp_path / "named")


def test_it_says_how_true_it_is_and_what_it_costs(student, teacher, cache):
    found = stats(cache)
    assert 0.5 < found["vocabulary_matched"] < 1
    assert found["positions_with_target"] == 1
    assert 0 < found["positions_same_start"] < 1
    assert found["positions_over_several"] > 0
    masses = [found[f"mass_{kind}"] for kind in ("exact", "shorter", "longer", "open")]
    assert sum(masses) == pytest.approx(1)
    assert found["kl_to_full_teacher_nats"] is None
    assert predict_cache(config_of(teacher, student)).flops["teacher"] == found["flops"]


def test_pairs_that_it_is_not_for_are_refused(student, teacher, cache, tmp_path):
    with pytest.raises(PairError, match=r"tokenizer differs.*--cache\.tokenizer STUDENT"):
        train.run(run_config({"student.model": student, "teacher.model": teacher}), tmp_path / "live")
    other = byte_tokenizer(merges=("Ġ 7", "1 +", "i v", "Ċ b"))
    save_model(tmp_path / "other", vocab_size=len(other))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(PairError, match="and the student's is another"):
        train.run(run_config({"student.model": str(tmp_path / "other"), "teacher.cache": cache}), tmp_path / "run")
    with pytest.raises(PairError, match="holds another cache"):
        caching.run(config_of(teacher, str(tmp_path / "other")), cache)
    with pytest.raises(ConfigError, match="no targets in it"):
        config_of(teacher, student, segments="prompt+cot+answer")
    with pytest.raises(ConfigError, match="mode top_k"):
        config_of(teacher, student, mode="hidden")
    with pytest.raises(ConfigError, match="only `limbeck teacher cache`"):
        write_cache(teacher, CacheConfig(tokenizer=student), [], tmp_path / "cache", None)


def test_a_teacher_with_another_template_reads_its_own(teacher, student, tmp_path):
    run = run_config({"student.model": student})
    trace = read_traces(run.traces)[0][0]
    tokenizer = load_tokenizer(teacher)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] }}<", "'Q: ' + message['content'] }}<"
    )
    load_model(teacher).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sample = render(trace, load_tokenizer(student), run.render)
    readings = [Reader(name, student, run.render).read(sample, trace.messages) for name in (teacher, str(tmp_path))]
    assert len(readings[1].ids) > len(readings[0].ids)
    answered = sample.segment_ids > 0
    shift = len(readings[1].ids) - len(readings[0].ids)
    assert ((readings[1].spans.first - readings[0].spans.first)[answered] == shift).all()
    assert (readings[1].spans.skipped == readings[0].spans.skipped).all()


def test_where_the_text_was_changed_the_teacher_says_nothing(teacher, student, tmp_path):
    """A letter that the teacher's tokenizer does not know ends what both read; behind it all is tail."""
    thoughts = {"1": "Given 1\nSo 1", "2": "Soß 1"}
    traces = [
        Trace(messages=({"role": "user", "content": asked},), cot=cot, answer="1") for asked, cot in thoughts.items()
    ]
    write_jsonl(traces, tmp_path / "traces.jsonl")
    source = {"source": str(tmp_path / "traces.jsonl")}
    config = build(caching.CacheStageConfig, {"teacher": teacher, "traces": source, "cache": {"tokenizer": student}})
    found = caching.run(config, tmp_path / "cache").metrics
    assert 0.5 < found["positions_with_target"] < 1
    tree = {"student": {"model": student}, "traces": source, "num_validation": 0}
    examples = prepare(build(DistillConfig, tree), load_tokenizer(student)).train
    targets = targets_of(tmp_path / "cache", examples)
    is_unknown = targets.log_tail == 0
    assert int(is_unknown.sum()) == round((1 - found["positions_with_target"]) * found["positions"])
    hidden = torch.randn(len(targets), 5, requires_grad=True)
    loss = fused_loss(
        hidden,
        torch.randn(4 + 256 + len(MERGES), 5),
        torch.zeros(len(targets), dtype=torch.int64),
        ce_coef=torch.zeros(len(targets)),
        kd_coef=is_unknown.float(),
        targets=targets,
        divergence=DivergenceConfig(),
    )
    loss.total.backward()
    assert float(loss.total.detach()) == 0
    assert not hidden.grad.any()
    columns = export_cache(ExportCacheConfig(cache=tmp_path / "cache", format="parquet"), tmp_path / "columns").path
    written = pq.read_table(columns / "targets.parquet").to_pylist()
    assert sum(len(row["target_positions"]) for row in written) == int((~is_unknown).sum())
