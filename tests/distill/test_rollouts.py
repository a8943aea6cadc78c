"""On-policy steps: when they come, what they train on, that a restart and a second rank change nothing."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import assert_same_bits, metrics_of, run_config, save_model, train_on_ranks, weights_of

from limbeck.checkpoint import Checkpoint
from limbeck.config import to_dict
from limbeck.distill import train
from limbeck.distill.on_policy import OnPolicyConfig
from limbeck.distill.parallel import Ranks
from limbeck.distill.setup import set_up as make_run
from limbeck.distill.step_work import work_of
from limbeck.engine.complete import complete
from limbeck.engine.plain import PlainDecoder
from limbeck.engine.sampling import SamplingConfig
from limbeck.errors import ConfigError
from limbeck.ledger import decoding_flops, flop_counter
from limbeck.models.anatomy import causal_lm_of, sizes_of
from limbeck.models.load import load_model
from limbeck.stage import How

STEPS = 6
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher") / "model", sharpness=30.0)


def config(teacher, **changes):
    tree = {
        "teacher.model": teacher,
        "training.max_steps": STEPS,
        "training.save_every_steps": 1,
        "on_policy": {"start_fraction": 0.34, "max_new_tokens": 12, "max_staleness_steps": 2},
    }
    return run_config({**tree, **changes})


@given(
    total=st.integers(1, 200),
    start=st.one_of(st.none(), st.floats(0, 1)),
    fraction=st.floats(0.01, 1),
    staleness=st.one_of(st.none(), st.integers(0, 20)),
)
def test_schedule_is_exact_even_and_never_stale(total, start, fraction, staleness):
    policy = OnPolicyConfig(start_fraction=start, fraction=fraction, max_staleness_steps=staleness)
    first = policy.first_step(total)
    due = [policy.is_on_policy(step, total) for step in range(total)]
    assert not any(due[:first])
    assert sum(due[first:]) == math.ceil((total - first) * fraction)
    for step in range(total):
        if due[step]:
            window = policy.window(step, total)
            assert step in window and window[0] >= first
            assert all(policy.window(other, total) == window for other in window)
            assert staleness is None or len(window) <= staleness + 1


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"start_fraction": 1.5}, "start_fraction"),
        ({"fraction": 0.0}, "fraction"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_staleness_steps": -1}, "max_staleness_steps"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"length_warning_factor": 0.0}, "length_warning_factor"),
    ],
)
def test_bad_settings_are_refused(fields, what):
    with pytest.raises(ConfigError, match=what):
        OnPolicyConfig(**fields)


def test_rollouts_grow_in_a_straight_line_from_first_to_last(teacher, tmp_path):
    changes = {"start_fraction": 0.34, "first_new_tokens": 2, "max_new_tokens": 11, "max_staleness_steps": 0}
    policy = OnPolicyConfig(**changes)
    assert [policy.new_tokens_at(step, 6) for step in range(2, 6)] == [2, 5, 8, 11]
    assert OnPolicyConfig(max_new_tokens=9).new_tokens_at(0, 6) == 9
    whole = config(teacher, on_policy=changes)
    train.run(whole, tmp_path / "whole")
    rows = metrics_of(tmp_path / "whole")
    # A student from scratch hardly ever stops, so most rollouts are as long as they may be.
    for row, limit in zip(rows[2:], (2, 5, 8, 11), strict=True):
        assert limit / 2 < row["rollout_tokens"] <= limit
    with pytest.raises(ConfigError, match="first_new_tokens"):
        OnPolicyConfig(first_new_tokens=400)


def test_teachers_that_cannot_score_new_text_are_refused(teacher, tmp_path):
    with pytest.raises(ConfigError, match="score new text"):
        config(teacher, **{"teacher.cache": str(tmp_path)})
    with pytest.raises(ConfigError, match="score new text"):
        config(teacher, **{"teacher.others": [{"cache": str(tmp_path)}]})
    with pytest.raises(ConfigError, match="score new text"):
        run_config({"on_policy": {}})


def set_up(config):
    setup = make_run(config, ALONE)
    setup.student.model.train()
    return setup


def test_rollouts_are_what_the_student_writes(teacher):
    """Prompt as at inference, tokens of the sampler, weights on what was written; CE has no share in it."""
    setup = set_up(config(teacher, **{"on_policy.start_fraction": 0.0, "on_policy.num_samples": 2}))
    work = work_of(setup, 0)
    examples = sorted((e for group in work.microbatches for e in group), key=lambda e: e.sample.source)
    assert len(examples) == 2 * len(setup.steps[0].indices)
    for index in setup.steps[0].indices:
        prompt = setup.data.prompts.ids[index]
        sampling = SamplingConfig(max_new_tokens=12, temperature=0.9, num_samples=2)
        ((one, two),) = complete(
            setup.student.model, [prompt], sampling, setup.rollouts.stop_ids, 5 * 1_000_003, keys=[index]
        )
        mine = [e for e in examples if e.sample.source == f"rollout of {index}"]
        assert [e.sample.input_ids.tolist() for e in mine] == [prompt + c.token_ids for c in (one, two)]
        for example in mine:
            assert not example.ce_weight.any()
            assert not example.kd_weight[: len(prompt)].any()
    assert work.loss.kd_ratio == 1.0
    assert work.loss.totals.kd == sum(e.kd_weight.sum() for e in examples)
    assert setup.student.model.training


def test_special_tokens_carry_no_loss_but_those_that_must_be_learnt(teacher):
    setup = set_up(config(teacher))
    rollouts, tokenizer = setup.rollouts, setup.student.tokenizer
    words = ["<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<|im_end|>", "5"]
    ids = [tokenizer.convert_tokens_to_ids(word) for word in words]
    completion = complete(setup.student.model, [[7]], SamplingConfig(max_new_tokens=1), [])[0][0]
    completion = dataclasses.replace(completion, token_ids=ids)
    weights = rollouts._example(0, completion).kd_weight[-len(ids) :]
    assert weights.tolist() == [0, 0, 1, 1, 1, 1]
    open_setup = set_up(config(teacher, **{"on_policy.mask_special_tokens": False}))
    assert open_setup.rollouts._example(0, completion).kd_weight[-len(ids) :].all()


def test_buffer_is_refreshed_when_it_is_older_than_allowed(teacher, tmp_path):
    train.run(config(teacher), tmp_path / "out")
    rows = metrics_of(tmp_path / "out")
    assert [row["on_policy"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [row["rollout_age_steps"] for row in rows[2:]] == [0, 1, 2, 0]
    assert all(row["ce_term"] == 0 and row["kd_term"] > 0 for row in rows[2:])
    train.run(config(teacher, **{"on_policy.max_staleness_steps": None}), tmp_path / "offline")
    assert [row["rollout_age_steps"] for row in metrics_of(tmp_path / "offline")[2:]] == [0, 1, 2, 3]
    ledger = Checkpoint(tmp_path / "out").manifest["ledger"]
    assert ledger["rollout_tokens"] > 0 and ledger["flops"]["sampling"] > 0 and ledger["seconds"]["sampling"] > 0


@pytest.mark.parametrize("start_fraction", [1.0, None])
def test_never_on_policy_is_the_run_on_given_traces(teacher, tmp_path, start_fraction):
    train.run(config(teacher, **{"on_policy.start_fraction": start_fraction}), tmp_path / "never")
    train.run(config(teacher, on_policy=None), tmp_path / "given")
    mine, theirs = weights_of(tmp_path / "never"), weights_of(tmp_path / "given")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_resumed_with_rollouts_in_use_is_the_same_run(teacher, tmp_path, monkeypatch, steps):
    class PulledPlug(BaseException):
        pass

    changes = {"on_policy.max_staleness_steps": 3, "on_policy.fraction": 0.75, "training.microbatch_tokens": 90}
    run = config(teacher, **changes)
    train.run(run, tmp_path / "whole")
    whole_step = train._step

    def step(setup, number):
        if number == steps:
            raise PulledPlug
        return whole_step(setup, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", step)
        with pytest.raises(PulledPlug):
            train.run(run, tmp_path / "out")
    state = json.loads((tmp_path / f"out.partial/state-{steps:08d}/state.json").read_text())
    assert state["rollouts"]["completions"]
    train.run(run, tmp_path / "out", how=How(resume=True))
    assert_same_bits(tmp_path / "out", tmp_path / "whole")
    costs = [Checkpoint(tmp_path / name).manifest["ledger"] for name in ("out", "whole")]
    assert costs[0]["flops"] == costs[1]["flops"]
    assert costs[0]["rollout_tokens"] == costs[1]["rollout_tokens"]


def test_a_rounded_sampler_is_compared_with_the_student(teacher, tmp_path):
    """The student's log-probs are those of a plain forward, and the ratio weighs the loss up to a limit."""
    changes = {"on_policy.precision": "int8", "on_policy.importance_limit": 1.01, "on_policy.start_fraction": 0.0}
    changes["on_policy.mask_special_tokens"] = False
    setup = set_up(config(teacher, **changes))
    work = work_of(setup, 0)
    model, prompts = setup.student.model.eval(), setup.data.prompts.ids
    for index, found in setup.rollouts.completions.items():
        for completion in found:
            ids = torch.tensor([prompts[index] + completion.token_ids])
            with torch.no_grad():
                rows = causal_lm_of(model)(ids, sequence_lengths=(ids.shape[1],)).logits[
                    0, len(prompts[index]) - 1 : -1
                ]
            expected = (rows / 0.9).log_softmax(-1).gather(1, ids[0, len(prompts[index]) :, None])[:, 0]
            assert completion.exact_log_probs == pytest.approx(expected.tolist(), abs=2e-5)
            assert completion.log_probs != completion.exact_log_probs
            assert completion.log_probs == pytest.approx(completion.exact_log_probs, abs=0.5)
            weights = setup.rollouts._example(index, completion).kd_weight[len(prompts[index]) :]
            ratios = np.exp(np.array(completion.exact_log_probs) - completion.log_probs)
            assert weights == pytest.approx(np.minimum(ratios, 1.01), rel=1e-6)
    assert 0 < work.metrics["rollout_mismatch_nats"] < 0.1
    assert 0.5 < work.metrics["rollout_importance"] <= 1.01 and work.metrics["rounding_seconds"] > 0
    restored = dataclasses.replace(setup.rollouts, completions={})
    restored.restore(json.loads(json.dumps(setup.rollouts.state())))
    assert restored.completions == setup.rollouts.completions


