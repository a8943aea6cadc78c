"""One step's loss, gradient and cost against plain references, however the step is split, laid out or taught."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import (
    CPU,
    assert_same_gradients,
    metrics_of,
    one_step,
    run_config,
    save_model,
    tokens_of,
    weights_of,
)

from limbeck.distill import train
from limbeck.distill.data import prepare
from limbeck.distill.pair import load_student
from limbeck.distill.parallel import Ranks
from limbeck.distill.setup import set_up
from limbeck.errors import ConfigError, LimbeckError, PairError
from limbeck.models.load import load_model, load_tokenizer, vocabulary_size
from limbeck.models.tiny import symbol_tokenizer
from limbeck.teacher.build import write_cache
from limbeck.teacher.cache import CacheConfig
from limbeck.teacher.shard import Stored

SINGLY = [[i] for i in range(9)]
UNEVEN = [[0, 1, 2, 3, 4], [5], [6, 7, 8]]
UNEQUAL_WEIGHTS = {
    "supervision.ce": {"prompt": 0.5, "cot": 1.0, "answer": 2.0},
    "supervision.kd": {"cot": 0.25, "answer": 3.0},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), sharpness=60.0)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("untied"), tied=False, kv_heads=1, seed=3)


def dense_reference(config):
    """CE and KD terms of a whole step by full forwards of one sequence at a time, and their gradient."""
    student, tokenizer = load_student(config, None)
    vocab = vocabulary_size(tokenizer)
    teacher_model = load_model(config.teacher.model) if config.teacher.model else None
    examples = prepare(config, tokenizer).train
    terms = {"ce": [], "kd": []}
    for example in examples:
        ids = torch.from_numpy(example.sample.input_ids.astype("int64"))[None]
        logits = student(ids).logits[0, :-1, :vocab]
        ce = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        kd = torch.zeros(len(ce))
        if teacher_model is not None:
            scale = config.loss.temperature
            with torch.no_grad():
                theirs = torch.log_softmax(teacher_model(ids).logits[0, :-1, :vocab] / scale, -1)
            mine = torch.log_softmax(logits / scale, -1)
            kd = (theirs.exp() * (theirs - mine)).sum(-1) * scale**2
        terms["ce"].append((ce, torch.from_numpy(example.ce_weight[1:])))
        terms["kd"].append((kd, torch.from_numpy(example.kd_weight[1:])))
    ce, kd = (_mean(pairs, config.loss.normalization) for pairs in terms.values())
    ce, kd = (1 - config.kd_ratio) * ce, config.kd_ratio * kd
    (ce + kd).backward()
    return float(ce), float(kd), {name: p.grad for name, p in student.named_parameters()}


def _mean(pairs, normalization):
    if normalization == "token_mean":
        return sum((value * weight).sum() for value, weight in pairs) / sum(weight.sum() for _, weight in pairs)
    means = [(value * weight).sum() / weight.sum() for value, weight in pairs if weight.sum() > 0]
    return sum(means) / len(means)


@pytest.mark.parametrize("normalization", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_step_equals_plain_reference(teacher, normalization, kd_ratio):
    config = run_config(
        {
            "teacher.model": teacher,
            "loss.kd_ratio": kd_ratio,
            "loss.normalization": normalization,
            "loss.temperature": 2.0,
            **UNEQUAL_WEIGHTS,
        }
    )
    step = one_step(config)
    ce, kd, gradients = dense_reference(config)
    assert (step.ce, step.kd) == pytest.approx((ce, kd), rel=1e-5, abs=1e-7)
    for name, gradient in gradients.items():
        torch.testing.assert_close(step.gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalization", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("groups", [SINGLY, UNEVEN])
def test_microbatches_do_not_change_the_step(teacher, normalization, groups):
    config = run_config({"teacher.model": teacher, "loss.normalization": normalization, **UNEQUAL_WEIGHTS})
    whole, split = one_step(config), one_step(config, groups)
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    assert_same_gradients(whole, split)
    assert split.ledger.counts == whole.ledger.counts
    # A micro-batch computes the prefix that its sequences share once, so smaller ones cost a little more.
    assert split.ledger.flops["head"] == whole.ledger.flops["head"]
    assert whole.ledger.flops["student"] <= split.ledger.flops["student"] < 1.2 * whole.ledger.flops["student"]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_packed_equals_padded(tmp_path, teacher, kind):
    student = save_model(tmp_path / "student", kind=kind, kv_heads=1, seed=4)
    changes = {"student.model": student, "teacher.model": teacher, **UNEQUAL_WEIGHTS}
    packed = one_step(run_config(changes))
    padded = one_step(run_config({**changes, "training.layout": "padded"}))
    assert padded.loss == pytest.approx(packed.loss, rel=1e-6)
    assert_same_gradients(packed, padded)
    assert padded.ledger.counts["tokens"] == packed.ledger.counts["tokens"]
    assert padded.ledger.counts["padded_tokens"] > packed.ledger.counts["padded_tokens"] == 0


def test_text_only_equals_a_ratio_of_zero(teacher):
    text, unused = one_step(run_config()), one_step(run_config({"teacher.model": teacher, "loss.kd_ratio": 0.0}))
    assert text.loss == unused.loss
    assert text.kd == unused.kd == 0
    assert text.ledger.flops["teacher"] == unused.ledger.flops["teacher"] == 0
    assert_same_gradients(text, unused, atol=0)


def stored(teacher, changes, out, **config):
    """A config whose teacher is a cache of the run's own sequences."""
    examples = prepare(run_config(changes), symbol_tokenizer()).train
    asked = [Stored(example.sample.input_ids, example.kd_weight > 0) for example in examples]
    write_cache(teacher, CacheConfig(**config), asked, out, CacheConfig(**config))
    return run_config({**changes, "teacher.cache": str(out)})


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("mode", "error"), [("hidden", 1e-5), ("top_k", 1e-2)])
def test_cached_teacher_equals_live_teacher(tmp_path, teacher, layout, mode, error):
    changes = {"training.layout": layout, "truncation.lead_fraction": 0.7}
    live = one_step(run_config({**changes, "loss.kd_ratio": 0.75, "teacher.model": teacher}))
    stored(teacher, changes, tmp_path, mode=mode, top_k=99, min_probability=0.0)
    config = run_config({**changes, "loss.kd_ratio": 0.75, "teacher.cache": str(tmp_path)})
    cached = one_step(config, UNEVEN)
    assert cached.loss == pytest.approx(live.loss, rel=error / 10)
    assert cached.kd == pytest.approx(live.kd, rel=error)
    for name, gradient in live.gradients.items():
        assert (cached.gradients[name] - gradient).norm() <= error * gradient.norm(), name
    assert cached.ledger.flops["teacher"] == 0 < live.ledger.flops["teacher"]


