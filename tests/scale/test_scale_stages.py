"""Predictions of the stages beside distillation, against what the stages write."""

import pytest
from test_scale_training import HERE

from limbeck.checkpoint import Checkpoint
from limbeck.compress import recover
from limbeck.compress.predict import predict_prune, predict_quantize, predict_recover, pruned_shape
from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.prune.stage import run as prune
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.compress.recover import RecoverConfig
from limbeck.config import build
from limbeck.cost.shapes import config_of, frozen_sizes
from limbeck.distill import caching
from limbeck.distill.caching import CacheStageConfig
from limbeck.distill.caching_cost import predict_cache
from limbeck.evaluate.cost import predict_evaluate
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.ledger import FLOP_PARTS, decoding_flops
from limbeck.models.load import load_tokenizer, vocabulary_size
from limbeck.traces.generation import GenerateConfig
from limbeck.traces.generation_cost import predict_generate

TRACES = {"source": "builtin:chain", "num_traces": 30, "chain_min_steps": 1, "chain_max_steps": 3}
CALIBRATION = {"sequences": 4, "sequence_length_tokens": 64}


@pytest.mark.parametrize("mode", ["top_k", "hidden"])
def test_a_cache_costs_what_its_ledger_says(tmp_path, mode):
    config = build(CacheStageConfig, {"teacher": "tiny-teacher", "traces": TRACES, "cache": {"mode": mode}})
    predicted = predict_cache(config, hardware=HERE)
    caching.run(config, tmp_path / "cache")
    ledger = Checkpoint(tmp_path / "cache").manifest["ledger"]
    assert predicted.flops == {name: ledger["flops"][name] for name in FLOP_PARTS}
    assert predicted.tokens == ledger["tokens"]


def test_sampling_is_charged_by_the_ledgers_formula():
    config = build(GenerateConfig, {"prompts": TRACES, "model": "tiny-student", "sampling": {"max_new_tokens": 40}})
    found = predict_generate(config, new_tokens=11, hardware=HERE)
    assert found.new_tokens == 30 * 11
    sizes = frozen_sizes(config_of("tiny-student"), vocabulary_size(load_tokenizer("tiny-student")))
    mean = found.tokens / 30
    assert found.flops["sampling"] == pytest.approx(30 * decoding_flops(sizes, round(mean), [11]), rel=0.05)
    longer = predict_generate(config, hardware=HERE)
    assert 11 < longer.new_tokens / 30 <= 40
    served = build(GenerateConfig, {"prompts": TRACES, "server": "http://localhost:1"})
    assert predict_generate(served, hardware=HERE).total_flops == 0


def test_an_evaluation_reads_problems_and_text():
    tree = {"model": "tiny-student", "problems": TRACES, "perplexity": {"traces": TRACES, "window_tokens": 64}}
    both = predict_evaluate(build(EvaluateStageConfig, tree), hardware=HERE)
    assert both.flops["sampling"] > 0 and both.flops["student"] > 0
    alone = predict_evaluate(build(EvaluateStageConfig, {**tree, "perplexity": None}), hardware=HERE)
    assert both.seconds > alone.seconds and both.peak_bytes >= alone.peak_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"neuron_sparsity": 0.5},
        {"neuron_sparsity": 0.25, "kv_group_sparsity": 0.5, "drop_layers": 1},
        {"method": "depth", "drop_layers": 1},
        {"method": "wanda"},
    ],
)
def test_the_shape_after_pruning_is_that_of_the_pruned_model(tmp_path, changes):
    config = build(
        PruneConfig, {"model": "tiny-student", "calibration": CALIBRATION, "gate": {"sequences": 1}, **changes}
    )
    prune(config, tmp_path / "pruned")
    written, predicted = config_of(str(tmp_path / "pruned")), pruned_shape(config_of("tiny-student"), config)
    assert frozen_sizes(written) == frozen_sizes(predicted)


def test_a_budget_is_met_by_the_assumed_shape():
    whole = frozen_sizes(config_of("tiny-teacher")).num_parameters
    config = build(PruneConfig, {"model": "tiny-teacher", "budget": {"target": 0.7 * whole}})
    cut = frozen_sizes(pruned_shape(config_of("tiny-teacher"), config)).num_parameters
    assert 0.6 * whole < cut <= 0.7 * whole


def test_compression_counts_calibration_and_solver():
    tree = {"model": "tiny-student", "calibration": CALIBRATION}
    pruned = predict_prune(build(PruneConfig, tree), hardware=HERE)
    quick = predict_quantize(build(QuantizeConfig, {**tree, "method": "rtn", "group_size": 32}), hardware=HERE)
    slow = predict_quantize(build(QuantizeConfig, {**tree, "group_size": 32}), hardware=HERE)
    assert slow.solver_flops > quick.solver_flops
    assert pruned.total_flops == 0 < pruned.solver_flops and pruned.peak_bytes > 0


def test_a_recovery_is_all_its_rounds(tmp_path):
    tree = {
        "prune": {"model": "tiny-student", "neuron_sparsity": 0.5, "calibration": CALIBRATION},
        "distill": {
            "traces": TRACES,
            "num_validation": 4,
            "training": {"batch_size": 4, "epochs": 1},
        },
        "rounds": 2,
    }
    config = build(RecoverConfig, tree)
    predicted = predict_recover(config, hardware=HERE)
    recover.run(config, tmp_path / "recovered")
    ledger = Checkpoint(tmp_path / "recovered").manifest["ledger"]
    assert predicted.flops == {name: ledger["flops"][name] for name in FLOP_PARTS}
    assert predicted.steps == ledger["steps"]