@pytest.mark.parametrize(
    "fields",
    [{"importance_limit": 2.0}, {"precision": "int8", "importance_limit": 0.5}, {"importance_limit": 2, "top_p": 0.9}],
)
def test_importance_needs_a_rounded_sampler(fields):
    with pytest.raises(ConfigError, match="importance_limit"):
        OnPolicyConfig(**fields)


def backward(setup, examples, loss):
    setup.objective(setup.microbatch(examples, loss)).total.backward()


def test_no_gradient_passes_through_the_sampling(teacher):
    """The step's gradient is that of the same tokens given as plain data."""
    setup = set_up(config(teacher, **{"on_policy.start_fraction": 0.0}))
    work = work_of(setup, 0)
    assert all(p.grad is None for p in setup.student.model.parameters())
    for examples in work.microbatches:
        backward(setup, examples, work.loss)
    gradients = {n: p.grad.clone() for n, p in setup.student.model.named_parameters()}
    setup.student.model.zero_grad()
    frozen = [
        dataclasses.replace(e, sample=dataclasses.replace(e.sample, input_ids=np.array(e.sample.input_ids)))
        for group in work.microbatches
        for e in group
    ]
    backward(setup, frozen, work.loss)
    for name, p in setup.student.model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-7)
    assert any(g.abs().max() > 1e-5 for g in gradients.values())


