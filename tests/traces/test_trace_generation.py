"""Trace generation: whole, resumed after any interruption, local and served; and the journal under it."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from model_server import ModelServer

from limbeck.checkpoint import Checkpoint
from limbeck.config import build
from limbeck.errors import CheckpointError, ConfigError, LimbeckError
from limbeck.traces import generation
from limbeck.traces.generation import GenerateConfig, run, to_thought
from limbeck.traces.journal import Journal
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.thought import THINK

FEW = {"source": "builtin:chain", "num_traces": 6, "chain_min_steps": 1, "chain_max_steps": 2}


def config_of(**changes):
    tree = {
        "prompts": FEW,
        "model": "tiny-teacher",
        "sampling": {"max_new_tokens": 96, "temperature": 0.8, "num_samples": 2, "seed": 3},
        "group_prompts": 2,
        "on_bad": "keep",
    }
    return build(GenerateConfig, {**tree, **changes})


def served_config(url, **changes):
    client = {"backoff_seconds": 0.001, "max_backoff_seconds": 0.01, "retries": 2, "concurrency": 3}
    return config_of(model=None, server=url, client=client, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(config_of(), out)
    return (out / "traces.jsonl").read_bytes()


def test_writes_traces_with_their_origin(whole, tmp_path):
    out = tmp_path / "out"
    result = run(config_of(), out).manifest["counts"]
    assert (out / "traces.jsonl").read_bytes() == whole
    assert sorted(path.name for path in out.iterdir()) == ["limbeck.json", "skipped.json", "traces.jsonl"]
    traces, _ = read_traces(TraceConfig(source=str(out / "traces.jsonl"), on_bad="keep"))
    prompts, _ = read_traces(TraceConfig(**FEW))
    assert result["samples"] == 2 * result["prompts"] == result["kept"] + result["skipped"]
    assert {trace.prompt_key for trace in traces} <= {prompt.prompt_key for prompt in prompts}
    assert all(trace.reference is not None and trace.correct is None for trace in traces)
    # The built-in teacher knows its task: most of its answers are the reference.
    assert sum(trace.answer == trace.reference for trace in traces) > len(traces) / 2
    manifest = Checkpoint(out).manifest
    assert manifest["config"]["sampling"]["temperature"] == 0.8
    assert manifest["counts"]["generated_tokens"] == sum(trace.metadata["output_tokens"] for trace in traces)


def test_a_file_of_prompts_alone_is_answered_as_its_traces_are(whole, tmp_path):
    traces, _ = read_traces(TraceConfig(**FEW))
    lines = [json.dumps({"messages": list(trace.messages), "reference": trace.reference}) for trace in traces]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    run(config_of(prompts={"source": str(tmp_path / "prompts.jsonl")}), tmp_path / "out")
    written = [json.loads(line) for line in (tmp_path / "out" / "traces.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in whole.splitlines()]
    for name in ("messages", "cot", "answer", "reference"):
        assert [trace[name] for trace in written] == [trace[name] for trace in expected]


def test_a_finished_run_does_nothing_again(tmp_path):
    out = tmp_path / "out"
    first = run(config_of(), out)
    before = (out / "traces.jsonl").stat().st_mtime_ns
    assert run(config_of(), out) == first
    assert (out / "traces.jsonl").stat().st_mtime_ns == before


class Interruption(BaseException):
    """Like KeyboardInterrupt: nothing may catch it."""


@pytest.mark.parametrize("moment", range(20))
def test_interrupted_at_a_random_moment_it_ends_with_the_same_file(moment, whole, tmp_path, monkeypatch):
    """The journal's file is cut at a random byte of what would have been written, and the run ends there."""
    chance = random.Random(moment)
    out, config = tmp_path / "out", config_of()
    written = Journal._write
    fatal = chance.randrange(4)
    calls = iter(range(100))

    def torn(journal, lines):
        start = journal.path.stat().st_size
        written(journal, lines)
        if next(calls) == fatal:
            end = journal.path.stat().st_size
            os.truncate(journal.path, chance.randint(start, end))
            raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_write", torn)
        with pytest.raises(Interruption):
            run(config, out)
    assert not out.exists()
    run(config, out)
    assert (out / "traces.jsonl").read_bytes() == whole


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1])
def test_killed_it_ends_with_the_same_file(delay, whole, tmp_path):
    """Real SIGKILLs, a little after the journal has appeared."""
    out = tmp_path / "out"
    arguments = ["--prompts.source", "builtin:chain", "--num-traces", "6", "--chain-min-steps", "1"]
    arguments += ["--chain-max-steps", "2", "--model", "tiny-teacher", "--max-new-tokens", "96", "--temperature", "0.8"]
    arguments += ["--num-samples", "2", "--sampling.seed", "3", "--group-prompts", "2", "--on-bad", "keep"]
    command = [sys.executable, "-m", "limbeck", "traces", "generate", *arguments, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = out.with_name("out.partial") / generation.JOURNAL_FILE
    while process.poll() is None and not journal.exists():
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert (out / "traces.jsonl").read_bytes() == whole


def test_work_of_another_job_is_refused(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, "one") as journal:
        journal.add({("p", 0): {"text": "x"}})
    with pytest.raises(CheckpointError, match="another job"):
        Journal(path, "two")


def test_the_journal_keeps_what_was_written_first_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, "job") as journal:
        journal.add({("p", 0): {"text": "é\n"}, ("p", 1): {"text": "b"}})
        journal.add({("p", 0): {"text": "again"}})
    path.write_bytes(path.read_bytes()[:-3])
    with Journal(path, "job") as journal:
        assert journal.records == {("p", 0): {"text": "é\n"}}
        journal.add({("p", 1): {"text": "c"}})
    assert len(path.read_bytes().splitlines()) == 3
    path.write_bytes(path.read_bytes().replace(b'"text"', b'text"', 1))
    with pytest.raises(CheckpointError, match="line 2 is damaged"):
        Journal(path, "job")


