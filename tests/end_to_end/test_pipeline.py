"""limbeck pipeline through the command line, on the built-in pair: made once, kept, gone on with, told of and sent."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_hub import fake_hub
from huggingface_hub import ModelCard

from limbeck.cli import main
from limbeck.models.load import load_model

SHORT = {"source": "builtin:chain", "chain_min_steps": 2, "chain_max_steps": 3}
PROBLEMS = {**SHORT, "num_traces": 6, "seed": 1000001}
RECIPE = {
    "title": "Small one",
    "generate": {"prompts": {**SHORT, "num_traces": 24}, "sampling": {"max_new_tokens": 160, "temperature": 0.7}},
    "verify": {"checker": "exact", "num_checkers": 1},
    "cache": {"top_k": 16},
    "distill": {
        "student": {"model": "tiny-student"},
        "teacher": {"model": "tiny-teacher"},
        "num_validation": 4,
        "training": {"max_steps": 4, "batch_size": 4, "save_every_steps": 1},
    },
    "recover": {
        "prune": {"neuron_sparsity": 0.5, "calibration": {"sequences": 8}},
        "distill": {"training": {"max_steps": 2}},
    },
    "quantize": {"scheme": "w4a16", "group_size": 32, "method": "rtn"},
    "evaluate": {"problems": PROBLEMS, "evaluate": {"max_new_tokens": 160, "batch_size": 8, "num_checkers": 1}},
    "export": {},
    "smoke": {"prompts": 2},
    "card": {"license": "apache-2.0", "tags": ["chains"], "limits": "Not for sums of money."},
}
STAGES = [
    "traces", "verify", "cache", "evaluate-teacher", "evaluate-start", "distill", "evaluate-distill", "recover",
    "evaluate-recover", "quantize", "evaluate-quantize", "export", "smoke", "report", "card",
]  # fmt: skip


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "limbeck", "pipeline", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


def call(capfd, *arguments, code=0):
    """The command in this process; its result and what it said."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["pipeline", *map(str, arguments), "--json"])
    out, err = capfd.readouterr()
    assert stopped.value.code == code, err
    found = json.loads(out) if code == 0 else None
    if found is not None and "--dry-run" not in arguments:
        ran = re.search(r"^ran: (.*)$", err, re.M)[1]
        found["ran"] = [] if ran == "nothing" else ran.split(", ")
    return found, " ".join(err.split())


