"""The walk: blocks one at a time, behind the changed ones before them, resumable."""

import json
import weakref
from contextlib import contextmanager

import pytest
import torch
import transformers
from architectures import build as build_family
from made_models import FAMILIES, made_model

from limbeck.compress import journal
from limbeck.compress.blocks import Blocks, groups_of
from limbeck.compress.calibrate import Rows
from limbeck.compress.method import Solution, stored_state
from limbeck.compress.walk import WalkOptions, write_rest
from limbeck.compress.walk import walk as walk_blocks
from limbeck.compress.weights import ShardWriter
from limbeck.errors import CheckpointError, ModelError
from limbeck.models.tiny import symbol_tokenizer

CPU = torch.device("cpu")


def walk(blocks, rows, method, options, out, fingerprint, device):
    writer = ShardWriter(out, len(blocks) + 1)
    records = walk_blocks(blocks, rows, method, options, writer, fingerprint, device)
    write_rest(blocks, writer)
    journal.remove(out)
    return records


class Change:
    """A method that changes nothing, or scales all weights, and notes what it is given."""

    def __init__(self, scale=1.0, fail_at=None):
        self.scale, self.fail_at, self.seen = scale, fail_at, []

    folds = False

    def wants(self, group):
        return True

    def check(self, blocks, groups):
        pass

    def solve(self, group, problems, fold):
        if self.fail_at == group.block:
            raise KeyboardInterrupt
        self.seen.append((group.name, [problem.name for problem in problems], problems[0].moments))
        return Solution([problem.weight * self.scale for problem in problems])

    def tensors(self, number, block, blocks):
        return blocks.stored(number, stored_state(block, blocks.dtypes))


def made_directory(family, path):
    model = made_model(family)
    model.save_pretrained(path)
    return model


def rows(batch=5, width=24):
    torch.manual_seed(1)
    lengths = [width, 7, 1, 15, 20][:batch]
    return Rows.of([torch.randint(3, 96, (length,)).tolist() for length in lengths])


def reload(directory, blocks):
    blocks.config.save_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_that_changes_nothing_gives_the_same_model(family, tmp_path):
    model = made_directory(family, tmp_path / "model")
    blocks = Blocks(str(tmp_path / "model"))
    out = tmp_path / "out"
    out.mkdir()
    records = walk(blocks, rows(), Change(), WalkOptions(), out, "f", CPU)
    assert all(record.error == 0 for record in records)
    ids = rows().input_ids
    with torch.no_grad():
        torch.testing.assert_close(reload(out, blocks)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "mixtral"])
def test_moments_are_those_of_the_model_itself(family, tmp_path):
    """Inputs of every linear layer, caught in transformers' own forward pass without padding, one row at a time."""
    model = made_directory(family, tmp_path / "model")
    sums, counts = {}, {}
    for number, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):

                def add(module, arguments, key=f"layers.{number}.{name}"):
                    flat = arguments[0].reshape(-1, arguments[0].shape[-1])
                    sums[key] = sums.get(key, 0) + flat.T @ flat
                    counts[key] = counts.get(key, 0) + len(flat)

                module.register_forward_pre_hook(add)
    sample = rows()
    with torch.no_grad():
        for ids, valid in zip(sample.input_ids, sample.valid, strict=True):
            model(ids[valid][None])
    method, out = Change(), tmp_path / "out"
    out.mkdir()
    walk(Blocks(str(tmp_path / "model")), sample, method, WalkOptions(), out, "f", CPU)
    compared = 0
    for _, names, moments in method.seen:
        for name in names:
            if name in sums:
                compared += 1
                assert moments.tokens == counts[name] == sample.tokens
                torch.testing.assert_close(moments.gram, sums[name] / counts[name], rtol=1e-3, atol=1e-4)
    assert compared == len(sums)


def test_experts_are_solved_apart_on_their_own_tokens(tmp_path):
    made_directory("mixtral", tmp_path / "model")
    method, out = Change(), tmp_path / "out"
    out.mkdir()
    sample = rows()
    walk(Blocks(str(tmp_path / "model")), sample, method, WalkOptions(), out, "f", CPU)
    tokens = [moments.tokens for name, _, moments in method.seen if "mlp_in" in name and name.startswith("layers.0.")]
    assert len(tokens) == 4
    assert sum(tokens) == 2 * sample.tokens


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_later_groups_see_the_changed_ones(family, tmp_path):
    """The walk over a scaled model: the moments behind the first group are those of the scaled model."""
    made_directory(family, tmp_path / "model")
    found = {}
    for scale in (1.0, 0.5):
        method, out = Change(scale), tmp_path / f"out-{scale}"
        out.mkdir()
        blocks = Blocks(str(tmp_path / "model"))
        walk(blocks, rows(), method, WalkOptions(), out, "f", CPU)
        found[scale] = (method, reload(out, blocks))
        blocks.config.save_pretrained(out)
    again, last = Change(), tmp_path / "last"
    last.mkdir()
    walk(Blocks(str(tmp_path / "out-0.5")), rows(), again, WalkOptions(), last, "f", CPU)
    for (name, _, seen), (_, _, expected) in zip(found[0.5][0].seen, again.seen, strict=True):
        torch.testing.assert_close(seen.gram, expected.gram, msg=name)
    assert not torch.allclose(found[1.0][0].seen[-1][2].gram, again.seen[-1][2].gram)