def test_drawn_targets_are_unbiased(tmp_path, teacher):
    live = one_step(run_config({"teacher.model": teacher, "loss.kd_ratio": 1.0}))
    errors = []
    for num_samples in (1, 255):
        config = stored(teacher, {}, tmp_path / str(num_samples), mode="sampled", num_samples=num_samples)
        drawn = one_step(dataclasses.replace(config, loss=dataclasses.replace(config.loss, kd_ratio=1.0)))
        head = next(name for name in live.gradients if "embed" in name or "lm_head" in name)
        errors.append(float((drawn.gradients[head] - live.gradients[head]).norm() / live.gradients[head].norm()))
    # The error of an unbiased estimate falls with the root of the draws.
    assert errors[1] < errors[0] / 8


def test_more_stored_entries_come_closer_from_below(tmp_path, teacher):
    live = one_step(run_config({"teacher.model": teacher, "loss.kd_ratio": 1.0})).kd
    kept = []
    for top_k in (2, 8, 24):
        config = stored(teacher, {}, tmp_path / str(top_k), top_k=top_k, min_probability=0.0)
        kept.append(one_step(dataclasses.replace(config, loss=dataclasses.replace(config.loss, kd_ratio=1.0))).kd)
    assert kept[0] < kept[1] < kept[2] < live
    assert kept[2] == pytest.approx(live, rel=0.05)


