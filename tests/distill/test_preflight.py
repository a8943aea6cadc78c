"""The preflight: pairs that cannot work are refused, surprises are named."""

import json

import numpy as np
import pytest
import torch
from architectures import build as build_family
from tiny_runs import one_step, run_config, save_model
from transformers import AutoModelForCausalLM

from limbeck.distill import train
from limbeck.distill.pair import check_pair, load_student
from limbeck.distill.preflight import check_templates, compare_rendered, notes
from limbeck.errors import ConfigError, PairError
from limbeck.models.load import load_tokenizer
from limbeck.models.tiny import symbol_tokenizer
from limbeck.traces.render import RenderConfig
from limbeck.traces.sources import TraceConfig, read_traces

TEACHER = {"student.model": "tiny-student", "teacher.model": "tiny-teacher"}


@pytest.fixture
def first():
    return read_traces(TraceConfig(source="builtin:chain", num_traces=1))[0][0]


def test_a_good_pair_passes():
    config = run_config(TEACHER)
    check_templates(config, load_tokenizer("tiny-student"))


def test_another_template_is_refused_with_the_place_and_the_field(first):
    student, teacher = load_tokenizer("tiny-student"), load_tokenizer("tiny-teacher")
    teacher.chat_template = teacher.chat_template.replace("<|user|>", "<|assistant|>", 1)
    if teacher.chat_template == student.chat_template:
        teacher.chat_template = "{{ messages[0]['content'] }}" + student.chat_template
    with pytest.raises(PairError, match=r"teacher big: .*from token \d+ on .*render\.chat_template"):
        compare_rendered(first, "big", teacher, student, RenderConfig())


def test_a_teacher_without_a_template_has_none_to_differ(first):
    student, teacher = load_tokenizer("tiny-student"), load_tokenizer("tiny-teacher")
    teacher.chat_template = None
    compare_rendered(first, "base", teacher, student, RenderConfig())


def test_another_tokenizer_is_refused():
    config = run_config(TEACHER)
    student, tokenizer = load_student(config, None)
    tokenizer.add_tokens(["zz"])
    with pytest.raises(PairError, match=r"its tokenizer differs from the student's|the model only"):
        check_pair(config, student, tokenizer)


def test_the_manifest_says_what_was_found(tmp_path, capsys):
    cut = {**TEACHER, "truncation.lead_fraction": 0.5, "training.max_steps": 1}
    facts = train.run(run_config(cut), tmp_path / "cut").manifest["counts"]["preflight"]
    assert facts["end_of_turn_trained_fraction"] == 0.0
    assert "keep_ending" in capsys.readouterr().err
    whole = {**cut, "truncation.keep_ending": True}
    facts = train.run(run_config(whole), tmp_path / "whole").manifest["counts"]["preflight"]
    assert facts["end_of_turn_trained_fraction"] == 1.0
    assert facts["start_marker_tokens"] >= 1


def test_markers_of_several_tokens_are_named():
    facts = {"end_of_turn_trained_fraction": 1.0, "start_marker_tokens": 1, "end_marker_tokens": 3, "dropout": {}}
    (note,) = notes(facts)
    assert "1 and 3 tokens" in note


OWN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|im_start|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
"""Ends its turns with a token that no config names."""


@pytest.fixture
def trained_with_another_template(tmp_path, capsys):
    (tmp_path / "own.jinja").write_text(OWN_TEMPLATE)
    config = {"render.chat_template": str(tmp_path / "own.jinja"), "training.max_steps": 1}
    train.run(run_config({"student.model": save_model(tmp_path / "start"), **config}), tmp_path / "out")
    return tmp_path / "out", capsys.readouterr().err


def test_the_template_of_the_training_is_the_students(trained_with_another_template):
    assert load_tokenizer(str(trained_with_another_template[0])).chat_template == OWN_TEMPLATE


def test_generation_ends_with_the_turns_that_were_trained(trained_with_another_template):
    out, told = trained_with_another_template
    tokenizer, ends = load_tokenizer(str(out)), json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])) <= set(ends)
    assert "will stop at '<|im_start|>'" in told


def test_what_stops_already_is_not_told(tmp_path, capsys):
    start = save_model(tmp_path / "start")
    (tmp_path / "start/generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    train.run(run_config({"student.model": start, "training.max_steps": 1}), tmp_path / "out")
    assert "will stop at" not in capsys.readouterr().err
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [1, 2]


@pytest.mark.parametrize(("modules", "what"), [("lm_head", "head"), (".*(q_proj|embed_tokens)", "embeddings")])
def test_adapters_on_what_the_loss_reads_are_refused(tmp_path, modules, what):
    start = save_model(tmp_path, tied=False)
    with pytest.raises(ConfigError, match=rf"lora\.target_modules: chooses the {what}"):
        load_student(run_config({"student.model": start, "lora.target_modules": modules}), None)


def test_padding_that_changes_results_is_refused(tmp_path):
    build_family("Phi-3 longrope", 49).save_pretrained(tmp_path)
    symbol_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"training\.layout padded: padding changes what .* set packed"):
        load_student(run_config({"student.model": str(tmp_path), "training.layout": "padded"}), None)


@pytest.mark.parametrize("name", ["Phi-3 longrope", "LFM2", "StableLM"])
def test_how_a_batch_is_cut_changes_nothing(tmp_path, name, capsys):
    build_family(name, 49).save_pretrained(tmp_path)
    symbol_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    changes = {"student.model": str(tmp_path), "training.batch_size": 9, "training.max_steps": 1}
    losses = [one_step(run_config({**changes, "training.microbatch_tokens": n})).loss for n in (64, 4096)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert "slower than packed and right" in capsys.readouterr().err


def test_a_capped_student_learns_from_a_capped_teacher(tmp_path):
    for name, seed in (("student", 0), ("teacher", 1)):
        build_family("Gemma 2", 49, seed).save_pretrained(tmp_path / name)
        symbol_tokenizer().save_pretrained(tmp_path / name)
    pair = {"student.model": str(tmp_path / "student"), "teacher.model": str(tmp_path / "teacher")}
    step = one_step(run_config({**pair, "loss.kd_ratio": 0.5, "training.batch_size": 9, "training.max_steps": 1}))
    ce = kd = count = 0.0
    models = [AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager") for path in pair.values()]
    for example in step.data.train:
        ids = torch.from_numpy(example.sample.input_ids.astype(np.int64))
        rows = torch.from_numpy(np.nonzero(example.ce_weight)[0])
        with torch.no_grad():
            own, theirs = (model(ids[None]).logits[0, rows - 1].log_softmax(-1) for model in models)
        ce -= float(own.gather(1, ids[rows, None]).sum())
        kd += float((theirs.exp() * (theirs - own)).sum())
        count += len(rows)
    assert (step.ce, step.kd) == pytest.approx((0.5 * ce / count, 0.5 * kd / count), rel=1e-5)


def test_dropout_in_training_is_told(tmp_path, capsys):
    start = save_model(tmp_path / "start")
    config = tmp_path / "start/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.25}))
    train.run(run_config({"student.model": start, "training.max_steps": 1}), tmp_path / "out")
    told = " ".join(capsys.readouterr().err.split())
    assert "drops or jitters activations in training (attention_dropout 0.25)" in told
