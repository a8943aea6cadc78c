"""The recipe of a pipeline: what joins its stages is filled in, what it says stays, what cannot be is refused."""

import pytest

from limbeck.config import build, to_dict
from limbeck.errors import ConfigError
from limbeck.pipeline.choose import ChooseConfig, choose
from limbeck.pipeline.config import PipelineConfig, merged, told
from limbeck.pipeline.stages import stages_of
from limbeck.pipeline.telling import telling_stages
from limbeck.yaml_values import read_recipe

TRACES = {"source": "builtin:chain", "num_traces": 40}
PAIR = {"student": {"model": "tiny-student"}, "teacher": {"model": "tiny-teacher"}}
WHOLE = {
    "generate": {"prompts": TRACES},
    "verify": {"checker": "exact"},
    "cache": {"top_k": 8},
    "distill": PAIR | {"training": {"max_steps": 4, "batch_size": 2}, "render": {"derivation_pattern": "So {answer}"}},
    "sweep": {"grid": {"lead_fraction": [0.5, 1.0]}, "distill": {"training": {"max_steps": 1}}},
    "recover": {"prune": {"neuron_sparsity": 0.5}, "distill": {"training": {"max_steps": 2}}},
    "quantize": {"group_size": 32},
    "evaluate": {"problems": {**TRACES, "seed": 9}},
    "export": {},
    "push_to_hub": {"repository": "me/small"},
}


def made(tree):
    return build(PipelineConfig, tree, "recipe")


def names(tree):
    config = made(tree)
    stages = stages_of(config)
    return [stage.name for stage in [*stages, *telling_stages(config, stages)]]


def test_the_stages_are_in_order():
    assert names(WHOLE) == [
        "traces", "verify", "cache", "evaluate-teacher", "evaluate-start", "sweep", "choose", "distill",
        "evaluate-distill", "recover", "evaluate-recover", "quantize", "evaluate-quantize", "export", "smoke", "report",
        "card", "push",
    ]  # fmt: skip


def test_what_joins_the_stages_is_filled_in():
    config = made(WHOLE)
    assert config.generate.model == "tiny-teacher"
    assert config.verify.traces.source == "OUT/traces/traces.jsonl"
    assert [source.seed for source in config.verify.evaluation] == [9]
    assert config.distill.traces.source == "OUT/verify/traces.jsonl"
    assert str(config.distill.teacher.cache) == "OUT/cache" and config.distill.teacher.model == "tiny-teacher"
    assert config.sweep.distill.training.max_steps == 1 and config.sweep.distill.training.batch_size == 2
    assert config.sweep.problems == config.evaluate.problems and config.sweep.top_k == 0
    assert config.recover.prune.model == config.recover.distill.student.model == "OUT/distill"
    assert config.recover.distill.training.max_steps == 2 and config.recover.distill.training.batch_size == 2
    assert config.recover.prune.calibration.traces.source == "OUT/verify/traces.jsonl"
    assert config.quantize.model == "OUT/recover"
    assert config.quantize.calibration.traces.source == "OUT/verify/traces.jsonl"
    assert config.export.model == "OUT/quantize" and config.smoke.model == "OUT/export"
    for part in (config.generate, config.verify, config.evaluate, config.smoke, config.quantize.calibration):
        assert part.render.derivation_pattern == "So {answer}"


def test_what_the_recipe_says_stays():
    config = made(merged(WHOLE, {"quantize": {"model": "OUT/distill"}, "smoke": None, "verify": {"evaluation": []}}))
    assert config.quantize.model == "OUT/distill" and config.smoke is None and config.verify.evaluation == []
    assert config.export.model == "OUT/quantize"


