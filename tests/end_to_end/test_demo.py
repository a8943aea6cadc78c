"""The main job at a toy size, through the command line, as a newcomer runs it; and the README's promises."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from limbeck.commands import COMMANDS
from limbeck.config import build
from limbeck.sweep.plan import SweepConfig, plan_runs
from limbeck.yaml_values import read_recipe

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
RUN_KEYS = {
    "lead_fraction",
    "keep_ending",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "retention",
    "tokens",
    "flops",
    "train_seconds",
    "peak_bytes",
    "stop_rate",
    "output_tokens",
    "regime",
    "gain_kept",
    "gain_kept_low",
    "gain_kept_high",
    "control",
    "base_accuracy",
    "derivation_right",
    "answer_as_derived",
    "learning_rate",
}
CUT = "model-tiny-recheck-student_policy-{}_lead_fraction-{}"
WHOLE = CUT.format("lead", 1.0)


def limbeck(*arguments, cwd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "limbeck", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=590)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    arguments = ("demo", "--num-traces", "60", "--num-problems", "12", "--epochs", "0.5", "--out", "runs/demo")
    first = limbeck(*arguments, cwd=folder)
    assert first.returncode == 0, first.stderr
    return folder / "runs" / "demo", first, arguments


def test_summary_has_the_promised_keys(demo):
    out, _, _ = demo
    summary = json.loads((out / "summary.json").read_text())
    assert summary["teacher_accuracy"] >= 0.9, "the built-in teacher answers its own hard problems"
    assert 0 <= summary["base_accuracy"] <= 0.9
    assert {run["regime"] for run in summary["runs"]} == {"capable", "novice"}
    assert [base["name"] for base in summary["bases"]] == ["tiny-recheck-student", "tiny-student"]
    names = {run["name"] for run in summary["runs"]}
    assert summary["recommended"] in names
    assert {run["lead_fraction"] for run in summary["runs"]} >= {0.25, 0.5, 1.0}
    for run in summary["runs"]:
        assert run.keys() >= RUN_KEYS
        assert run["accuracy_low"] <= run["accuracy"] <= run["accuracy_high"]
        assert run["flops_teacher"] == 0, "all runs read the one teacher pass"
        assert set(run["control_of"]) <= names and run["control"] == bool(run["control_of"])
    assert any(run["control"] for run in summary["runs"])


def test_cost_falls_with_the_cut(demo):
    out, _, _ = demo
    runs = {run["name"]: run["tokens"] for run in json.loads((out / "summary.json").read_text())["runs"]}
    for fraction in (0.25, 0.5):
        # Half of a small set's traces are trained on here, which differ in length.
        assert runs[CUT.format("common_length", fraction)] / runs[WHOLE] == pytest.approx(fraction, abs=0.15)
    assert runs[CUT.format("lead", 0.5)] / runs[WHOLE] == pytest.approx(0.5, abs=0.02)


def test_flops_agree_with_torch(demo):
    out, _, _ = demo
    for run in json.loads((out / "summary.json").read_text())["runs"]:
        audit = run["flops_audit"]
        assert audit["formula_flops"] == pytest.approx(audit["counted_flops"], rel=0.02)


def test_page_is_one_file_and_names_its_numbers(demo):
    out, _, _ = demo
    page = (out / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page), "the page asks for nothing from outside"
    assert "What a cut saves: " in page and "What it keeps: " in page and "When to use it: " in page
    assert "common_length" in page
    assert (out / "report.csv").read_text().count("\n") >= 7
    assert list((out / "plots").glob("*.png"))


def test_the_best_student_is_made_smaller_step_by_step(demo):
    out, first, _ = demo
    lines = {line["name"]: line for line in csv.DictReader((out / "report.csv").open())}
    runs = [run for run in json.loads((out / "summary.json").read_text())["runs"] if not run["control"]]
    best = max(runs, key=lambda run: run["accuracy"])["name"]
    names = [best, "recovered/round-1/pruned", "recovered", "quantised"]
    student, pruned, recovered, quantised = (lines[name] for name in names)
    # The student stands there as a run and again as what the others were made of.
    assert int(pruned["parameters"]) == int(recovered["parameters"]) == int(quantised["parameters"])
    assert 0.45 < int(pruned["parameters"]) / int(student["parameters"]) < 0.55
    assert 0 < float(quantised["kl_nats"]) < min(float(pruned["kl_nats"]), float(recovered["kl_nats"]))
    assert int(quantised["weight_bytes"]) < 0.25 * int(recovered["weight_bytes"])
    for line in (pruned, recovered, quantised):
        assert 0 <= float(line["accuracy_low"]) <= float(line["accuracy"]) <= float(line["accuracy_high"]) <= 1
        assert line["num_problems"] == "12", "scored on the problems of the sweep"
    assert all(name in first.stdout + first.stderr for name in names)
    assert {"layer_error.png", "layer_seconds.png"} <= {file.name for file in (out / "plots").iterdir()}


def test_a_second_call_does_only_what_is_missing(demo):
    out, _, arguments = demo
    kept = [
        out / "runs" / CUT.format("common_length", 0.5) / "model.safetensors",
        out / "recovered" / "limbeck.json",
        out / "recovered" / "evaluation" / "limbeck.json",
    ]
    before = [file.stat().st_mtime_ns for file in kept]
    weights = sorted((out / "quantised").glob("*.safetensors"))
    content = [file.read_bytes() for file in weights]
    shutil.rmtree(out / "quantised")
    second = limbeck(*arguments, cwd=out.parents[1])
    assert second.returncode == 0, second.stderr
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert [file.read_bytes() for file in weights] == content


def test_a_student_is_an_ordinary_model_directory(demo):
    transformers = pytest.importorskip("transformers")
    out, _, _ = demo
    run = out / "runs" / WHOLE
    model = transformers.AutoModelForCausalLM.from_pretrained(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7 a+4 b*3"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output[0][ids["input_ids"].shape[1] :]).startswith("<think>")


def test_evaluate_and_report_read_what_the_sweep_wrote(demo, tmp_path):
    out, _, _ = demo
    run = out / "runs" / WHOLE
    scored = limbeck(
        *(
            "evaluate",
            "--model",
            str(run),
            "--problems.source",
            "builtin:recheck",
            "--problems.num-traces",
            "6",
            "--problems.seed",
            "5",
        ),
        *("--max-new-tokens", "300", "--out", str(tmp_path / "scores"), "--json"),
        cwd=tmp_path,
    )
    assert scored.returncode == 0, scored.stderr
    assert 0 <= json.loads(scored.stdout)["accuracy"] <= 1
    page = limbeck("report", str(out), str(run), "--out", str(tmp_path / "page"), cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    assert (tmp_path / "page" / "report.html").is_file()


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_sweep_has_runs(recipe):
    # That every recipe fits its command is a test of the configs; here, that sweeps have runs to compare.
    tree = read_recipe(recipe)
    if "distill" in tree and not {"prune", "export"} & set(tree):
        assert len(plan_runs(build(SweepConfig, tree, recipe.name))) >= 2


def test_readme_names_real_commands_and_files():
    readme = (ROOT / "README.md").read_text()
    for command in re.findall(r"`limbeck ((?:(?:traces|teacher|rank) )?[a-z]+)", readme):
        assert command in COMMANDS
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / target).exists(), f"README links to {target}"
