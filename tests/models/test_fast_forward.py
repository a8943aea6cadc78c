"""The lean packed forward equals transformers' own: hidden states and every gradient."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.ledger import backbone_backward_flops, backbone_forward_flops, flop_counter
from limbeck.models.anatomy import hidden_rows, sizes_of
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.models.lean import can_run, packed_rows, plan_packed
from limbeck.models.probe import ask

VOCAB = 61


def llama(kv_heads: int = 2, layers: int = 3, **settings: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        **settings,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.set_attn_implementation(PACKED_ATTENTION)
    return model


def packed(lengths: list[int], prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (sum(lengths),), generator=generator)
    start = 0
    for length in lengths:
        ids[start : start + min(prefix, length)] = ids[: min(prefix, length)]
        start += length
    return ids, torch.cat([torch.arange(n) for n in lengths])


def gradients(model: LlamaForCausalLM, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(
    ("lengths", "prefix", "skip"),
    [
        ([17], 0, 0),
        ([9, 20, 1, 5], 0, 0),
        ([9, 20, 12], 4, 0),
        ([9, 20, 12], 5, 6),
        ([6, 6], 6, 0),
        ([8, 3, 8], 2, 3),
        ([26, 24, 27], 20, 0),
        ([26, 24, 27], 20, 22),
    ],
)
def test_equals_transformers(lengths: list[int], prefix: int, skip: int, kv_heads: int) -> None:
    model = llama(kv_heads)
    ids, positions = packed(lengths, prefix)
    # Needed positions: from `skip` on in every sequence, the last one left out, as for supervised targets.
    rows = torch.nonzero(
        torch.cat([(torch.arange(n) >= skip) & (torch.arange(n) < max(1, n - 1)) for n in lengths])
    ).squeeze(1)
    plan = plan_packed(ids, lengths, rows)
    ours = packed_rows(model.model, ids, positions, plan)
    theirs = model.model(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, sequence_lengths=tuple(lengths)
    ).last_hidden_state[0][rows]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    expected = gradients(model, theirs)
    for name, gradient in gradients(model, ours).items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=1e-4, atol=1e-5, msg=name)
    assert expected.keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("prefix", "pairs"),
    [(4, 7**2 + 11**2 + 8**2), (6, 6**2 + 8 * 14)],
    ids=["one by one", "joint"],
)
def test_ledger_formulas_match_what_is_counted(prefix: int, pairs: int) -> None:
    lengths, model = [9, 20, 12], llama()
    ids, positions = packed(lengths, prefix)
    rows = torch.tensor([5, 6, 12, 15, 19, 35, 36])
    ask(model)
    with flop_counter() as counter:
        hidden, computed = hidden_rows(model, ids[None], positions[None], rows, lengths)
        hidden.sum().backward()
    sizes = sizes_of(model)
    expected = backbone_forward_flops(sizes, computed) + backbone_backward_flops(sizes, computed)
    assert computed.attention_pairs == pairs
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_leaves_out_what_nobody_reads() -> None:
    ids = torch.tensor([5, 6, 7, 8, 9, 5, 6, 1, 2, 3, 4, 5, 6])
    plan = plan_packed(ids, [5, 6, 2], torch.tensor([2, 3, 7, 8]))
    assert plan.lengths == (4, 4)  # the third sequence is not read at all
    assert plan.prefix == 2
    assert plan.kept.tolist() == [0, 1, 2, 3, 7, 8]
    assert plan.rows.tolist() == [2, 3, 4, 5]


def test_prefix_rows_may_be_needed_themselves() -> None:
    ids = torch.tensor([5, 6, 7, 5, 6, 8])
    plan = plan_packed(ids, [3, 3], torch.tensor([1, 2, 4, 5]))
    assert plan.kept.tolist() == [0, 1, 2, 5]
    assert plan.rows.tolist() == [1, 2, 1, 3]


def test_other_models_are_refused() -> None:
    assert can_run(llama().model)
    assert not can_run(llama(attention_bias=True).model)
    assert not can_run(llama().to(torch.bfloat16).model)
    assert not can_run(llama(hidden_act="gelu").model)
    dropping = llama(attention_dropout=0.1).model
    assert can_run(dropping.eval()) and not can_run(dropping.train())
    checkpointed = llama()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not can_run(checkpointed.model)
