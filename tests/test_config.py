"""Recipes and flags: every mistake is named, every field is documented, every field counts in the hash."""

import dataclasses
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from tiny_runs import run_config

from limbeck.commands import COMMANDS
from limbeck.config import build, config_hash, get_field, to_dict
from limbeck.distill.config import DistillConfig
from limbeck.errors import ConfigError
from limbeck.flags import apply_flags, describe, field_docs, groups_of
from limbeck.ranking.featurize import FeaturizeConfig
from limbeck.yaml_values import read_recipe

CONFIGS = {name: command.load().config for name, command in COMMANDS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    depth: int = 1
    """How deep."""
    name: Literal["a", "b"] = "a"
    """Which one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    title: str
    """What to call it."""
    left: Inner = field(default_factory=Inner)
    """The left one."""
    right: Inner | None = None
    """The right one."""
    ratio: float | str = 0.5
    """A share."""
    limit: int | None = None
    """At most so many."""
    sizes: list[int] = field(default_factory=list)
    """Some sizes."""
    place: Path | None = None
    """Where."""
    is_loud: bool = False
    """Whether it is loud."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1; found {self.limit}")


def flagged(*flags: str) -> Outer:
    return build(Outer, apply_flags(Outer, {"title": "t"}, list(flags)), "flags")


def group_paths(tree: dict, prefix: str = "") -> list[str]:
    nested = [(prefix + key, value) for key, value in tree.items() if isinstance(value, dict)]
    return [prefix.rstrip(".")] + [path for key, value in nested for path in group_paths(value, key + ".")]


@pytest.mark.parametrize("group", ["", *(path for path, _ in groups_of(DistillConfig))])
def test_an_unknown_key_at_any_depth_names_the_nearest(group):
    tree: dict = {}
    place = tree
    for part in filter(None, group.split(".")):
        place = place.setdefault(part, {})
    owner = dict(groups_of(DistillConfig)).get(group, DistillConfig)
    known = max((f.name for f in dataclasses.fields(owner)), key=len)
    wrong = known[:-1] + known[-1] * 2
    place[wrong] = 1
    path = f"{group}.{wrong}" if group else wrong
    with pytest.raises(ConfigError, match=rf"recipe.yaml: unknown field '{re.escape(path)}'; did you mean '{known}'\?"):
        build(DistillConfig, tree, "recipe.yaml")


def test_a_key_like_no_other_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown field 'left.zzzzzz'; known are depth, name"):
        build(Outer, {"title": "t", "left": {"zzzzzz": 1}})


def test_flags_by_path_by_name_with_dashes_and_equals():
    config = flagged("--left.depth", "3", "--ratio=1/3", "--sizes", "[4, 5]", "--is-loud", "--place", "a/b")
    assert (config.left.depth, config.ratio, config.sizes, config.is_loud) == (3, "1/3", [4, 5], True)
    assert config.place == Path("a/b")
    assert flagged("--is-loud", "--limit", "4") == flagged("--is_loud", "true", "--limit", "4")
    assert flagged("--is-loud=false", "--limit", "null").is_loud is False
    assert flagged("--right.depth", "2").right == Inner(depth=2)
    assert flagged("--right.depth", "2", "--right", "null").right is None
    assert flagged("--ratio", "-1").ratio == -1


def test_a_short_name_is_enough_where_it_is_the_only_one():
    config = build(DistillConfig, apply_flags(DistillConfig, to_dict(run_config()), ["--lead-fraction", "0.25"]))
    assert config.truncation.lead_fraction == 0.25


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", "3"], r"--depth: 'depth' stands for left.depth and right.depth; give the full path"),
        (["--dept", "3"], r"--dept: no such field; did you mean 'depth'\?"),
        (["--left.dept", "3"], r"--left.dept: no such field; did you mean 'left.depth'\?"),
        (["5"], "unexpected argument '5'"),
        (["--limit", "3", "4"], "unexpected argument '4'"),
        (["-v"], "unexpected argument '-v'"),
        (["--limit"], r"limit: expected a number; found true"),
        (["--limit", "many"], r"flags: limit: .*valid integer.*; found 'many'\."),
        (["--limit", "2.5"], r"limit: .*integer.*; found 2\.5"),
        (["--limit", "0"], r"flags: limit must be at least 1; found 0\.$"),
        (["--left.name", "c"], r"left.name: Input should be 'a' or 'b'; found 'c'\."),
        (["--left.depth", "null"], r"left.depth: .*; found None\."),
        (["--left", "3"], r"left: expected a group of fields \(depth, name\); found '3'\."),
        (["--sizes", "[1, x]"], r"sizes\.1: .*; found 'x'\."),
        (["--sizes", "7"], r"sizes: .*valid list; found 7\."),
        (["--is-loud", "perhaps"], r"is_loud: .*; found 'perhaps'\."),
        (["--title", "[unclosed"], ""),
    ],
)
def test_wrong_flags(flags, message):
    if not message:
        assert flagged(*flags).title == "[unclosed"
        return
    with pytest.raises(ConfigError, match=message) as caught:
        flagged(*flags)
    assert "\n" not in str(caught.value)


