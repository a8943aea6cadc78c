"""From prompts to a student on the command line: generate, verify, distil."""

import json

import pytest

from limbeck.checkpoint import Checkpoint
from limbeck.cli import main


def call(capfd, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return stopped.value.code, out, err


def test_generate_verify_distill(tmp_path, capfd):
    made, checked, student = tmp_path / "made", tmp_path / "checked", tmp_path / "student"
    source = ("--source", "builtin:chain", "--num-traces", 6, "--chain-min-steps", 1, "--chain-max-steps", 2)
    sampling = ("--max-new-tokens", 96, "--temperature", 0.7, "--num-samples", 2)
    generate = ("traces", "generate", "--model", "tiny-teacher", *source, *sampling, "--out", made, "--json")
    code, out, err = call(capfd, *generate)
    assert code == 0, err
    assert json.loads(out)["samples"] == 12
    test_set = [{"source": "builtin:chain", "num_traces": 1, "chain_min_steps": 1, "chain_max_steps": 2}]
    recipe = tmp_path / "verify.yaml"
    recipe.write_text(json.dumps({"traces": {"source": str(made / "traces.jsonl")}, "evaluation": test_set}))
    code, out, err = call(capfd, "traces", "verify", recipe, "--checker", "exact", "--out", checked, "--json")
    assert code == 0, err
    counts = Checkpoint(checked).manifest["counts"]
    # The first problem of the source is the evaluation set: its traces must go.
    assert counts["dropped"]["overlap with an evaluation problem"] >= 1
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["read"]["kept"]
    training = ("--max-steps", 2, "--num-validation", 0, "--training.batch-size", 2, "--select.deduplicate", "false")
    pair = ("--student.model", "tiny-student", "--teacher.model", "tiny-teacher")
    code, _, err = call(
        capfd, "distill", "--traces.source", checked / "traces.jsonl", *pair, *training, "--out", student
    )
    assert code == 0, err
    assert Checkpoint(student).manifest["counts"]["preflight"]["end_of_turn_trained_fraction"] == 1.0


def test_a_server_that_is_not_there_is_one_line(tmp_path, capfd):
    source = ("--source", "builtin:chain", "--num-traces", 2)
    server = ("--server", "http://127.0.0.1:9", "--retries", 1, "--client.backoff-seconds", 0.01)
    code, _, err = call(capfd, "traces", "generate", *source, *server, "--out", tmp_path / "out")
    assert code == 2
    assert err.count("\n") == 1 and "http://127.0.0.1:9/v1/models: no answer (ConnectError" in err
    assert "Traceback" not in err and "2 times" in err
