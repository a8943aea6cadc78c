"""What holds for every policy, unit, switch and supervision, on samples of any shape."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.traces.sample import ANSWER, COT, PROMPT, Sample
from limbeck.traces.supervise import Preset, SupervisionConfig, token_weights
from limbeck.traces.truncate import ACROSS_TRACES, Policy, TruncationConfig, Unit, apply_cut, share_of, truncate

POLICIES = [policy for policy in get_args(Policy) if policy not in ACROSS_TRACES]
UNITS, PRESETS = get_args(Unit), get_args(Preset)
SHARES = st.fractions(min_value=Fraction(1, 1000), max_value=1, max_denominator=1000)

relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def samples(draw) -> Sample:
    prompt, thought, marker, answer = (draw(st.integers(0, 12)) for _ in range(4))
    cot = thought + marker
    length = prompt + cot + answer
    if length == 0:
        prompt = length = 1
    closed = marker > 0 or (cot == 0 and answer > 0)
    return Sample(
        input_ids=np.array(draw(st.lists(st.integers(0, 9), min_size=length, max_size=length)), dtype=np.int32),
        segment_ids=np.repeat(np.array([PROMPT, COT, ANSWER], dtype=np.int8), [prompt, cot, answer]),
        ending_start=prompt + thought if closed else length,
        derivation_end=prompt + draw(st.integers(1, thought)) if thought and draw(st.booleans()) else None,
        trace_key=draw(st.text("ab", max_size=2)),
    )


@st.composite
def configs(draw, share: Fraction | None = None) -> TruncationConfig:
    policy = draw(st.sampled_from(POLICIES))
    takes_share = policy not in ("budget", "first_derivation", "probed")
    return TruncationConfig(
        policy=policy,
        unit=draw(st.sampled_from(UNITS)),
        lead_fraction=str(share or draw(SHARES)) if takes_share else 1.0,
        budget_tokens=draw(st.integers(1, 60)) if policy == "budget" else None,
        keep_ending=draw(st.booleans()),
        mask_only=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


def trained_tokens(sample: Sample, config: TruncationConfig) -> list[int]:
    cut = truncate(sample, config)
    return cut.kept[cut.supervised].tolist()


@relaxed
@given(samples(), configs())
def test_kept_tokens_are_some_of_the_sample_in_order(sample, config):
    cut = truncate(sample, config)
    assert np.all(np.diff(cut.kept) > 0)
    assert len(cut.kept) == len(cut.supervised) > 0
    assert cut.kept[0] >= 0 and cut.kept[-1] < len(sample)
    if config.mask_only:
        assert len(cut.kept) == len(sample)
    else:
        assert cut.supervised.all()


@relaxed
@given(samples(), configs(share=Fraction(1)))
def test_a_share_of_one_is_the_identity(sample, config):
    if config.policy in ("budget", "first_derivation", "probed"):
        return
    cut = truncate(sample, config)
    assert cut.kept.tolist() == list(range(len(sample))) and cut.supervised.all()


@relaxed
@given(samples(), configs(), SHARES, SHARES)
def test_a_larger_share_keeps_what_a_smaller_one_kept(sample, config, a, b):
    if config.policy in ("budget", "first_derivation", "probed"):
        return
    fields = {"policy": config.policy, "unit": config.unit, "keep_ending": config.keep_ending, "seed": config.seed}
    small, large = (TruncationConfig(lead_fraction=str(x), **fields) for x in sorted((a, b)))
    assert set(trained_tokens(sample, small)) <= set(trained_tokens(sample, large))


@relaxed
@given(samples(), configs())
def test_mask_only_trains_on_what_the_cut_keeps(sample, config):
    fields = {name: getattr(config, name) for name in TruncationConfig.__slots__ if name != "mask_only"}
    cut, masked = (TruncationConfig(mask_only=mask, **fields) for mask in (False, True))
    assert trained_tokens(sample, cut) == trained_tokens(sample, masked)


@relaxed
@given(samples(), configs())
def test_keep_ending_adds_exactly_the_ending(sample, config):
    fields = {name: getattr(config, name) for name in TruncationConfig.__slots__ if name != "keep_ending"}
    without, with_ending = (
        set(trained_tokens(sample, TruncationConfig(keep_ending=k, **fields))) for k in (False, True)
    )
    assert with_ending == without | set(range(sample.ending_start, len(sample)))


@relaxed
@given(samples(), SHARES, st.sampled_from(["lead", "middle", "tail", "random_span"]), st.integers(0, 99))
def test_every_share_policy_keeps_the_same_number_inside_the_sequence(sample, share, policy, seed):
    config = TruncationConfig(policy=policy, lead_fraction=str(share), seed=seed)
    kept = truncate(sample, config).kept
    assert len(kept) == share_of(len(sample), str(share)) == max(1, math.floor(share * len(sample)))
    assert kept[-1] - kept[0] == len(kept) - 1


@relaxed
@given(samples(), configs())
def test_the_cut_sample_is_a_selection_with_its_landmarks(sample, config):
    cut = truncate(sample, config)
    small = apply_cut(sample, cut)
    assert small.input_ids.tolist() == sample.input_ids[cut.kept].tolist()
    assert np.all(np.diff(small.segment_ids) >= 0)
    assert cut.kept[small.ending_start :].tolist() == [i for i in cut.kept if i >= sample.ending_start]
    if sample.derivation_end is not None and sample.derivation_end - 1 in cut.kept:
        assert cut.kept[small.derivation_end - 1] == sample.derivation_end - 1
    else:
        assert small.derivation_end is None


@relaxed
@given(st.lists(samples(), min_size=2, max_size=5), configs(), st.randoms())
def test_a_cut_does_not_depend_on_the_samples_before_it(several, config, rng):
    alone = {id(sample): truncate(sample, config) for sample in several}
    rng.shuffle(several)
    for sample in several:
        again = truncate(sample, config)
        assert again.kept.tolist() == alone[id(sample)].kept.tolist()
        assert again.supervised.tolist() == alone[id(sample)].supervised.tolist()


@pytest.mark.parametrize(("policy", "unit", "preset"), itertools.product(POLICIES, UNITS, PRESETS))
def test_every_policy_composes_with_every_supervision(policy, unit, preset):
    sample = Sample(
        input_ids=np.arange(20, dtype=np.int32),
        segment_ids=np.repeat(np.array([PROMPT, COT, ANSWER], dtype=np.int8), [5, 10, 5]),
        ending_start=13,
        derivation_end=9,
    )
    share = 1.0 if policy in ("budget", "first_derivation", "probed") else 0.4
    for keep_ending, mask_only in itertools.product((False, True), repeat=2):
        config = TruncationConfig(
            policy=policy,
            unit=unit,
            lead_fraction=share,
            budget_tokens=4 if policy == "budget" else None,
            keep_ending=keep_ending,
            mask_only=mask_only,
        )
        cut = truncate(sample, config)
        small = apply_cut(sample, cut)
        ce, kd = token_weights(small, cut.supervised, SupervisionConfig(preset=preset))
        named = [("prompt", "cot", "answer")[segment] in preset.split("+") for segment in small.segment_ids]
        expected = cut.supervised & np.array(named)
        expected[0] = False
        assert ce.tolist() == kd.tolist() == expected.astype(float).tolist()