def test_stages_may_be_left_out():
    assert names({"quantize": {"model": "tiny-student"}, "export": {}}) == [
        "quantize",
        "export",
        "smoke",
        "report",
        "card",
    ]
    tree = {"distill": {**PAIR, "traces": TRACES}, "evaluate": {"problems": TRACES}, "evaluate_teacher": False}
    assert names(tree) == ["evaluate-start", "distill", "evaluate-distill", "report"]
    assert names({"generate": {"prompts": TRACES, "model": "tiny-teacher"}, "verify": {}}) == [
        "traces",
        "verify",
        "report",
    ]
    gguf = {"quantize": {"model": "tiny-student"}, "export": {"format": "gguf"}}
    assert names(gguf) == ["quantize", "export", "report", "card"]  # the engine reads no GGUF
    assert made({**gguf, "smoke": {}}).smoke.model == "OUT/quantize"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "the recipe has no stage"),
        ({"quantise": {}}, "did you mean 'quantize'"),
        ({"quantize": {"model": "tiny-student", "schema": "w8a8"}}, "did you mean 'scheme'"),
        ({"quantize": {}}, "model"),
        ({"sweep": {"grid": {}}}, "distill"),
        (
            {"cache": {}, "distill": {"student": {"model": "tiny-student"}, "traces": TRACES}},
            "set distill.teacher.model",
        ),
        ({"generate": {"prompts": TRACES, "model": "tiny-teacher"}, "traces": {"traces": TRACES}}, "not both"),
        ({"distill": {**PAIR, "traces": TRACES}, "push_to_hub": {"repository": "me/small"}}, "set export"),
        ({**WHOLE, "push_to_hub": {"repository": "small"}}, "OWNER/NAME"),
        ({**WHOLE, "smoke": {"prompts": 0}}, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(tree, message):
    with pytest.raises(ConfigError, match=message):
        made(tree)


def test_the_cache_holds_what_the_cuts_read():
    cuts = {"runs": [{"lead_fraction": 0.5, "keep_ending": True}, {"lead_fraction": 0.25, "keep_ending": False}]}
    (cache,) = [stage for stage in stages_of(made(merged(WHOLE, {"sweep": cuts}))) if stage.name == "cache"]
    kept = [(part.truncation.lead_fraction, part.truncation.keep_ending) for part in cache.config.parts]
    # All cuts at the end are beginnings of the uncut traces; the ending behind a cut makes another sequence.
    assert kept == [(1.0, False), (0.5, True)]


def test_told_is_the_recipe_again():
    config = made(WHOLE)
    tree = told(config)
    assert made(tree) == config
    assert "training" in tree["distill"] and "optimizer" not in tree["distill"]


@pytest.mark.parametrize("name", ["tiny_pipeline", "smollm2_pipeline"])
def test_the_recipes_are_whole(name, request):
    config = made(read_recipe(request.config.rootpath / "recipes" / f"{name}.yaml"))
    assert {"distill", "recover", "quantize", "export", "smoke"} <= {stage.name for stage in stages_of(config)}
    assert to_dict(config)["sweep"]["problems"]["seed"] != to_dict(config)["evaluate"]["problems"]["seed"]


ROWS = [
    {"name": "quarter", "cut": 0.25, "accuracy": 0.50, "retention": 0.625, "flops": 10.0, "train_seconds": 3.0},
    {"name": "half", "cut": 0.5, "accuracy": 0.76, "retention": 0.95, "flops": 20.0, "train_seconds": 9.0},
    {"name": "dear", "cut": 0.6, "accuracy": 0.76, "retention": 0.95, "flops": 30.0, "train_seconds": 5.0},
    {"name": "whole", "cut": 1.0, "accuracy": 0.80, "retention": 1.0, "flops": 40.0, "train_seconds": 10.0},
]


@pytest.mark.parametrize(
    ("settings", "run", "keeps_enough"),
    [
        ({"min_retention": 0.9}, "half", True),
        ({"min_retention": 0.9, "cost": "train_seconds"}, "dear", True),
        ({"min_retention": 0.6}, "quarter", True),
        ({"min_retention": 0.99}, "whole", True),
        ({"min_retention": 1.1}, "whole", False),
    ],
)
def test_the_cheapest_run_that_keeps_enough_is_chosen(settings, run, keeps_enough):
    found = choose(ROWS, ["cut"], ChooseConfig(**settings))
    assert (found["run"], found["keeps_enough"]) == (run, keeps_enough)
    assert found["run"] in found["frontier"] and found["axes"].keys() == {"cut"}


def test_without_an_uncut_run_the_best_score_is_the_measure():
    rows = [{**row, "retention": None} for row in ROWS[:3]]
    found = choose(rows, ["cut"], ChooseConfig(min_retention=0.95))
    assert found["run"] == "half" and found["retention"] == 1.0


def test_where_all_score_nothing_the_cheapest_is_taken():
    rows = [{**row, "retention": None, "accuracy": 0.0} for row in ROWS]
    assert choose(rows, ["cut"], ChooseConfig())["run"] == "quarter"
