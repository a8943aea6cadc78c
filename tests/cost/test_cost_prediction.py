"""Whatever the shape, the cut and the layout: a predicted micro-batch is charged as the ledger charges the real one."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import one_step, run_config

from limbeck.cost.hardware import DEVICES
from limbeck.cost.memory import Pass, saved_bytes, training_memory
from limbeck.distill.predict import charge_of, set_up
from limbeck.ledger import FLOP_PARTS
from limbeck.models.anatomy import Computed
from limbeck.models.load import vocabulary_size
from limbeck.models.tiny import symbol_tokenizer
from limbeck.scale.cluster import Load, device_memory, estimate
from limbeck.scale.planner import models_of

SHAPES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([8, 16, 24]),
        "num_layers": st.integers(1, 3),
        "num_heads": st.sampled_from([1, 2]),
        "intermediate_size": st.sampled_from([8, 40]),
    }
)
RUNS = st.fixed_dictionaries(
    {
        "truncation.lead_fraction": st.sampled_from([0.3, 0.5, "2/3", 1.0]),
        "supervision.preset": st.sampled_from(["cot+answer", "answer", "prompt+cot+answer", "cot"]),
        "training.layout": st.sampled_from(["packed", "padded"]),
        "traces.seed": st.integers(0, 50),
    }
)
TAUGHT = {"teacher.model": "tiny-student"}
TEACHERS = st.sampled_from([{}, TAUGHT, {**TAUGHT, "loss.kd_ratio": 1.0}])


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, run=RUNS, teacher=TEACHERS, cuts=st.sets(st.integers(1, 8), max_size=3))
def test_micro_batches_are_charged_alike(shape, run, teacher, cuts):
    if run["supervision.preset"] == "answer":
        run = {**run, "truncation.lead_fraction": 1.0}
    config = run_config({f"student.scratch.{name}": size for name, size in shape.items()} | run | teacher)
    bounds = [0, *sorted(cuts), 9]
    groups = [list(range(start, stop)) for start, stop in itertools.pairwise(bounds) if start < stop]
    stepped = one_step(config, groups)
    vocab = vocabulary_size(symbol_tokenizer())
    setup = set_up(config, stepped.data, vocab, None, None, False)
    charges = [charge_of(setup, [stepped.data.train[i] for i in group], config.kd_ratio) for group in groups]
    predicted = {name: sum(getattr(charge, name) for charge in charges) for name in ("student", "teacher", "head")}
    assert predicted | {"sampling": 0} == {name: stepped.ledger.flops[name] for name in FLOP_PARTS}
    assert sum(charge.tokens for charge in charges) == stepped.ledger.counts["tokens"]


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, tokens=st.integers(2, 4000), more=st.integers(1, 4000), accumulates=st.booleans())
def test_memory_grows_with_the_micro_batch(shape, tokens, more, accumulates):
    config = run_config({f"student.scratch.{name}": size for name, size in shape.items()})
    models = models_of(config, DEVICES["h100"])
    passes = [_pass(count) for count in (tokens, tokens + more)]
    sizes = [saved_bytes(models.student.dims, models.student.way, sent) for sent in passes]
    found = [
        training_memory(models.student, (), models.loss, sent, (), optimizer="adamw", accumulates=accumulates, steps=2)
        for sent in passes
    ]
    assert sizes[0] < sizes[1]
    assert sum(found[0].values()) <= sum(found[1].values())
    assert all(value >= 0 for terms in found for value in terms.values())


@settings(max_examples=25, deadline=None)
@given(devices=st.sampled_from([2, 4, 8, 16, 64]), head=st.booleans(), tokens=st.sampled_from([2048, 16384]))
def test_a_device_of_more_holds_no_more(devices, head, tokens):
    parallel = {"strategy": "shard", "shard_head": head}
    changes = {"training.parallel": parallel, "training.precision": "bf16", "training.batch_size": 256}
    config = run_config({**changes, "student.model": "tiny-teacher"})
    models, load = models_of(config, DEVICES["h100"]), Load(5000, 900.0, 900.0**2, 500.0, 1000)
    few, many = (device_memory(config, models, load, count, tokens, True) for count in (devices, 2 * devices))
    assert sum(many.values()) <= sum(few.values())
    one, two = (estimate(config, models, load, DEVICES["h100"], count) for count in (devices, 2 * devices))
    assert two.compute_seconds <= one.compute_seconds and one.flops == two.flops
    assert one.peak_bytes == sum(one.memory.values())


def _pass(tokens: int) -> Pass:
    return Pass(Computed.whole([tokens]), tokens - 1)
