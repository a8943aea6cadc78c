"""A model in parts: loaded once, held once, and whole again to the bit."""

import pytest
import torch
import torch.distributed as dist
from parallel_runs import on_ranks
from tiny_runs import run_config, save_model

from limbeck.distill.pair import trainable
from limbeck.distill.parallel import join, make_mesh
from limbeck.errors import ConfigError, ModelError
from limbeck.models.load import load_model
from limbeck.models.sharded import assemble, is_sharded, load_in_parts, tensors_of
from limbeck.models.tensor_parallel import split_products
from limbeck.optim.sharding import local


def load_and_compare(path, tensor_size, with_adapters):
    config = run_config({"student.model": path, **({"lora.rank": 2} if with_adapters else {})})
    ranks = join(tensor_size)
    loads = []

    def load():
        loads.append(path)
        return load_model(path, layout="packed")

    model, empty = load_in_parts(
        load, lambda model: trainable(model, config), make_mesh(ranks, None, "shard_size"), ranks.device, torch.float32
    )
    assert len(loads) == (dist.get_rank() == 0)
    assert is_sharded(model) and all(tensor.device.type == "meta" for tensor in empty.parameters())
    held = sum(local(tensor).numel() for tensor in model.parameters())
    total = sum(tensor.numel() for tensor in model.parameters())
    # Norms are in parts too, and rows that do not divide leave the last process less.
    assert held <= 1.05 * total / ranks.readers
    whole = assemble(model, empty)
    if dist.get_rank():
        assert whole is None
        return
    expected = trainable(load_model(path, layout="packed"), config)
    assert whole.state_dict().keys() == expected.state_dict().keys()
    for (name, tensor), other in zip(tensors_of(whole).items(), tensors_of(expected).values(), strict=True):
        assert torch.equal(tensor, other), name
    trained = [parameter.requires_grad for parameter in expected.parameters()]
    assert [parameter.requires_grad for parameter in whole.parameters()] == trained


@pytest.mark.parametrize(
    ("kind", "tied", "processes", "tensor_size", "with_adapters"),
    [("llama", True, 2, 1, True), ("qwen3", False, 4, 2, False)],
    ids=["tied, adapters", "tensor parallel"],
)
def test_parts_make_the_whole(tmp_path, kind, tied, processes, tensor_size, with_adapters):
    path = save_model(tmp_path / "model", kind=kind, tied=tied)
    on_ranks(processes, load_and_compare, path, tensor_size, with_adapters)


def refuse(path, biased):
    ranks = join(2)
    mesh = make_mesh(ranks, None, "shard_size")["tensor"]
    with pytest.raises(ModelError, match="num_key_value_heads 1 cannot be shared by 2 processes"):
        split_products(load_model(path).model, mesh)
    model = load_model(path)
    model.config.base_model_tp_plan = {"layers.*.self_attn.q_proj": "packed_colwise"}
    with pytest.raises(ModelError, match=r"no tensor-parallel plan .* set parallel\.tensor_parallel_size 1"):
        split_products(model.model, mesh)
    with pytest.raises(ModelError, match="q_proj has a bias"):
        split_products(load_model(biased).model, mesh)
    with pytest.raises(ConfigError, match="shard_size 3 does not divide the 1 processes"):
        make_mesh(ranks, 3, "shard_size")


def test_what_cannot_be_split_is_refused(tmp_path):
    path, biased = save_model(tmp_path / "model", kv_heads=1), save_model(tmp_path / "biased")
    model = load_model(biased)
    model.config.attention_bias = True
    type(model)(model.config).save_pretrained(biased)
    on_ranks(2, refuse, path, biased)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.parallel.shard_head": True}, "shard_head needs parallel.strategy shard"),
        ({"training.parallel.tensor_parallel_size": 2}, "tensor_parallel_size needs parallel.strategy shard"),
        ({"training.parallel.shard_size": 0}, "shard_size must be at least 1"),
        ({"training.parallel.teacher_shard_size": 2}, "teacher_shard_size needs parallel.teacher_strategy shard"),
        ({"training.parallel": {"strategy": "shard"}, "teacher.model": "tiny-teacher", "on_policy": {}}, "on_policy"),
        ({"training.parallel": {"strategy": "shard", "tensor_parallel_size": 2}, "lora.rank": 2}, "leave lora out"),
        (
            {
                "training.parallel": {"strategy": "shard", "shard_head": True},
                "supervision.select": {"by": "divergence", "fraction": 0.5},
            },
            "whole rows of logits",
        ),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        run_config(changes)