def test_a_sequence_that_is_not_stored_is_refused(tmp_path, teacher):
    config = stored(teacher, {}, tmp_path)
    cut = dataclasses.replace(config.truncation, lead_fraction=0.5, keep_ending=True)
    other = dataclasses.replace(config, truncation=cut)
    with pytest.raises(PairError, match=r"no targets for builtin:chain seed 0 number \d+ as it is cut here"):
        one_step(other)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"])
def test_a_teacher_equal_to_the_student_teaches_nothing(tmp_path, divergence):
    same = save_model(tmp_path, sharpness=30.0)
    config = run_config(
        {
            "student.model": same,
            "teacher.model": same,
            "loss.kd_ratio": 1.0,
            "loss.divergence.name": divergence,
            "loss.temperature": 1.5,
        }
    )
    step = one_step(config)
    assert abs(step.kd) < 1e-6
    assert all(gradient.abs().max() < 1e-6 for gradient in step.gradients.values())


def test_gradient_checkpointing_changes_nothing(teacher):
    plain = one_step(run_config({"teacher.model": teacher}))
    recomputed = one_step(run_config({"teacher.model": teacher, "training.gradient_checkpointing": True}))
    assert recomputed.loss == plain.loss
    assert_same_gradients(plain, recomputed, atol=1e-8)
    assert recomputed.ledger.flops["student"] > plain.ledger.flops["student"]


def test_microbatches_without_supervision(teacher):
    changes = {"teacher.model": teacher, "truncation.lead_fraction": 0.35, "supervision.preset": "answer"}
    changes |= {
        "traces.chain_max_steps": 6,
        "truncation.keep_ending": False,
        "supervision.ce": {"cot": 1.0, "answer": 1.0},
    }
    config = run_config({**changes, "supervision.kd": {"answer": 1.0}})
    whole, split = one_step(config), one_step(config, SINGLY)
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    assert split.ledger.counts["tokens"] == whole.ledger.counts["tokens"] == sum(map(len, whole.data.train))
    assert split.ledger.counts["sequences"] == 9
    assert_same_gradients(whole, split)


def test_nothing_supervised_at_all_is_refused(teacher):
    changes = {"truncation.lead_fraction": 0.01, "supervision.preset": "answer"}
    with pytest.raises(ConfigError, match="no supervised token is left in 9 traces"):
        one_step(run_config(changes))
    only_ce = {"teacher.model": teacher, "loss.kd_ratio": 1.0, "supervision.kd": {"prompt": 0.0}}
    with pytest.raises(ConfigError, match="no supervised token"):
        one_step(run_config(only_ce))


def test_a_step_without_supervision_leaves_the_weights(tmp_path):
    changes = {"truncation.lead_fraction": 0.35, "supervision.preset": "cot", "traces.chain_max_steps": 6}
    changes |= {"training.batch_size": 1, "training.max_steps": 9, "optimizer.weight_decay": 0.1}
    config = run_config({**changes, "truncation.lead_fraction": 0.2})
    train.run(config, tmp_path / "out")
    lines = metrics_of(tmp_path / "out")
    empty = [line for line in lines if line["loss"] == 0]
    assert 0 < len(empty) < len(lines)
    assert all(line["gradient_norm"] == 0 for line in empty)