def test_missing_and_ill_typed_values_name_their_path():
    with pytest.raises(ConfigError, match=r"^r\.yaml: title: Field required\.$"):
        build(Outer, {}, "r.yaml")
    with pytest.raises(ConfigError, match=r"left\.depth: expected a number; found true"):
        build(Outer, {"title": "t", "left": {"depth": True}})
    with pytest.raises(ConfigError, match=r"title: .*valid string; found True\."):
        build(Outer, {"title": True})
    with pytest.raises(ConfigError, match=r"place: .*found \[\]"):
        build(Outer, {"title": "t", "place": []})


def test_messages_keep_their_dots():
    with pytest.raises(ConfigError, match=re.escape("found '../data/x...y'.")):
        build(Outer, {"title": "t", "limit": "../data/x...y"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.kd_ratio": 1.5}, "kd_ratio must be in"),
        ({"loss.kd_ratio": 0.5}, "kd_ratio 0.5 needs teacher"),
        ({"loss.temperature": 0}, "temperature must be finite and greater than 0"),
        ({"loss.temperature": float("inf")}, "temperature must be finite"),
        ({"loss.chunk_bytes": 0}, "chunk_bytes must be at least 1"),
        ({"training.epochs": float("inf")}, "epochs must be finite"),
        ({"training.epochs": 0}, "epochs must be"),
        ({"training.batch_size": 0}, "batch_size must be at least 1"),
        ({"training.batch_tokens": 100}, "exactly one of batch_size and batch_tokens"),
        ({"training.batch_size": None}, "exactly one of batch_size and batch_tokens"),
        ({"training.max_steps": -1}, "max_steps must be at least 1"),
        ({"training.seed": -1}, "seed must be in 0"),
        ({"training.num_threads": 0}, "num_threads must be at least 1"),
        ({"training.clip_norm": -0.1}, "clip_norm must be finite and at least 0"),
        ({"training.clip_norm": float("nan")}, "clip_norm must be finite"),
        ({"training.save_every_steps": -1}, "save_every_steps must be finite and at least 0"),
        ({"optimizer.learning_rate": 0}, "learning_rate must be finite and greater than 0"),
        ({"optimizer.learning_rate": float("inf")}, "learning_rate must be finite"),
        ({"optimizer.beta1": 1.0}, "beta1 must be in"),
        ({"optimizer.weight_decay": float("nan")}, "weight_decay must be finite"),
        ({"optimizer.epsilon": 0}, "epsilon must be finite"),
        ({"optimizer.name": "adamww"}, "found 'adamww'"),
        ({"schedule.warmup_fraction": 1.0}, "warmup_fraction must be in"),
        ({"schedule.final_fraction": -0.1}, "final_fraction must be in"),
        ({"lora.rank": 0}, "rank must be at least 1"),
        ({"lora.dropout": 1.0}, "dropout must be in"),
        ({"truncation.lead_fraction": 0}, "lead_fraction must be in"),
        ({"truncation.lead_fraction": "1/0"}, "lead_fraction must be a number or a ratio"),
        ({"truncation.policy": "budget"}, "budget_tokens goes with policy budget"),
        ({"supervision.preset": "answer+cot"}, "supervision.preset"),
        ({"supervision.ce": {"cot": -1}}, "cot weight must be finite"),
        ({"student.scratch.num_heads": 0}, "num_heads must be at least 1"),
        ({"student.scratch.num_heads": 3}, "must be a whole, even head size"),
        ({"student.scratch.num_layers": 0}, "num_layers must be at least 1"),
        ({"student.scratch": None}, "student needs exactly one of model and scratch"),
        ({"num_validation": -1}, "num_validation must be at least 0"),
        ({"max_trace_tokens": 0}, "max_trace_tokens must be at least 1"),
        ({"traces.format": "mesages"}, "did you mean 'messages'"),
        ({"traces.source": "builtin:chian"}, "did you mean 'builtin:chain'"),
        ({"render.end_marker": ""}, "start_marker and end_marker must be"),
        ({"render.derivation_pattern": "("}, "derivation_pattern must contain"),
    ],
)
def test_values_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        run_config(changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config_class", CONFIGS.values(), ids=CONFIGS)
def test_every_field_and_group_is_documented(config_class):
    infos = describe(config_class)
    assert len({info.path for info in infos}) == len(infos)
    assert [info.path for info in infos if len(info.doc) < 5] == []
    for owner, prefix in [(config_class, ""), *((cls, path) for path, cls in groups_of(config_class))]:
        undocumented = {f.name for f in dataclasses.fields(owner)} - field_docs(owner).keys()
        assert not undocumented, (prefix, undocumented)
        assert owner.__doc__ and not owner.__doc__.startswith(owner.__name__ + "("), owner


OTHER_VALUES = {
    "student.scratch.hidden_size": 32,
    "truncation.lead_fraction": 0.5,
    "truncation.seed": 9,
    "training.layout": "padded",
    "training.epochs": 2.0,
    "loss.normalization": "sequence_mean",
    "supervision.preset": "cot",
    "traces.seed": 4,
    "optimizer.learning_rate": 2e-3,
    "render.start_marker": "<t>",
    "num_validation": 2,
    "lora.rank": 2,
    "select.require_correct": True,
}


def test_the_hash_changes_with_any_field():
    hashes = [config_hash(run_config()), *(config_hash(run_config({k: v})) for k, v in OTHER_VALUES.items())]
    assert all(one != other for one, other in itertools.combinations(hashes, 2))
    assert config_hash(run_config()) == config_hash(build(DistillConfig, to_dict(run_config())))
    assert re.fullmatch("[0-9a-f]{12}", hashes[0])


def test_every_leaf_reaches_the_plain_tree():
    config = run_config({"lora.rank": 3, "truncation.lead_fraction": "1/3"})
    tree = to_dict(config)
    assert json.loads(json.dumps(tree)) == tree
    for info in describe(DistillConfig):
        value = get_field(config, info.path)
        plain = get_field(tree, info.path)
        assert plain == (value if value is None or isinstance(value, bool | int | float | str | dict) else plain)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1, 2", "not valid YAML"),
        (b"a: b: c", "not valid YAML"),
        (b"\tseed: 1", "not valid YAML"),
        (b"- 1\n- 2\n", "a recipe is a mapping of fields to values; found list"),
        (b"just words", "a recipe is a mapping of fields to values; found str"),
        (b"\xff\xfe\x00\x01", "not valid YAML"),
        (b"a: \x00", "not valid YAML"),
        (b"seed: 1\nseed: 2\n", "'seed' is set twice"),
        (b"training:\n  seed: 1\n  seed: 1\n", "'seed' is set twice"),
        (b"1: 2\n", "1 is no field name"),
        (b"[a]: 2\n", "not valid YAML"),
        (b"a: &x\n  b: *x\n", "not valid YAML"),
        (b"a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_broken_recipes(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_recipe_is_no_field_and_a_missing_one_an_error(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_recipe(tmp_path / "empty.yaml") == {}
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="no such recipe"):
            read_recipe(path)


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_recipes_are_valid(recipe):
    tree = read_recipe(recipe)
    if "instruction" in tree:
        assert build(FeaturizeConfig, tree, str(recipe))
        return
    if "rank" in tree:
        pytest.skip("its data are those of the run that it names")
    marks = {"ranking": "pipeline", "export": "pipeline", "prune": "recover", "data": "rank train", "distill": "sweep"}
    command = next((command for key, command in marks.items() if key in tree), "distill")
    assert build(CONFIGS[command], tree, str(recipe))


def test_flags_do_not_change_the_recipe():
    tree = {"title": "t", "left": {"depth": 1}}
    apply_flags(Outer, tree, ["--left.depth", "9"])
    assert tree == {"title": "t", "left": {"depth": 1}}


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5"), (7, "7"), (0.001, "0.001"), (-2, "-2")])
def test_a_number_for_text_is_text_in_python_as_in_flags_and_recipes(value, text, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"title: {text}\nplace: {text}\n")
    read = build(Outer, read_recipe(recipe))
    assert read == flagged("--title", text, "--place", text) == build(Outer, {"title": value, "place": value})
    assert read.title == text


def test_a_short_name_is_that_of_the_stage_which_is_there():
    pipeline = CONFIGS["pipeline"]
    tree = apply_flags(pipeline, {"quantize": {"model": "m"}}, ["--group-size", "64"])
    assert tree == {"quantize": {"model": "m", "group_size": 64}}
    tree = apply_flags(pipeline, {"ranking": {"teacher": {}}}, ["--group-size", "64"])
    assert tree == {"ranking": {"teacher": {}, "group_size": 64}}
    with pytest.raises(ConfigError, match=r"stands for quantize\.group_size and .* and ranking\.group_size"):
        apply_flags(pipeline, {}, ["--group-size", "64"])
