"""Broken traces, recipes and models through the command line: one clear line, exit code 2, nothing left behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import SHAPE, save_model

from limbeck.cli import main
from limbeck.traces.synthetic import generate
from limbeck.traces.trace import write_jsonl

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>c</think>a"}]
GOOD = json.dumps({"messages": TURNS})


def contents(directory: Path) -> dict[str, int]:
    return {str(path.relative_to(directory)): path.stat().st_size for path in directory.rglob("*")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, with the good traces and the recipe that the tests spoil."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("limbeck.progress._LINE_EVERY_SECONDS", float("inf"))
    write_jsonl(generate(12, 0, 1, 3), tmp_path / "good.jsonl")
    recipe = {
        "student": {"scratch": SHAPE},
        "traces": {"source": "good.jsonl"},
        "num_validation": 2,
        "training": {"max_steps": 2, "batch_size": 2},
    }
    (tmp_path / "good.yaml").write_text(json.dumps(recipe))
    return tmp_path


@pytest.fixture
def refused(place, capfd):
    """Run a command that must fail; returns its one line."""

    def run(*arguments: str) -> str:
        before = contents(place)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert stopped.value.code == 2, err
        assert out == ""
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1 and lines[0].startswith("limbeck: "), err
        assert contents(place) == before
        return lines[0]

    return run


def reply(content):
    return json.dumps({"messages": [TURNS[0], {"role": "assistant", "content": content}]})


TRACE_FILES = {
    "empty": ("", "the file holds no records"),
    "blank lines": ("\n\n", "the file holds no records"),
    "no JSON": ("hello\n", r"traces.jsonl:1\b|line 1"),
    "torn line": (GOOD + "\n" + GOOD[:-9] + "\n", r"traces.jsonl.*\b2\b"),
    "a number": ("7\n", "traces.jsonl"),
    "a list": ("[1]\n", "traces.jsonl"),
    "no known field": ('{"foo": 1}\n', "foo"),
    "no message": ('{"messages": []}\n', "no turns"),
    "messages no list": ('{"messages": "x"}\n', "turns are not a list: found str"),
    "no content": ('{"messages": [{"role": "user"}]}\n', "content|assistant"),
    "content a number": ('{"messages": [{"role": "user", "content": 3}]}\n', "content|assistant"),
    "no assistant": (json.dumps({"messages": TURNS[:1]}) + "\n", "no reply"),
    "role unknown": ('{"messages": [{"role": "wizard", "content": "x"}]}\n', "wizard|role"),
    "no end marker": (reply("<think>c") + "\n", "end"),
    "no thought": (reply("just the answer") + "\n", "thought"),
    "two end markers": (reply("a</think>b</think>c") + "\n", "</think>"),
    "no answer": (reply("<think>a</think>") + "\n", "answer"),
    "sharegpt without from": ('{"conversations": [{"value": "x"}]}\n', "unknown role: none among the keys of the turn"),
    "binary": (b"\xff\xfe\x00\x80", "traces.jsonl"),
    "null byte": (b'{"a": "\x00"}\n', "traces.jsonl"),
    "NaN for text": ('{"messages": NaN}\n', "turns are not a list: found float"),
}


@pytest.mark.parametrize("kind", TRACE_FILES)
def test_broken_trace_files(place, refused, kind):
    content, message = TRACE_FILES[kind]
    (place / "traces.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused("traces", "import", "--traces.source", "traces.jsonl", "--out", "out")
    assert "traces.jsonl" in line and re.search(message, line)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1 no parquet"),
        ("a.csv", b"a,b\n1,2\n"),
        ("a.json", b"{"),
        ("directory/notes.txt", b"x"),
    ],
)
def test_files_of_other_kinds(place, refused, name, content):
    path = place / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = name.split("/")[0]
    assert source in refused("traces", "import", "--traces.source", source, "--out", "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--traces.source", "none.jsonl"], "none.jsonl: no such file"),
        (["--traces.source", "builtin:chian", "--num-traces", "3"], "did you mean 'builtin:chain'"),
        (["--traces.source", "builtin:chain"], "num_traces: not set"),
        (["--traces.source", "reasoning-gym:no_task", "--num-traces", "3"], "no_task"),
        (["--traces.source", "good.jsonl", "--format", "mesages"], "did you mean 'messages'"),
        (["--traces.source", "good.jsonl", "--fields", "{nope: prompt}"], "'nope'"),
        (["--traces.source", "good.jsonl", "--markers", "[a, a]"], "markers"),
        (["--traces.source", "good.jsonl", "--split", "train"], "split"),
        (["--traces.source", "good.jsonl", "--min-cot-chars", "99999"], "no trace is left of 12"),
        (["--traces.source", "good.jsonl", "--on-bad", "ignore"], "found 'ignore'"),
        (["--traces.source", ""], "source"),
        ([], "traces: Field required"),
    ],
)
def test_broken_requests_for_traces(refused, flags, message):
    assert re.search(message, refused("traces", "import", *flags, "--out", "out"))


RECIPES = {
    "torn": ("training: {seed: 1", "not valid YAML"),
    "a list": ("- 1", "a recipe is a mapping"),
    "binary": ("\x00\x01", "not valid YAML"),
    "empty": ("", "Field required"),
    "unknown field": ("trainning: {seed: 1}", "did you mean 'training'"),
    "unknown field below": ("training: {sead: 1}", r"'training.sead'; did you mean 'seed'"),
    "set twice": ("student: {model: a}\nstudent: {model: b}", "'student' is set twice"),
    "text for a number": (
        "student: {model: a}\ntraces: {source: b}\ntraining: {batch_size: many}",
        "batch_size.*'many'",
    ),
    "a number for a group": ("student: {model: a}\ntraces: {source: b}\ntraining: 3", "training: .*found 3"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_broken_recipes(place, refused, kind):
    content, message = RECIPES[kind]
    (place / "r.yaml").write_text(content)
    line = refused("distill", "r.yaml", "--out", "out")
    assert "r.yaml" in line and re.search(message, line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "none.yaml"], "none.yaml: no such recipe"),
        (["distil"], r"no such command 'distil'.*did you mean 'distill'"),
        (["traces"], "no such command 'traces'"),
        (["distill", "good.yaml", "--sed", "3"], r"--sed: no such field; did you mean"),
        (["distill", "good.yaml", "--seed", "3"], "'seed' stands for"),
        (["distill", "good.yaml", "good.yaml"], "unexpected argument"),
        (["distill", "good.yaml", "--lead-fraction"], "lead_fraction"),
        (["distill", "good.yaml", "--lead-fraction", "1.5"], r"lead_fraction must be in \(0, 1\]; found 1.5"),
        (["distill", "good.yaml", "--lead-fraction", "50%"], "lead_fraction must be a number or a ratio"),
        (["distill", "good.yaml", "--kd-ratio", "0.5"], "needs teacher"),
        (["distill", "good.yaml", "--policy", "budget"], "policy budget needs it"),
        (["distill", "good.yaml", "--num-validation", "12"], "all 12 traces would be held out"),
        (["distill", "good.yaml", "--lead-fraction", "0.01", "--preset", "answer"], "no supervised token is left"),
        (["distill", "good.yaml", "--max-trace-tokens", "3"], "leaves out all traces; the shortest has"),
        (["distill", "good.yaml", "--student.scratch.max-positions", "20"], "longer than the student's 20 positions"),
        (["distill", "good.yaml", "--learning-rate", "1e38", "--training.max-steps", "9"], "the loss is"),
        (["distill", "good.yaml", "--rank", "2", "--target-modules", "nothing_like_this"], "lora.target_modules"),
        (["distill", "good.yaml", "--chat-template", "none.jinja"], "none.jinja: no such chat template"),
        (["distill", "good.yaml", "--out"], "--out needs a directory"),
        (["distill", "good.yaml", "--out", "good.yaml"], "exists already"),
        (["distill", "good.yaml", "--out", "good.yaml/x"], "good.yaml"),
        (["distill", "good.yaml", "--out", ".", "--overwrite"], "no limbeck output"),
        (["distill", "good.yaml", "--teacher.cache", "none"], r"none: no teacher cache .no cache.json.; write one"),
        (["evaluate", "--model", "tiny-studnet", "--problems.source", "good.jsonl"], "did you mean 'tiny-student'"),
        (["evaluate", "--model", "x", "--problems.source", "none.jsonl"], "none.jsonl: no such file"),
        (["evaluate", "--model", "x", "--problems.source", "good.jsonl", "--num-samples", "2"], "temperature"),
        (["traces", "show", "--traces.source", "good.jsonl", "--tokenizer", "none"], "no such model directory"),
        (["traces", "stats", "--traces.source", "good.jsonl", "--tokenizer", "none"], "no such model directory"),
        (["report"], "sources: Field required"),
        (["report", "none"], "none"),
        (["report", "good.jsonl"], "good.jsonl"),
        (["sweep"], "Field required"),
        (["demo", "--num-traces", "1"], "at least 20 traces"),
    ],
)
def test_broken_requests(refused, arguments, message):
    assert re.search(message, refused(*arguments))


def write_sweep(place, **changes):
    distill = json.loads((place / "good.yaml").read_text()) | {"student": {"model": "model"}}
    problems = {"source": "builtin:chain", "num_traces": 5, "seed": 9}
    tree = {"distill": distill, "problems": problems, "grid": {"lead_fraction": [0.5, 1.0]}, "evaluate_teacher": False}
    (place / "sweep.yaml").write_text(json.dumps(tree | changes))
    return "sweep.yaml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, "a sweep needs a grid or runs"),
        ({"grid": {"lead_fraction": []}}, "at least one value"),
        ({"grid": {"lead_fractoin": [1.0]}}, "did you mean 'lead_fraction'"),
        ({"grid": {"lead_fraction": [0.5, 2.0]}}, r"lead_fraction must be in \(0, 1\]"),
        ({"grid": {"seed": [1, 2]}}, "'seed' stands for"),
        ({"problems": {"source": "good.jsonl"}}, "12 of 12 are also training prompts"),
        ({"match": "hours"}, "found 'hours'"),
        ({"top_k": -1}, "top_k must be in 0 to 255"),
    ],
)
def test_broken_sweeps(place, refused, changes, message):
    assert re.search(message, refused("sweep", write_sweep(place, **changes), "--out", "out"))


def edit_weights(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def nan(directory):
    edit_weights(directory, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))


def no_norm(directory):
    edit_weights(directory, lambda tensors: tensors.pop("model.norm.weight"))


def shape(directory):
    edit_weights(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(8)}))


def torn(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def pickled(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def no_config(directory):
    (directory / "config.json").unlink()


def config_no_json(directory):
    (directory / "config.json").write_text("{")


def config_no_type(directory):
    (directory / "config.json").write_text("{}")


def config_other_type(directory):
    (directory / "config.json").write_text('{"model_type": "resnet"}')


def config_deeper(directory):
    tree = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(tree | {"num_hidden_layers": 3}))


def tokenizer_torn(directory):
    file = directory / "tokenizer.json"
    file.write_text(file.read_text()[:50])


def no_tokenizer(directory):
    for file in directory.glob("token*"):
        file.unlink()


def no_template(directory):
    for file in directory.glob("chat_template*"):
        file.unlink()


def template_fails(directory):
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no') }}")


def template_torn(directory):
    (directory / "chat_template.jinja").write_text("{% for")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nan, "holds NaN"),
        (no_norm, "has no weight model.norm.weight"),
        (shape, "cannot load the model|another shape"),
        (torn, "cannot load the model"),
        (pickled, "Pickled weights are refused"),
        (no_config, "no config.json"),
        (config_no_json, "not valid JSON"),
        (config_no_type, "no model_type"),
        (config_other_type, "is of no causal language model"),
        (config_deeper, "has no weight"),
        (tokenizer_torn, "cannot load the tokenizer"),
        (no_tokenizer, "cannot load the tokenizer|no tokenizer|chat template"),
        (no_template, "chat template"),
        (template_fails, "chat template"),
        (template_torn, "chat template"),
    ],
)
def test_broken_models(place, refused, damage, message):
    save_model(place / "model")
    damage(place / "model")
    line = refused("distill", "good.yaml", "--student.scratch", "null", "--student.model", "model", "--out", "out")
    assert re.search(message, line)


def test_models_that_do_not_fit(place, refused):
    save_model(place / "small", vocab_size=40)
    own = ["--student.scratch", "null", "--student.model", "small"]
    assert "the tokenizer has 49 tokens, the model only 40" in refused("distill", "good.yaml", *own)
    assert "the model only 40" in refused("distill", "good.yaml", "--teacher.model", "small")


def test_a_broken_run_directory(place, refused):
    (place / "run").mkdir()
    assert "run" in refused("report", "run")
    (place / "run" / "limbeck.json").write_text("{")
    assert "limbeck.json" in refused("report", "run")


def run_limbeck(place, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "limbeck", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_in_a_process_of_its_own(place):
    before = contents(place)
    result = run_limbeck(place, "distill", "good.yaml", "--student.scratch.num-heads", "3")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"limbeck: good\.yaml: student\.scratch: .*even head size\.\n", result.stderr)
    (place / "traces.jsonl").write_text(GOOD[:-5])
    result = run_limbeck(place, "distill", "good.yaml", "--traces.source", "traces.jsonl")
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and "traces.jsonl" in result.stderr
    (place / "traces.jsonl").unlink()
    assert contents(place) == before


def test_debug_shows_the_stack(place, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "none.yaml", "--debug"])
    err = capfd.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" in err and err.splitlines()[-1].startswith("limbeck: none.yaml: no such recipe")
