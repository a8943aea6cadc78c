"""Inputs on object stores: a local copy with the bytes of the store, made once, and anew when the object changes."""

import json

import fsspec
import pytest
from tiny_runs import run_config, save_model

import limbeck
from limbeck import stores
from limbeck.distill.output import inputs_of
from limbeck.distill.pair import load_student
from limbeck.errors import ConfigError, ModelError
from limbeck.models.load import Location, load_tokenizer, locate, model_hash
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.synthetic import generate
from limbeck.traces.trace import write_jsonl

TRACES = "memory://bucket/made/traces.jsonl"


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    stores._copied.cache_clear()


def put_traces(store, tmp_path, seed=0):
    write_jsonl(generate(5, seed, 1, 2), tmp_path / "traces.jsonl")
    store.pipe(TRACES, (tmp_path / "traces.jsonl").read_bytes())


def texts(source):
    return [(trace.prompt_key, trace.cot, trace.answer) for trace in read_traces(TraceConfig(source=source))[0]]


def test_traces_of_a_store_are_those_of_the_file(store, tmp_path):
    put_traces(store, tmp_path)
    assert texts(TRACES) == texts(str(tmp_path / "traces.jsonl"))
    changes = {"traces.source": TRACES}
    here = {"traces.source": str(tmp_path / "traces.jsonl")}
    assert inputs_of(run_config(changes)) == inputs_of(run_config(here)) and "traces" in inputs_of(run_config(here))


def test_a_bad_record_is_told_by_its_address(store, tmp_path):
    store.pipe(TRACES, b'{"prompt": "1+1", "completion": "<think>2</think> 2"}\n{broken\n')
    with pytest.raises(limbeck.LimbeckError, match=r"memory://bucket/made/traces\.jsonl:2: not JSON"):
        read_traces(TraceConfig(source=TRACES))


def test_an_object_is_copied_once_and_anew_when_it_has_changed(store, tmp_path, monkeypatch):
    fetched = []
    get_file = type(store).get_file
    monkeypatch.setattr(type(store), "get_file", lambda self, *a, **k: fetched.append(a[0]) or get_file(self, *a, **k))
    put_traces(store, tmp_path)
    before = texts(TRACES)
    stores._copied.cache_clear()  # as in another process
    assert texts(TRACES) == before and len(fetched) == 1
    put_traces(store, tmp_path, seed=3)
    assert texts(TRACES) == before, "within a process an address stays what it was"
    stores._copied.cache_clear()
    assert texts(TRACES) == texts(str(tmp_path / "traces.jsonl")) != before and len(fetched) == 2


def test_a_model_of_a_store_is_the_model(store, tmp_path):
    directory = save_model(tmp_path / "model")
    store.put(directory + "/", "memory://bucket/model/", recursive=True)
    store.pipe("memory://bucket/model/pytorch_model.bin", b"not read")
    address = "memory://bucket/model"
    assert model_hash(address) == model_hash(directory)
    assert load_tokenizer(address)("12+3")["input_ids"] == load_tokenizer(directory)("12+3")["input_ids"]
    student, _ = load_student(run_config({"student.model": address}))
    twin, _ = load_student(run_config({"student.model": directory}))
    for one, other in zip(student.parameters(), twin.parameters(), strict=True):
        assert one.equal(other)


def test_the_hubs_address_of_a_model_is_its_id():
    assert locate("hf://owner/name") == Location("owner/name", None, False)


def test_a_directory_of_a_store_is_read_as_one(store, tmp_path):
    for number in range(2):
        record = {"prompt": f"{number}+1", "completion": f"<think>x</think> {number + 1}"}
        store.pipe(f"memory://bucket/many/part-{number}.jsonl", json.dumps(record).encode())
    store.pipe("memory://bucket/many/picture.png", b"not read")
    traces, _ = read_traces(TraceConfig(source="memory://bucket/many/"))
    assert [trace.answer for trace in traces] == ["1", "2"]


@pytest.mark.parametrize("address", ["memory://bucket/none.jsonl", "nosuchstore://bucket/x.jsonl"])
def test_what_cannot_be_read_is_one_line(address):
    with pytest.raises(ConfigError, match=r"cannot be read .*check name, rights") as caught:
        read_traces(TraceConfig(source=address))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(address)
    with pytest.raises((ConfigError, ModelError), match="cannot be read"):
        locate(address)


def test_a_field_that_takes_local_paths_alone_says_so():
    with pytest.raises(ConfigError, match=r"teacher.cache: s3://bucket/cache is on another store; copy it here"):
        run_config({"teacher.cache": "s3://bucket/cache"})