def test_padded_vocabulary_holds_no_mass(tmp_path):
    narrow, wide = save_model(tmp_path / "49", vocab_size=49), save_model(tmp_path / "64", vocab_size=64)
    state = load_file(tmp_path / "49/model.safetensors")
    rows = torch.nn.functional.pad(state["model.embed_tokens.weight"], (0, 0, 0, 15), value=9.0)
    save_file(state | {"model.embed_tokens.weight": rows}, tmp_path / "64/model.safetensors", {"format": "pt"})
    for changes in ({}, {"loss.kd_ratio": 1.0}):
        teach = {"teacher.model": wide} if changes else {}
        small = one_step(run_config({"student.model": narrow, **teach, **changes}))
        large = one_step(run_config({"student.model": wide, **teach, **changes}))
        assert large.loss == pytest.approx(small.loss, rel=1e-6, abs=1e-7)
        assert torch.allclose(*(s.gradients["model.embed_tokens.weight"] for s in (small, large)), atol=1e-7)


def test_frozen_head_gets_no_gradient(untied, teacher):
    config = run_config({"student.model": untied, "teacher.model": teacher})

    def freeze(model):
        model.lm_head.weight.requires_grad_(False)

    trained, frozen = one_step(config), one_step(config, prepare_student=freeze)
    assert "lm_head.weight" in trained.gradients and "lm_head.weight" not in frozen.gradients
    assert frozen.ledger.flops["head"] * 3 == trained.ledger.flops["head"] * 2
    trained.gradients.pop("lm_head.weight")
    assert_same_gradients(trained, frozen)


def test_lora_trains_adapters_only_and_merges(tmp_path, untied):
    changes = {"student.model": untied, "lora.rank": 2, "optimizer.learning_rate": 0.05, "training.max_steps": 3}
    step = one_step(run_config(changes))
    assert step.gradients and all("lora_" in name for name in step.gradients)
    train.run(run_config(changes), tmp_path / "out")
    before, after = weights_of_directory(untied), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name][: len(after[name])], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert load_model(str(tmp_path / "out")).num_parameters() == load_model(untied).num_parameters()
    ids = torch.arange(12)[None]
    assert not torch.allclose(load_model(str(tmp_path / "out"))(ids).logits, load_model(untied)(ids).logits)


def weights_of_directory(directory):
    return load_file(f"{directory}/model.safetensors")


def test_bf16_is_close_to_float32(tmp_path, teacher):
    losses = {}
    for precision in ("float32", "bf16"):
        train.run(run_config({"teacher.model": teacher, "training.precision": precision}), tmp_path / precision)
        losses[precision] = [line["loss"] for line in metrics_of(tmp_path / precision)]
        assert all(weight.dtype == torch.float32 for weight in weights_of(tmp_path / precision).values())
    assert losses["bf16"] != losses["float32"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=2e-2)


