"""The preflight: pairs that cannot work are refused, surprises are named."""

import pytest
from tiny_runs import run_config

from limbeck.distill import train
from limbeck.distill.pair import check_pair, load_student
from limbeck.distill.preflight import check_templates, compare_rendered, notes
from limbeck.errors import PairError
from limbeck.models.load import load_tokenizer
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
    facts = {"end_of_turn_trained_fraction": 1.0, "start_marker_tokens": 1, "end_marker_tokens": 3}
    (note,) = notes(facts)
    assert "1 and 3 tokens" in note