def test_two_ranks_are_one(teacher, tmp_path):
    run = config(teacher, **{"training.save_every_steps": 2})
    train.run(run, tmp_path / "one")
    train_on_ranks(run, tmp_path / "two")
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    mine, theirs = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=2e-5)
    ledgers = [Checkpoint(tmp_path / name).manifest["ledger"] for name in ("one", "two")]
    assert ledgers[0]["rollout_tokens"] == ledgers[1]["rollout_tokens"]
    assert ledgers[0]["flops"]["sampling"] == ledgers[1]["flops"]["sampling"]


def test_length_inflation_is_said_once(teacher, tmp_path, capsys, monkeypatch):
    from limbeck.distill import rollouts

    said = []
    monkeypatch.setattr(rollouts.console, "print", lambda text, **_: said.append(text))
    train.run(config(teacher, **{"on_policy.length_warning_factor": 0.01}), tmp_path / "out")
    assert sum("length inflation" in line for line in said) == 1
    rows = [row for row in metrics_of(tmp_path / "out") if row["on_policy"]]
    assert all(0 < row["rollout_tokens"] <= 12 and 0 <= row["rollout_stopped"] <= 1 for row in rows)


def test_own_divergence_on_rollouts(teacher):
    run = config(teacher, **{"on_policy.divergence": {"name": "reverse_kl"}, "on_policy.start_fraction": 0.0})
    assert work_of(set_up(run), 0).loss.config.divergence.name == "reverse_kl"
    assert run.loss.divergence.name == "forward_kl"


def test_sampling_flops_are_those_that_torch_counts(teacher, monkeypatch):
    model = load_model(teacher)
    monkeypatch.setattr("limbeck.engine.backends.unsupported", lambda _: "kernels of our own are not counted")
    PlainDecoder(model)  # asks the model how it can be run, the first time
    with flop_counter() as looked_at:
        PlainDecoder(model)
    with flop_counter() as counter:
        ((completion,),) = complete(model, [[3, 4, 5, 6, 7]], SamplingConfig(max_new_tokens=9), [])
    assert len(completion.token_ids) == 9
    assert decoding_flops(sizes_of(model), 5, [9]) == pytest.approx(
        counter.get_total_flops() - looked_at.get_total_flops(), rel=0.02
    )
    assert to_dict(OnPolicyConfig())["start_fraction"] == 0.5