def test_dense_targets_aim_at_the_dense_outputs(tmp_path):
    """With the output of attention halved, the best `down` differs; without any change the targets are the weights."""
    made_directory("llama", tmp_path / "model")
    for scale in (1.0, 0.5):
        method, out = Change(scale), tmp_path / f"out-{scale}"
        out.mkdir()
        records = walk(Blocks(str(tmp_path / "model")), rows(), method, WalkOptions(dense_targets=True), out, "f", CPU)
        errors = [record.error for record in records]
        if scale == 1.0:
            assert max(errors) < 1e-6
        else:
            assert errors[0] == pytest.approx(0.25, rel=1e-3)
            assert errors[-1] != pytest.approx(0.25, rel=1e-2)


def test_a_killed_walk_goes_on_with_the_same_bits(tmp_path):
    made_directory("llama", tmp_path / "model")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for path in (whole, parts):
        path.mkdir()
    options = WalkOptions(dense_targets=True)
    walk(Blocks(str(tmp_path / "model")), rows(), Change(0.9), options, whole, "f", CPU)
    with pytest.raises(KeyboardInterrupt):
        walk(Blocks(str(tmp_path / "model")), rows(), Change(0.9, fail_at=2), options, parts, "f", CPU)
    assert json.loads((parts / journal.JOURNAL).read_text())["blocks"] == 2
    method = Change(0.9)
    walk(Blocks(str(tmp_path / "model")), rows(), method, options, parts, "f", CPU)
    assert {name.split(".")[1] for name, _, _ in method.seen} == {"2"}
    for file in sorted(whole.iterdir()):
        assert file.read_bytes() == (parts / file.name).read_bytes()
    assert {file.name for file in whole.iterdir()} == {file.name for file in parts.iterdir()}


def test_one_block_at_a_time_has_weights(tmp_path):
    made_directory("llama", tmp_path / "model")
    blocks = Blocks(str(tmp_path / "model"))
    alive, counts, own = weakref.WeakSet(), [], blocks.block

    @contextmanager
    def watched(number, device):
        with own(number, device) as block:
            alive.add(block)
            yield block

    class Look(Change):
        def solve(self, group, problems, fold):
            counts.append(len(alive))
            return super().solve(group, problems, fold)

    blocks.block = watched
    out = tmp_path / "out"
    out.mkdir()
    walk(blocks, rows(), Look(), WalkOptions(), out, "f", CPU)
    assert counts == [1] * 12
    assert all(parameter.is_meta for layer in blocks.layers for parameter in layer.parameters())


def test_a_journal_of_another_run_is_refused(tmp_path):
    made_directory("llama", tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        walk(Blocks(str(tmp_path / "model")), rows(), Change(fail_at=1), WalkOptions(), out, "f", CPU)
    with pytest.raises(CheckpointError, match="another model, calibration or method"):
        walk(Blocks(str(tmp_path / "model")), rows(), Change(), WalkOptions(), out, "g", CPU)


def test_ignored_layers_are_left(tmp_path):
    made_directory("llama", tmp_path / "model")
    method, out = Change(0.5), tmp_path / "out"
    out.mkdir()
    walk(Blocks(str(tmp_path / "model")), rows(), method, WalkOptions(ignore=("layers.1.", "o_proj")), out, "f", CPU)
    names = {name for _, linears, _ in method.seen for name in linears}
    assert not any("layers.1." in name or "o_proj" in name for name in names)
    assert "layers.0.self_attn.q_proj" in names


def test_groups_share_their_input(tmp_path):
    made_directory("qwen3", tmp_path / "model")
    blocks = Blocks(str(tmp_path / "model"))
    with blocks.block(0, CPU) as block:
        groups = groups_of(block, 0)
    assert [(group.role, sorted(group.linears)) for group in groups] == [
        ("attention_in", ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]),
        ("attention_out", ["self_attn.o_proj"]),
        ("mlp_in", ["mlp.gate_proj", "mlp.up_proj"]),
        ("mlp_out", ["mlp.down_proj"]),
    ]


@pytest.mark.parametrize("name", ["gpt-oss", "LFM2", "Jamba"])
def test_what_cannot_be_walked_is_refused_in_one_line(tmp_path, name):
    build_family(name, 49).save_pretrained(tmp_path)
    symbol_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be taken apart|only Llama-type models") as caught:
        blocks = Blocks(str(tmp_path))
        with blocks.block(0, CPU):
            pass
    assert "\n" not in str(caught.value)
