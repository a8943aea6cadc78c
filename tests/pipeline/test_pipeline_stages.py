"""Stages with keys, on stages that write a line of text: skipped, run for a named reason, gone on with, damaged."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from limbeck.checkpoint import Checkpoint, output_directory, write_manifest
from limbeck.errors import CheckpointError, ConfigError
from limbeck.pipeline.advance import Pipeline
from limbeck.pipeline.record import begin, key_of, read_record, record_file
from limbeck.pipeline.task import Task, named, resolved

CALLS = []


@dataclass(frozen=True, kw_only=True)
class Text:
    """Writes the length of what it reads, and its own words."""

    source: str
    words: str = ""
    threads: int = 1


def write(config, out, resume):
    CALLS.append((out.name, resume))
    with output_directory(out, overwrite=True, resume=resume) as working:
        source = Path(config.source)
        text = (source / "text.txt").read_text() if source.is_dir() else source.read_text()
        (working / "text.txt").write_text(f"{len(text)} {config.words}")
        write_manifest(working, stage="text", config=config, inputs={}, ledger={"tokens": 7, "seconds": {"a": 0.5}})


def fail(config, out, resume):
    CALLS.append((out.name, resume))
    with output_directory(out, overwrite=True, resume=resume) as working:
        (working / "state-1").write_text("half")
        raise CheckpointError("no more") if not resume else CheckpointError("the state is damaged")


def stages(source, words="", threads=1, second_words=""):
    first = Text(source=str(source), words=words, threads=threads)
    second = Text(source="OUT/first", words=second_words)
    third = Text(source="OUT/second/text.txt")
    made = [
        Task(name, config, write, name, is_isolated=False)
        for name, config in (("first", first), ("second", second), ("third", third))
    ]
    told = Task("told", Text(source="OUT/third"), write, "told", follows=("first", "third"), is_isolated=False)
    return [*made, told]


def advance(listed, out):
    CALLS.clear()
    return Pipeline(listed, out).advance(lambda stage: {"seconds": 2.0})


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "source.txt"
    file.write_text("abc")
    return file


def test_nothing_is_done_twice(source, tmp_path):
    out = tmp_path / "out"
    assert advance(stages(source), out) == ["first", "second", "third", "told"]
    record = read_record(out, "first")
    assert record.measured["tokens"] == 7 and record.measured["seconds"] < 0.5
    assert record.predicted == {"seconds": 2.0}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert advance(stages(source), out) == [] and CALLS == []
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_one_field_reruns_what_depends_on_it_and_says_why(source, tmp_path, capfd):
    out = tmp_path / "out"
    advance(stages(source), out)
    changed = stages(source, second_words="more")
    assert [(p.stage.name, p.reason, p.is_certain) for p in Pipeline(changed, out).plan()] == [
        ("first", None, True),
        ("second", "words  -> more", True),
        ("third", "after second, if that gives other files", False),
        ("told", "after third", True),
    ]
    assert advance(changed, out) == ["second", "third", "told"]
    err = " ".join(capfd.readouterr().err.split())
    assert "[2/4] second: words -> more" in err and "[3/4] third: second/text.txt changed" in err
    assert "[1/4] first: unchanged" in err


def test_a_stage_that_gives_the_same_files_reruns_nothing_but_what_tells_of_it(source, tmp_path):
    out = tmp_path / "out"
    advance(stages(source), out)
    assert advance(stages(source, threads=2), out) == ["first", "told"]


def test_an_input_file_that_changed_is_named(source, tmp_path):
    out = tmp_path / "out"
    advance(stages(source), out)
    source.write_text("abcd")
    assert Pipeline(stages(source), out).plan()[0].reason == f"{source} changed"
    assert advance(stages(source), out) == ["first", "second", "told"]  # as long as before: third has nothing to do


@pytest.mark.parametrize("damage", ["changed", "gone", "manifest"])
def test_a_damaged_output_is_named_and_made_again(source, tmp_path, damage):
    out = tmp_path / "out"
    advance(stages(source), out)
    file = out / "second" / ("limbeck.json" if damage == "manifest" else "text.txt")
    before = (out / "second" / "text.txt").read_text()
    if damage == "changed":
        file.write_text("1 X")
    else:
        file.unlink()
    reason = Pipeline(stages(source), out).plan()[1].reason
    assert str(file) in reason and ("is damaged:" in reason) == (damage == "changed")
    assert advance(stages(source), out)[0] == "second"
    assert (out / "second" / "text.txt").read_text() == before


def test_an_unreadable_record_is_no_record(source, tmp_path):
    out = tmp_path / "out"
    advance(stages(source), out)
    record_file(out, "third").write_text("{")
    assert Pipeline(stages(source), out).plan()[2].reason == "not done yet"
    assert "third" in advance(stages(source), out)


def test_what_ended_without_a_record_is_taken_as_it_is(source, tmp_path):
    out = tmp_path / "out"
    listed = stages(source)
    pipeline = Pipeline(listed, out)
    begin(out, listed[0], key_of(listed[0], pipeline.inputs(listed[0])))
    write(resolved(listed[0].config, out), out / "first", False)
    advance(listed, out)
    assert "first" not in [name for name, _ in CALLS]
    assert read_record(out, "first").measured["seconds"] == 0.5  # of its own ledger


def test_an_older_output_is_not_taken_for_the_one_that_was_begun(source, tmp_path):
    out = tmp_path / "out"
    advance(stages(source), out)
    listed = stages(source, words="other")
    begin(out, listed[0], key_of(listed[0], Pipeline(listed, out).inputs(listed[0])))
    advance(listed, out)
    assert ("first", True) in CALLS
    assert (out / "first/text.txt").read_text() == "3 other"


def test_a_stage_that_fails_is_gone_on_with_and_begun_anew_where_its_state_is_damaged(source, tmp_path):
    out = tmp_path / "out"
    broken = [stages(source)[0]._replace(call=fail)]
    with pytest.raises(CheckpointError, match="no more"):
        advance(broken, out)
    assert (out / "first.partial/state-1").exists()
    with pytest.raises(CheckpointError, match="no more"):
        advance(broken, out)
    assert CALLS == [("first", True), ("first", False)]
    other = [stages(source, words="x")[0]]
    assert advance(other, out) == ["first"]  # of another key: what was left of the attempt goes
    assert not (out / "first.partial").exists() and CALLS == [("first", False)]


def test_only_earlier_stages_are_read(source, tmp_path):
    listed = stages(source)
    with pytest.raises(ConfigError, match=r"second: OUT/first is written by no stage before it; this recipe has"):
        Pipeline([listed[1], listed[0]], tmp_path / "out")


def test_two_calls_do_not_meet_in_one_directory(source, tmp_path):
    out, met = tmp_path / "out", []

    def meet(config, directory, resume):
        with pytest.raises(ConfigError, match="another pipeline is at work there"):
            advance(stages(source), out)
        met.append(directory)
        return write(config, directory, resume)

    assert advance([stages(source)[0]._replace(call=meet)], out) == ["first"] and met


def test_names_of_inputs_and_where_they_are(source):
    config = Text(source="OUT/first", words="OUT/second")
    assert list(named(config)) == ["OUT/first", "OUT/second"]
    assert resolved(config, Path("here")).source == "here/first"
    assert list(named(Text(source=""))) == []


def test_records_do_not_depend_on_the_place(source, tmp_path):
    advance(stages(source), tmp_path / "one")
    advance(stages(source), tmp_path / "two")
    for name in ("first", "second", "third"):
        one, two = (json.loads(record_file(tmp_path / place, name).read_text()) for place in ("one", "two"))
        assert (one["key"], one["gives"]) == (two["key"], two["gives"])
    assert Checkpoint(tmp_path / "one/first").is_finished
