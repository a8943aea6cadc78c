"""The stages of compression as commands."""

from __future__ import annotations

from limbeck.compress import moments, recover
from limbeck.compress.export import stage as export
from limbeck.compress.predict import predict_prune, predict_quantize, predict_recover
from limbeck.compress.prune import stage as prune
from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.quantize import stage as quantize
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.compress.recover import RecoverConfig
from limbeck.compress.stage import inputs_of
from limbeck.distill import train
from limbeck.stage import Stage

_RESUMES = ("overwrite", "resume")
_OF_BOTH = (
    "calibration.text",
    "calibration.traces.source",
    "calibration.sequences",
    "calibration.sequence_length_tokens",
    "moments",
    "dense_targets",
    "gate.sequences",
    "gate.max_kl_nats",
    "ignore",
)
"""What people change of pruning and quantisation alike."""

PRUNE = Stage(
    name="prune",
    config=PruneConfig,
    run=prune.run,
    takes=_RESUMES,
    inputs=inputs_of,
    predict=predict_prune,
    subject="model",
    first=(
        "model",
        "method",
        "drop_layers",
        "neuron_sparsity",
        "kv_group_sparsity",
        "budget.metric",
        "budget.target",
        "multiple_of",
        "pattern",
        *_OF_BOTH,
    ),
)
QUANTIZE = Stage(
    name="quantize",
    config=QuantizeConfig,
    run=quantize.run,
    takes=_RESUMES,
    inputs=inputs_of,
    predict=predict_quantize,
    subject="model",
    first=(
        "model",
        "scheme",
        "group_size",
        "method",
        "equalization",
        "mixed.bits_per_weight",
        "pattern",
        *_OF_BOTH,
    ),
)


def _read_by_recovery(config: RecoverConfig) -> dict[str, str]:
    return train.inputs_of(config.distill)


RECOVER = Stage(
    name="recover",
    config=RecoverConfig,
    run=recover.run,
    takes=_RESUMES,
    inputs=_read_by_recovery,
    predict=predict_recover,
    subject="prune",
    refers={"prune": "prune", "distill": "distill"},
)
MOMENTS = Stage(
    name="moments",
    config=moments.MomentsConfig,
    run=moments.run,
    takes=_RESUMES,
    subject="model",
    first=("model", "calibration.traces.source", "calibration.traces.num_traces", "calibration.sequences"),
)
EXPORT = Stage(
    name="export",
    loads=False,
    config=export.ExportConfig,
    run=export.run,
    subject="model",
    first=(
        "model",
        "format",
        "certify",
        "probe.text",
        "probe.sequences",
    ),
)