def test_a_server_writes_traces_with_their_reasoning(tmp_path):
    with ModelServer(faults=[None, 503, None, 429]) as server:
        result = run(served_config(server.url), tmp_path / "out").manifest["counts"]
    traces, _ = read_traces(TraceConfig(source=str(tmp_path / "out" / "traces.jsonl")))
    asked = [body for path, body in server.requests if path == "/v1/chat/completions"]
    # Two faults were asked again with the same seed.
    assert len(asked) == 14 and len({body["seed"] for body in asked}) == 12 == result["samples"]
    assert asked[0]["temperature"] == 0.8 and asked[0]["max_tokens"] == 96
    assert all(trace.cot.startswith("about ") and trace.answer.startswith("seed ") for trace in traces)
    assert result["generated_tokens"] == 12 * 5 and result["prompt_tokens"] == 12 * 7


def test_a_server_that_dies_loses_nothing_and_nothing_comes_twice(tmp_path):
    out = tmp_path / "out"
    with ModelServer(faults=[None] * 6 + [500] * 200) as server, pytest.raises(LimbeckError, match="status 500"):
        run(served_config(server.url), out)
    journal = out.with_name("out.partial") / generation.JOURNAL_FILE
    kept = len(journal.read_bytes().splitlines()) - 1
    assert 0 < kept < 12
    with ModelServer() as again:
        run(served_config(again.url), out)
    assert len([1 for path, _ in again.requests if path == "/v1/chat/completions"]) == 12 - kept
    lines = [json.loads(line) for line in (out / "traces.jsonl").read_text().splitlines()]
    assert len({(line["source"]) for line in lines}) == len(lines) == 12


def test_reads_thoughts_from_fields_and_from_tags():
    base = {"stopped": True, "reasoning": None}
    assert to_thought({**base, "text": "<think>\nwhy\n</think>\n4"}, THINK).cot == "why"
    assert to_thought({**base, "text": "why\n</think>\n4"}, THINK).answer == "4"
    assert to_thought({**base, "text": "4", "reasoning": "why"}, THINK)[:2] == ("why", "4")
    assert to_thought({**base, "text": "", "reasoning": "why"}, THINK).cot_closed is False
    cut = to_thought({"text": "why\n</think>\nThe ans", "reasoning": None, "stopped": False}, THINK)
    assert cut.problem.startswith("cut")


def test_outputs_that_are_no_trace_are_counted_and_kept_apart(tmp_path):
    config = config_of(sampling={"max_new_tokens": 3}, on_bad="skip")
    with pytest.raises(LimbeckError, match="none of 6 outputs is a whole trace"):
        run(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "exactly one of model and server"),
        ({"model": None, "server": "host:1"}, "expected http"),
        ({"group_prompts": 0}, "group_prompts must be at least 1"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**changes)
