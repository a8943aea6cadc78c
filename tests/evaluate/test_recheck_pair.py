"""The built-in pair of builtin:recheck: the teacher knows, the student derives wrong and does all else right."""

from __future__ import annotations

import pytest

from limbeck.config import build
from limbeck.evaluate.stage import EvaluateStageConfig, score


@pytest.mark.slow
def test_a_capable_student_and_its_teacher(tmp_path):
    tree = {
        "problems": {"source": "builtin:recheck", "num_traces": 100, "seed": 31_337},
        "evaluate": {"max_new_tokens": 900, "batch_size": 100, "temperature": 1.0, "top_p": 0.95},
        "render": {"derivation_pattern": "So {answer}"},
    }
    found = {
        name: score(name, build(EvaluateStageConfig, tree | {"model": name}), tmp_path)
        for name in ("tiny-recheck-teacher", "tiny-recheck-student")
    }
    teacher, student = found.values()
    assert teacher["accuracy"] > 0.88
    assert 0.3 < student["accuracy"] < 0.8
    assert student["answer_as_derived"] > 0.94 and student["stop_rate"] > 0.94
