"""What autograd keeps between forward and backward, counted, against the formulas of the memory model."""

import numpy as np
import pytest
import torch
from tiny_runs import run_config, save_model

from limbeck.cost.memory import ALLOCATOR_FRACTION, PROGRAM_BYTES, saved_bytes, states_of, training_memory
from limbeck.cost.shapes import config_of
from limbeck.distill.pair import load_student
from limbeck.distill.predict import charge_of, data_of, set_up
from limbeck.models.anatomy import hidden_rows
from limbeck.traces.batch import collate
from limbeck.traces.sample import Sample

WIDE = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 160, "kv_heads": 2}


def samples(lengths, prefix=0):
    """Traces whose first `prefix` tokens are the same; all tokens but the first are supervised."""
    return [
        Sample(
            input_ids=np.array([1] * prefix + [2 + number] * (length - prefix), dtype=np.int32),
            segment_ids=np.array([0, *[1] * (length - 1)], dtype=np.int8),
            ending_start=length,
        )
        for number, length in enumerate(lengths)
    ]


def kept_by_autograd(config, examples):
    """Bytes of the storages that a forward pass of the student keeps, its parameters left out."""
    student, _ = load_student(config, None)
    student.train()
    own = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = collate(examples, config.training.layout, 0)
    lengths = batch.sequence_lengths if batch.layout == "packed" else None
    is_bf16 = config.training.precision == "bf16"
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_bf16),
    ):
        hidden, _ = hidden_rows(student, batch.input_ids, batch.positions, batch.target_rows() - 1, lengths)
        kept[hidden.untyped_storage().data_ptr()] = hidden
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("lengths_and_prefix", [([40, 90, 70], 0), ([60, 50, 64, 58], 40)], ids=["apart", "joint"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"training.precision": "bf16"}),
        ("qwen3", {}),
        ("qwen3", {"training.precision": "bf16"}),
    ],
    ids=["lean", "bf16", "qwen3", "qwen3-bf16"],
)
def test_activations_are_what_autograd_keeps(tmp_path, kind, changes, lengths_and_prefix):
    model = save_model(tmp_path / "model", kind=kind, **WIDE)
    config = run_config({"student.model": model, **changes})
    setup = set_up(config, data_of(config, samples(*lengths_and_prefix)), None, None, None, False)
    predicted = charge_of(setup, setup.data.train, 0.0)
    student = setup.student
    formula = saved_bytes(student.dims, student.way, predicted.sent)
    if student.way.is_bf16:
        formula += 2 * student.sizes.linear_weights
    assert formula == pytest.approx(kept_by_autograd(config, setup.data.train), rel=0.03)


def memory(changes=None, steps=3, optimizer="adamw"):
    config = run_config(changes)
    setup = set_up(config, data_of(config, samples([30, 40])), None, None, None, False)
    sent = charge_of(setup, setup.data.train, config.kd_ratio)
    arguments = {"optimizer": optimizer, "accumulates": False, "steps": steps}
    return setup, training_memory(setup.student, setup.teachers, setup.loss, sent.sent, sent.teacher_sent, **arguments)


def test_terms_are_those_of_the_highest_moment():
    setup, found = memory()
    parameters = setup.student.sizes.num_parameters
    assert found["weights"] == 4 * parameters
    assert found["optimizer"] == 8 * parameters
    assert found["program"] == PROGRAM_BYTES
    passing = sum(found.get(name, 0) for name in ("activations", "loss", "workspace"))
    assert found["allocator"] == int(ALLOCATOR_FRACTION * passing)
    assert all(value >= 0 for value in found.values())


def test_a_teacher_adds_its_weights():
    _, alone = memory()
    setup, taught = memory({"teacher.model": "tiny-teacher"})
    assert taught["teacher"] == 4 * setup.teachers[0].sizes.num_parameters > alone["teacher"] == 0


def test_states_by_optimizer():
    assert [states_of(name) for name in ("adamw", "perturb(adamw)", "perturb(sgd)", "sgld")] == [2, 2, 1, 0]
    _, first = memory(steps=1)
    _, later = memory(steps=2)
    assert sum(later.values()) >= sum(first.values())


def test_recomputation_keeps_less():
    config = run_config({"student.model": "tiny-teacher"})
    plain = set_up(config, data_of(config, samples([400])), None, None, None, True)
    config = run_config({"student.model": "tiny-teacher", "training.gradient_checkpointing": True})
    short = set_up(config, data_of(config, samples([400])), None, None, None, True)
    sent = charge_of(plain, plain.data.train, 0.0).sent
    kept = [saved_bytes(setup.student.dims, setup.student.way, sent) for setup in (plain, short)]
    assert kept[1] < 0.6 * kept[0]
    assert config_of("tiny-teacher").num_hidden_layers == plain.student.dims.layers