def test_validation_reads_uncut_sequences_whatever_the_cut(tmp_path):
    tokenizer = symbol_tokenizer()
    cut = {"truncation.lead_fraction": 0.3, "supervision.preset": "prompt+cot", "optimizer.learning_rate": 1e-30}
    configs = {"whole": run_config({"optimizer.learning_rate": 1e-30}), "cut": run_config(cut)}
    data = {name: prepare(config, tokenizer) for name, config in configs.items()}
    assert tokens_of(data["cut"].validation) == tokens_of(data["whole"].validation)
    assert sum(map(len, data["cut"].train)) < 0.31 * sum(map(len, data["whole"].train))
    values = {}
    for name, config in configs.items():
        train.run(config, tmp_path / name)
        values[name] = metrics_of(tmp_path / name)[-1]["validation_ce"]
    assert values["cut"] == pytest.approx(values["whole"], rel=1e-6)
    student, _ = load_student(configs["whole"], None)
    total = count = 0.0
    for example in data["whole"].validation:
        ids = torch.from_numpy(example.sample.input_ids.astype("int64"))[None]
        weight = torch.from_numpy((example.sample.segment_ids[1:] > 0).astype("float32"))
        with torch.no_grad():
            logits = student(ids).logits[0, :-1, : vocabulary_size(tokenizer)]
        total += float((torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none") * weight).sum())
        count += float(weight.sum())
    assert values["whole"] == pytest.approx(total / count, rel=1e-5)


def test_run_writes_a_line_a_step_and_learns(tmp_path):
    changes = {"training.max_steps": 30, "training.validate_every_steps": 10, "optimizer.learning_rate": 0.02}
    checkpoint = train.run(run_config(changes), tmp_path / "out")
    lines = metrics_of(tmp_path / "out")
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert [line["step"] for line in lines if "validation_ce" in line] == [10, 20, 30]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["validation_ce"] < lines[9]["validation_ce"]
    manifest = checkpoint.manifest
    assert manifest["metrics"] == {"loss": lines[-1]["loss"], "validation_ce": lines[-1]["validation_ce"]}
    assert not list((tmp_path / "out").glob("state*"))
    assert load_tokenizer(str(tmp_path / "out")).get_vocab() == symbol_tokenizer().get_vocab()


def test_ledger_counts_are_exact(tmp_path):
    config = run_config({"training.max_steps": 6, "truncation.lead_fraction": 0.6, "training.microbatch_tokens": 64})
    ledger = train.run(config, tmp_path / "out").manifest["ledger"]
    examples = prepare(config, symbol_tokenizer()).train
    assert ledger["steps"] == 6 and ledger["sequences"] == 18
    assert ledger["tokens"] == 2 * sum(map(len, examples)) == metrics_of(tmp_path / "out")[-1]["tokens"]
    assert ledger["supervised_tokens"] == 2 * sum(int((example.ce_weight > 0).sum()) for example in examples)
    assert ledger["flops"]["teacher"] == 0 < ledger["flops"]["head"] < ledger["flops"]["student"]
    assert ledger["flops"]["total"] == sum(ledger["flops"][part] for part in ("teacher", "student", "head"))
    assert ledger["train_seconds"] == pytest.approx(
        sum(value for name, value in ledger["seconds"].items() if name not in ("validation", "saving")), abs=1e-4
    )


FLOP_CASES = {
    "tied": {},
    "padded": {"training.layout": "padded"},
    "untied, grouped queries": {"student.model": "UNTIED"},
    "untied, padded": {"student.model": "UNTIED", "training.layout": "padded"},
    "head size of its own": {"student.model": "QWEN"},
    "teacher": {"teacher.model": "TEACHER"},
    "adapters": {"lora.rank": 4},
    "adapters on some": {"lora.rank": 4, "lora.target_modules": ".*(q_proj|v_proj)"},
    "checkpointing": {"training.gradient_checkpointing": True},
    "checkpointing adapters": {"lora.rank": 4, "training.gradient_checkpointing": True},
    "cut and cot only": {"truncation.lead_fraction": 0.6, "supervision.preset": "cot"},
}


@pytest.mark.parametrize("case", FLOP_CASES)
def test_flops_by_formula_and_by_counter_agree(tmp_path, teacher, untied, case):
    names = {"UNTIED": untied, "TEACHER": teacher}
    if case == "head size of its own":
        names["QWEN"] = save_model(tmp_path, kind="qwen3", kv_heads=1)
    changes = {k: names.get(v, v) if isinstance(v, str) else v for k, v in FLOP_CASES[case].items()}
    step = one_step(run_config(changes), is_counted=True)
    assert sum(step.ledger.flops.values()) == pytest.approx(step.counted_flops, rel=0.02)


def test_audit_of_a_run_agrees(tmp_path, teacher):
    audit = train.run(run_config({"teacher.model": teacher}), tmp_path / "out").manifest["ledger"]["flops_audit"]
    assert audit["formula_flops"] == pytest.approx(audit["counted_flops"], rel=0.02)
    assert audit["formula_flops"] > 0


def test_a_diverging_run_stops_before_it_ruins_the_weights(tmp_path):
    with pytest.raises(LimbeckError, match=r"step \d+: the loss is .* lower optimizer.learning_rate"):
        train.run(run_config({"optimizer.learning_rate": 1e38, "training.max_steps": 20}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_trace_beyond_the_positions_is_refused():
    config = run_config({"student.scratch.max_positions": 40})
    with pytest.raises(ConfigError, match="longer than the student's 40 positions"):
        set_up(config, Ranks(0, 1, CPU))
