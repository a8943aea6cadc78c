"""What every command promises: help that names each field, results on standard output, files where they belong."""

import dataclasses
import json
import re

import pytest
from tiny_runs import SHAPE

from limbeck import __version__
from limbeck.cli import main
from limbeck.commands import COMMANDS
from limbeck.config import build
from limbeck.errors import ConfigError
from limbeck.flags import applies, apply_flags
from limbeck.help import LIMITED, OPTIONS, fields_of
from limbeck.optim.build import OptimizerConfig
from limbeck.scale.planner import PlanConfig

WIDTH = 80


@pytest.fixture
def printed(monkeypatch, capfd):
    """Run a command at 80 columns that must succeed; returns what it printed."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        out, err = capfd.readouterr()
        assert stopped.value.code == 0, err
        return out

    return run


def words(text: str) -> str:
    return " ".join(text.split())


def help_entries(text: str) -> dict[str, str]:
    """Flag -> its text, from the two columns of a help page."""
    entries: dict[str, str] = {}
    flag = ""
    for line in text.splitlines():
        match = re.match(r"(--\S+)\s*(.*)", line)
        if match:
            flag = match[1]
            entries[flag] = match[2]
        elif flag and line.startswith(" "):
            entries[flag] += " " + line.strip()
        else:
            flag = ""
    return {flag: words(text) for flag, text in entries.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_field_with_meaning_and_default(printed, name):
    text, command = printed(*name.split(), "--help", "all"), COMMANDS[name].load()
    infos = [info for info in fields_of(command) if applies(info, command.config, {})]
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text and "\\[" not in text
    assert COMMANDS[name].help in words(text)
    entries = help_entries(text)
    fields = {"--" + info.path.replace("_", "-") for info in infos}
    options = {"--" + option.replace("_", "-") for option in command.options}
    assert entries.keys() == OPTIONS.keys() - set(LIMITED) | options | fields
    for info in infos:
        entry = entries["--" + info.path.replace("_", "-")]
        assert entry.replace(" ", "").startswith(info.doc.replace(" ", ""))
        if info.default is dataclasses.MISSING:
            assert entry.endswith("required)")
        else:
            default = words(json.dumps(info.default, default=str)).replace(" ", "")
            assert entry.replace(" ", "").endswith(f"default{default})")


def test_overview_names_every_command(printed):
    for arguments in ([], ["--help"], ["help"], ["-h"]):
        text = printed(*arguments)
        assert max(map(len, text.splitlines())) <= WIDTH
        for name, command in COMMANDS.items():
            assert f"limbeck {name}" in text and words(command.help) in words(text)
    assert printed("--version") == __version__ + "\n"


def test_results_go_to_standard_output_and_files_below_runs(tmp_path, monkeypatch, printed):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "student": {"scratch": SHAPE},
        "traces": {"source": "builtin:chain", "num_traces": 8, "chain_max_steps": 3, "chain_min_steps": 2},
        "num_validation": 2,
        "training": {"max_steps": 2, "batch_size": 2},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    result = json.loads(printed("distill", "r.yaml", "--lead-fraction", "0.5", "--json"))
    assert result["out"] == "runs/distill" and result["loss"] > 0 and result["validation_ce"] > 0
    assert (tmp_path / "runs/distill/model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["distill"]
    text = printed("distill", "r.yaml", "--overwrite", "--out", "runs/distill")
    assert "loss: " in text and "train_seconds: " in text
    lines = printed("traces", "import", "--traces.source", "builtin:chain", "--num-traces", "5", "--out", "t")
    assert "kept: 5" in lines and len((tmp_path / "t/traces.jsonl").read_text().splitlines()) == 5
    shown = printed("traces", "show", "--traces.source", "t", "--tokenizer", "runs/distill", "--lead-fraction", "0.5")
    assert "cut here" in shown
    text = printed("traces", "stats", "--traces.source", "t", "--tokenizer", "runs/distill", "--json")
    assert json.loads(text.splitlines()[-1])["num_traces"] == 5


def test_an_option_that_means_nothing_to_a_command_is_refused(capfd):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "r.yaml", "--resume"])
    assert stop.value.code == 2
    assert "--resume means nothing to limbeck sweep" in capfd.readouterr().err


def test_help_of_one_group_and_of_none(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["pipeline", "--help", "--quantize"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "--quantize.group-size" in shown and "--distill" not in shown
    with pytest.raises(SystemExit) as ended:
        main(["pipeline", "--help", "quantise"])
    assert ended.value.code == 2 and "no fields in quantise" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_first_page_of_help_is_short_and_says_how_to_see_the_rest(printed, name):
    text, command = printed(*name.split(), "--help"), COMMANDS[name].load()
    shown = help_entries(text).keys() - OPTIONS.keys()
    assert len(shown) <= 25
    assert shown <= {"--" + info.path.replace("_", "-") for info in fields_of(command)}
    if command.first:
        assert f"limbeck {name} --help all" in words(text)


def test_a_field_that_is_another_commands_recipe_is_one_line_and_takes_its_path(tmp_path, printed):
    text = printed("pipeline", "--help", "all")
    assert "--distill.training.epochs" not in text and "fields of limbeck distill, or its recipe" in words(text)
    (tmp_path / "student.yaml").write_text(
        "student: {model: tiny-student}\ntraces: {source: builtin:chain, num_traces: 9}\n"
    )
    config = build(
        PlanConfig, apply_flags(PlanConfig, {}, ["--distill", str(tmp_path / "student.yaml"), "--epochs", "3"])
    )
    assert config.distill.traces.num_traces == 9 and config.distill.training.epochs == 3


@pytest.mark.parametrize(("choice", "own", "others"), [("sgd", "momentum", "beta1"), ("adamw", "beta1", "momentum")])
def test_a_chosen_method_shows_its_own_settings_only(printed, choice, own, others):
    entries = help_entries(printed("distill", "--optimizer.name", choice, "--help", "all"))
    assert f"--optimizer.{own}" in entries and f"--optimizer.{others}" not in entries


def test_settings_of_another_method_are_refused_and_those_of_a_recipe_go_with_a_word(capsys):
    asgld = ["--name", "asgld"]
    with pytest.raises(ConfigError, match=r"beta1 is a setting of name adamw \| perturb\(adamw\); this is asgld"):
        build(OptimizerConfig, apply_flags(OptimizerConfig, {}, [*asgld, "--beta1", "0.5"]))
    with pytest.raises(ConfigError, match="momentum is a setting"):
        OptimizerConfig(momentum=0.5)
    config = build(OptimizerConfig, apply_flags(OptimizerConfig, {"beta1": 0.5}, asgld))
    assert config == OptimizerConfig(name="asgld")
    assert "beta1 0.5 is left out" in words(capsys.readouterr().err)