def stamps(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def identities(out):
    """Key and output of every stage but those that tell what was measured."""
    records = {name: json.loads((out / "state" / f"{name}.json").read_text()) for name in STAGES[:-2]}
    return {name: (record["key"], record["gives"]) for name, record in records.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Recipe and directory of a pipeline that was run to its end."""
    base = tmp_path_factory.mktemp("pipeline")
    recipe = base / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    finish(start(recipe, "--out", base / "out"))
    return recipe, base / "out"


@pytest.fixture
def copied(made, tmp_path):
    """A copy of it that may be changed."""
    recipe, out = made
    shutil.copytree(out, tmp_path / "out")
    return recipe, tmp_path / "out"


def test_every_stage_is_done_and_told_of(made):
    _, out = made
    manifest = json.loads((out / "limbeck.json").read_text())
    rows = {row["stage"]: row for row in manifest["metrics"]["stages"]}
    assert list(rows) == STAGES[:-2] and all(row["ran"] for row in rows.values())
    assert all(row["measured"]["seconds"] > 0 for row in rows.values())
    for name in ("cache", "distill", "recover"):
        assert rows[name]["predicted"]["flops"] == pytest.approx(rows[name]["measured"]["flops"], rel=0.02), name
    models = {row["name"]: row["numbers"] for row in manifest["metrics"]["models"]}
    assert list(models) == ["teacher", "start", "distill", "recover", "quantize"]
    assert models["teacher"]["accuracy"] > models["start"]["accuracy"]
    assert models["recover"]["parameters"] < models["distill"]["parameters"]
    assert models["quantize"]["weight_bytes"] < models["recover"]["weight_bytes"] / 3
    text = (out / "report.md").read_text()
    assert "## Stages, expected and measured" in text and "| quantize | ran |" in text
    assert "## Models along the way" in text and "## Compressed models" in text
    assert (out / "plots/pipeline.png").stat().st_size > 5_000
    smoke = json.loads((out / "smoke/limbeck.json").read_text())["metrics"]
    assert smoke["prompts"] == 2 and smoke["mean_difference_nats"] < 1e-3
    assert all(json.loads((out / "smoke/texts.json").read_text()))
    assert load_model(str(out / "export")).config.intermediate_size == 128


def test_the_card_is_one_that_the_hub_reads(made):
    _, out = made
    card = ModelCard.load(out / "export" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-generation"
    assert {"limbeck", "distillation", "pruned", "quantized", "chains"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    scored = json.loads((out / "quantize/evaluation/summary.json").read_text())["accuracy"]
    assert (result.metric_type, result.metric_value) == ("accuracy", round(scored, 4))
    for line in ("neurons 256 → 128", "rtn, w4a16, groups of 32", "loaded and compared in transformers"):
        assert line in card.text
    assert "| quantize |" in card.text and "Not for sums of money." in card.text
    assert str(out) not in card.text and "scheme: w4a16" not in card.text  # the default is not said again
    recipe = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert recipe["distill"]["traces"]["source"] == "OUT/verify/traces.jsonl"


def test_a_finished_pipeline_does_nothing_in_a_moment(made):
    recipe, out = made
    before, begun = stamps(out), time.monotonic()
    _, err = finish(start(recipe, "--out", out))
    assert time.monotonic() - begun < 40  # nearly all of it is the import of the stages' libraries
    assert "ran: nothing" in err and "15/15" in err
    assert before == stamps(out)


def test_the_short_answer_is_given_up_where_a_file_differs(copied, capfd):
    recipe, out = copied
    result, err = call(capfd, recipe, "--out", out)  # another directory: all files are looked at
    assert result["ran"] == [] and err.count("unchanged") == len(STAGES)
    (out / "traces" / "traces.jsonl").touch()
    assert call(capfd, recipe, "--out", out)[0]["ran"] == []  # another time, the same bytes


def test_one_field_reruns_what_depends_on_it(copied, capfd):
    recipe, out = copied
    before = identities(out)
    arguments = [recipe, "--out", out, "--quantize.scheme", "w8a16"]
    plan, _ = call(capfd, *arguments, "--dry-run")
    assert [row["stage"] for row in plan["stages"] if row["reason"]] == STAGES[9:]
    result, err = call(capfd, *arguments)
    assert result["ran"] == STAGES[9:]
    assert "[10/15] quantize: scheme w4a16 -> w8a16" in err and "evaluate-quantize: quantize changed" in err
    assert identities(out).items() >= {name: before[name] for name in STAGES[:9]}.items()
    assert "| distill | kept |" in (out / "report.md").read_text()


def test_a_dry_run_touches_nothing(made, tmp_path, capfd):
    recipe, out = made
    before = stamps(out)
    plan, _ = call(capfd, recipe, "--out", tmp_path / "new", "--dry-run")
    assert not (tmp_path / "new").exists()
    rows = {row["stage"]: row for row in plan["stages"]}
    assert all(row["reason"] == "not done yet" for row in rows.values())
    for name in ("traces", "cache", "distill", "recover", "quantize", "evaluate-quantize"):
        assert rows[name]["predicted"]["peak_bytes"] > 0
    for name in ("traces", "cache", "distill", "recover"):
        assert rows[name]["predicted"]["seconds"] > 0 and rows[name]["predicted"]["flops"] > 0
    plan, _ = call(capfd, recipe, "--out", out, "--dry-run")
    assert not any(row["reason"] for row in plan["stages"]) and before == stamps(out)


def test_a_damaged_output_is_named_and_made_again(copied, capfd):
    recipe, out = copied
    before, file = identities(out), out / "recover" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result, err = call(capfd, recipe, "--out", out)
    assert f"recover: {file} is damaged" in err and identities(out) == before
    # The score was beside the damaged model; what was made of the whole one is made of the same bits.
    assert result["ran"] == ["recover", "evaluate-recover", "report", "card"]


def test_mistakes_are_one_line(made, tmp_path, capfd):
    recipe, _ = made
    assert "did you mean 'quantize.scheme'" in call(capfd, recipe, "--quantize.schem", "w8a8", code=2)[1]
    bad = tmp_path / "bad.yaml"
    bad.write_text("quantise: {model: tiny-student}")
    assert "unknown field 'quantise'; did you mean 'quantize'?" in call(capfd, bad, code=2)[1]
    bad.write_text("quantize: {model: OUT/recover}")
    assert "OUT/recover is written by no stage before it" in call(capfd, bad, "--out", tmp_path / "out", code=2)[1]


def kill_in(process, out, stage, delay_seconds):
    """SIGKILL once a stage has begun, or let the process end when it was faster."""
    begun = out / "state" / f"{stage}.begun"
    while process.poll() is None:
        if begun.exists():
            time.sleep(delay_seconds)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate()
    return process.returncode


def test_a_killed_pipeline_goes_on_to_the_same_files(copied, made, capfd):
    recipe, out = copied
    stage = random.choice(["recover", "quantize"])
    for name in ("recover", "quantize"):  # as before they ran
        shutil.rmtree(out / name)
        (out / "state" / f"{name}.json").unlink()
    assert kill_in(start(recipe, "--out", out), out, stage, 0.1) == -signal.SIGKILL, stage
    assert call(capfd, recipe, "--out", out)[0]["ran"][0] == stage
    assert identities(out) == identities(made[1]), stage


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_again_and_again_it_ends_with_the_same_files(made, tmp_path):
    recipe, out = made
    for stage in sorted(random.sample(STAGES, 6), key=STAGES.index):
        kill_in(start(recipe, "--out", tmp_path / "out"), tmp_path / "out", stage, random.random() * 0.3)
    finish(start(recipe, "--out", tmp_path / "out"))
    assert identities(tmp_path / "out") == identities(out)


@pytest.mark.slow
def test_export_and_card_are_sent_once(copied):
    recipe, out = copied
    with fake_hub() as hub:
        flags = ["--push-to-hub.repository", "me/small"]
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_made_up", "HF_HUB_OFFLINE": "0"}
        finish(start(recipe, "--out", out, *flags, **environment))
        sent = hub.repositories["me/small"]
        assert sent["README.md"] == (out / "export/README.md").read_bytes()
        assert sent["model.safetensors"] == (out / "export/model.safetensors").read_bytes()
        assert {"config.json", "tokenizer.json", "certificate.json"} <= sent.keys() and "limbeck.json" not in sent
        assert b'from_pretrained("me/small")' in sent["README.md"]
        assert hub.private["me/small"] and "Bearer hf_made_up" in hub.tokens and hub.commits == 1
        assert json.loads((out / "push/push.json").read_text())["url"].startswith(hub.url)
        finish(start(recipe, "--out", out, *flags, **environment))
        assert hub.commits == 1


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_line(copied):
    recipe, out = copied
    flags = ["--push-to-hub.repository", "me/small"]
    with fake_hub(refuses=True) as hub:
        refused = start(recipe, "--out", out, *flags, HF_ENDPOINT=hub.url, HF_TOKEN="hf_no", HF_HUB_OFFLINE="0")
        _, err = refused.communicate()
    assert refused.returncode == 2 and "push_to_hub me/small: the Hub refused" in " ".join(err.split())
    offline = start(recipe, "--out", out, *flags, HF_HUB_OFFLINE="1")
    _, err = offline.communicate()
    assert offline.returncode == 2 and "offline" in err.lower() and "Traceback" not in err


@pytest.mark.slow
def test_a_sweep_chooses_the_cut_and_its_run_is_taken_over(tmp_path, capfd):
    tree = dict(RECIPE)
    tree["sweep"] = {
        "grid": {"lead_fraction": [0.5, 1.0]},
        "runs": [{"lead_fraction": 0.5, "keep_ending": True}],
        "problems": {**PROBLEMS, "seed": 2000001},
    }
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(tree))
    call(capfd, recipe, "--out", out)
    choice = json.loads((out / "choose/choice.json").read_text())
    trained = out / "sweep/runs" / choice["run"]
    assert (out / "distill/model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    manifest = json.loads((out / "distill/limbeck.json").read_text())
    assert manifest["config"]["truncation"]["lead_fraction"] == choice["axes"]["lead_fraction"]
    recovered = json.loads((out / "recover/limbeck.json").read_text())["config"]["distill"]
    assert recovered["truncation"]["lead_fraction"] == choice["axes"]["lead_fraction"]
    rows = {row["stage"]: row for row in json.loads((out / "limbeck.json").read_text())["metrics"]["stages"]}
    for name in ("cache", "sweep", "recover"):
        assert rows[name]["predicted"]["flops"] == pytest.approx(rows[name]["measured"]["flops"], rel=0.02), name
    assert rows["distill"]["measured"]["taken_from"] == f"sweep/{choice['run']}"
    # A student of other steps is no run of the sweep: it is trained.
    flags = ["--distill.training.max-steps", "5", "--sweep.distill.training.max-steps", "4"]
    result, _ = call(capfd, recipe, "--out", out, *flags)
    assert {"distill", "recover", "quantize"} <= set(result["ran"]) and "sweep" not in result["ran"]
    assert json.loads((out / "distill/limbeck.json").read_text())["ledger"]["steps"] == 5


def test_an_old_directory_is_not_overwritten(tmp_path, capfd):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"quantize": {"model": "tiny-student", "method": "rtn", "group_size": 32}}))
    mine = Path(tmp_path / "out" / "quantize")
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    assert "no limbeck output, so it is not overwritten" in call(capfd, recipe, "--out", tmp_path / "out", code=2)[1]
    assert (mine / "thesis.txt").read_text() == "years of work"
