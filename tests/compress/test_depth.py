"""Depth pruning against models that really lack the layers."""

import pytest
import torch
from made_models import made_model

from limbeck.compress.calibrate import Rows
from limbeck.compress.passes import Passes
from limbeck.compress.prune.depth import losses_without, remove_layers
from limbeck.compress.shrink import shrink_model
from limbeck.errors import CompressionError

ROWS = Rows.of([[5, 9, 30, 31, 7, 8, 60], [4, 4, 90, 12], [17, 3, 44, 45, 46, 80, 81, 82, 20]])
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "mixtral"]


@torch.no_grad()
def loss_of(model, dense, loss):
    """Mean over the tokens by whole models, row by row without padding."""
    total = []
    for ids, valid in zip(ROWS.input_ids, ROWS.valid, strict=True):
        ids = ids[valid][None]
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        want = dense(ids).logits[0, :-1].log_softmax(-1)
        if loss == "forward_kl":
            total.append((want.exp() * (want - log_probs)).sum(-1))
        else:
            total.append(-log_probs.gather(1, ids[0, 1:, None])[:, 0])
    return float(torch.cat(total).mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", ["forward_kl", "cross_entropy"])
def test_losses_are_those_of_the_smaller_models(family, loss):
    model = made_model(family)
    passes = Passes(model, ROWS, loss, rows_at_once=2)
    want = [loss_of(shrink_model(model, {}, kept), model, loss) for kept in ([1, 2], [0, 2], [0, 1])]
    assert losses_without(passes, [0, 1, 2]) == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert passes.mean_loss([0, 2]) == pytest.approx(want[1], rel=1e-4, abs=1e-6)
    assert passes.mean_loss([0, 1, 2]) == pytest.approx(loss_of(model, model, loss), abs=1e-6)


def test_the_layer_that_does_nothing_goes_first():
    model = made_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    depth = remove_layers(Passes(model, ROWS), 2)
    assert depth.removed[0] == 1
    assert depth.losses[0] == pytest.approx(0, abs=1e-6) and depth.losses[1] > 0.01
    assert sorted(depth.kept + depth.removed) == [0, 1, 2]


def test_every_removal_is_the_best_next_one():
    model = made_model("qwen3", seed=3)
    passes = Passes(model, ROWS)
    depth = remove_layers(passes, 2)
    pairs = {layer: passes.mean_loss([other for other in range(3) if other != layer]) for layer in range(3)}
    assert depth.removed[0] == min(pairs, key=pairs.get)
    left = [layer for layer in range(3) if layer != depth.removed[0]]
    assert depth.losses[1] == pytest.approx(min(passes.mean_loss([layer]) for layer in left), rel=1e-5)


def test_at_least_one_layer_stays():
    passes = Passes(made_model("llama"), ROWS)
    assert remove_layers(passes, 0).kept == (0, 1, 2)
    with pytest.raises(CompressionError, match="remove 3 of 3 layers; expected 0 to 2"):
        remove_layers(passes, 3)
    with pytest.raises(CompressionError, match="no token with a next one"):
        Passes(made_model("llama"), Rows.of([[3], [4]]))
