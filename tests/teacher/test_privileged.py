"""A teacher that sees the solution: its words on the response, stored under what the student reads."""

import numpy as np
import pytest
import torch
from tiny_runs import CPU, metrics_of, run_config, save_model

from limbeck.config import build
from limbeck.cost.hardware import Hardware
from limbeck.distill import caching, train
from limbeck.distill.caching import CacheStageConfig
from limbeck.distill.caching_cost import predict_cache
from limbeck.distill.data import prepare
from limbeck.distill.pair import load_teacher
from limbeck.distill.parallel import Ranks
from limbeck.distill.privileged import shown
from limbeck.errors import ConfigError, PairError, TraceFormatError
from limbeck.ledger import Ledger
from limbeck.models.load import load_model
from limbeck.models.tiny import symbol_tokenizer
from limbeck.teacher.build import share_prefixes
from limbeck.teacher.shard import Stored
from limbeck.traces.batch import collate
from limbeck.traces.render import RenderConfig, render_prompt
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.trace import Trace

CHAIN = {"source": "builtin:chain", "num_traces": 6, "chain_min_steps": 1, "chain_max_steps": 2}
SHOWN = "{prompt} {answer}"


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), sharpness=40.0)


def cached(name, out, **cache):
    tree = {"teacher": name, "traces": CHAIN, "cache": {"mode": "top_k", "top_k": 56, "min_probability": 0.0, **cache}}
    return caching.run(build(CacheStageConfig, tree), out), build(CacheStageConfig, tree)


def targets(directory, examples):
    config = run_config({"traces": CHAIN, "num_validation": 0, "teacher.cache": str(directory)})
    batch = collate(examples, "packed", 0)
    rows = batch.target_rows()
    found = load_teacher(config, Ranks(0, 1, CPU)).targets(batch, examples, rows, Ledger())
    dense = torch.full((len(rows), 49), -torch.inf)
    return dense.scatter_(1, found.ids.long(), found.log_probs), batch


@pytest.fixture
def examples():
    return prepare(run_config({"traces": CHAIN, "num_validation": 0}), symbol_tokenizer()).train


def test_the_teacher_reads_its_own_prompt(tmp_path, name, examples):
    checkpoint, config = cached(name, tmp_path / "cache", privileged=SHOWN)
    found, _ = targets(tmp_path / "cache", examples)
    model, tokenizer = load_model(name), symbol_tokenizer()
    traces = {trace.key: trace for trace in read_traces(build(TraceConfig, CHAIN))[0]}
    start = 0
    for example in examples:
        trace, ids = traces[example.sample.trace_key], example.sample.input_ids
        theirs = render_prompt(tokenizer, shown(trace, SHOWN), RenderConfig())
        own = render_prompt(tokenizer, trace.messages, RenderConfig())
        assert theirs != own
        response = ids[len(own) :].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([theirs + response])).logits[0]
        expected = logits[len(theirs) - 1 : -1].log_softmax(-1)
        part = found[start : start + len(response)]
        torch.testing.assert_close(part.exp(), expected.exp(), atol=2e-3, rtol=0)
        start += len(response)
    assert start == len(found)
    predicted = predict_cache(config, hardware=Hardware("test", {"float32": 1e11}, 1e10, 2**34))
    assert predicted.flops["teacher"] == checkpoint.cost["flops"]["teacher"]


def test_a_teacher_that_is_shown_nothing_more_is_the_plain_one(tmp_path, name, examples):
    cached(name, tmp_path / "plain")
    cached(name, tmp_path / "same", privileged="{prompt}")
    plain, same = (targets(tmp_path / place, examples)[0] for place in ("plain", "same"))
    torch.testing.assert_close(plain.exp(), same.exp(), atol=1e-3, rtol=0)
    with pytest.raises(PairError, match="holds another cache"):
        cached(name, tmp_path / "plain", privileged="{prompt}")


def test_a_student_learns_from_itself_with_the_solution(tmp_path, name):
    cached(name, tmp_path / "cache", privileged=SHOWN)
    changes = {"student.model": name, "traces": CHAIN, "num_validation": 0, "loss.kd_ratio": 1.0}
    changes |= {"training.batch_size": 6, "training.max_steps": 6, "optimizer.learning_rate": 1e-4}
    train.run(run_config({**changes, "teacher.cache": str(tmp_path / "cache")}), tmp_path / "out")
    losses = [row["kd_term"] for row in metrics_of(tmp_path / "out")]
    # A random model hardly looks back, so it has little to learn from itself.
    assert losses[0] > 1e-5 and min(losses[1:]) < losses[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cache": {"privileged": "{answer}"}}, "needs {prompt}"),
        ({"cache": {"privileged": "{prompt} {key}"}}, "it needs {prompt} and may hold"),
        ({"cache": {"privileged": "{prompt} {"}}, "write braces"),
        ({"cache": {"privileged": SHOWN}, "segments": "prompt+answer"}, "carry no loss"),
        ({"cache": {"privileged": SHOWN}, "truncation": {"policy": "tail", "lead_fraction": 0.5}}, "must be whole"),
    ],
)
def test_what_cannot_be_aligned_is_refused(tmp_path, name, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        caching.run(build(CacheStageConfig, {"teacher": name, "traces": CHAIN, **changes}), tmp_path / "cache")


def test_a_trace_without_what_is_shown_is_refused_by_place():
    trace = Trace(messages=({"role": "user", "content": "?"},), cot=None, answer="b", source="t.jsonl:3")
    with pytest.raises(TraceFormatError, match=r"t\.jsonl:3: privileged shows the reference"):
        shown(trace, "{prompt} {reference}")
    assert shown(trace, "{prompt} {answer}") == [{"role": "user", "content": "? b"}]


def test_one_text_is_not_stored_for_two_prompts():
    ids, positions = np.array([1, 2, 3], dtype=np.int32), np.array([False, False, True])
    prompts = [np.array([7], dtype=np.int32), np.array([8], dtype=np.int32)]
    with pytest.raises(PairError, match="two different privileged prompts"):
        share_prefixes([Stored(ids, positions, prompt, 1) for prompt in prompts])
    (root,) = share_prefixes([Stored(ids, positions, prompts[0], 1)] * 2)
    assert root.as_read().ids.tolist() == [7, 2, 3] and root.as_read().positions.tolist() == [False, False, True]
