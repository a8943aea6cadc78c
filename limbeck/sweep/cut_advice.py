"""`limbeck traces advise`: may the traces be cut, how far, and what does that keep? One look at a pair, no training.

Source, idea and check are our own; docs/truncation.md has the figures.

    OUT/advice.json   OUT/advice.png   OUT/limbeck.json
"""

from __future__ import annotations

from pathlib import Path

from limbeck.checkpoint import Checkpoint, output_directory, write_json, write_manifest
from limbeck.distill.output import inputs_of
from limbeck.progress import say
from limbeck.stage import How
from limbeck.sweep.cut_picture import draw, png
from limbeck.sweep.recommend import advise
from limbeck.sweep.seen import CutAdviceConfig, look_at

ADVICE, PICTURE = "advice.json", "advice.png"


def run(config: CutAdviceConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write the advice, its picture and a manifest into `out`, and say what is recommended.

    Raises: ConfigError for traces that there is nothing to learn of, PairError for models with different tokens.
    """
    with output_directory(out, overwrite=how.overwrite) as working:
        seen = look_at(config)
        advice = advise(seen, config.fractions, config.distill.truncation.unit)
        write_json(working / ADVICE, advice)
        (working / PICTURE).write_bytes(png(draw(advice)))
        write_manifest(
            working,
            stage="traces advise",
            config=config,
            inputs=inputs_of(config.distill),
            metrics=advice["recommendation"] | {"seconds": seen.seconds, "of_an_epoch": advice["cost"]["of_an_epoch"]},
        )
    for line in (advice["sentence"], *advice["reasons"], *advice["warnings"], *advice["not_seen"]):
        say(line)
    return Checkpoint(out)
