"""Prune and train in turns, so that a smaller model learns again what pruning broke, whatever it is trained on.

    model -> round 1: prune to 1/n of the target, train 1/n of the whole -> ... -> round n: at the target

One round is one-shot pruning; more are gradual. Sizes are computed from the unpruned model, so that every number of
rounds ends at the same one. Each round's training has its own schedule, its own order of the data, and the pruned
model's zeros held where single weights were pruned.

    OUT/round-1/pruned/   OUT/round-1/recovered/   OUT/round-1/round.json   OUT/round-2/ ...   OUT/ the recovered model

The last round's model is OUT itself; its own directory keeps the manifest and the metrics.

Source: 2502.14305, section on pruning with distillation: cutting in stages won back more than a single cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from limbeck.checkpoint import MANIFEST, STATE_PREFIX, Checkpoint, output_directory, write_manifest
from limbeck.compress.masks import MASK_FILE
from limbeck.compress.prune import stage as prune
from limbeck.compress.prune.stage import SOLVERS, PruneConfig
from limbeck.compress.rounds import Round, claim, once, round_patterns
from limbeck.compress.weights import INDEX, ShardWriter
from limbeck.distill.config import StudentConfig
from limbeck.distill.parallel import join
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger
from limbeck.progress import console
from limbeck.stage import How

RECORD, UNPRUNED = "round.json", "unpruned.json"
_STAYS = (MANIFEST, "metrics.jsonl")
"""What the last round's directory keeps when its model becomes the output."""
_SIZES = ("parameters", "neurons", "kv_groups", "sparsity")


class Recovery(Protocol):
    """A model that is pruned and trained back: how it is trained, and what is measured of it."""

    @property
    def stage(self) -> str:
        """Name of the command."""
        ...

    @property
    def trainer(self) -> str:
        """Name of the command that trains."""
        ...

    @property
    def config(self) -> Any:
        """The command's config; its `prune` says what is cut in all."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What an interrupted run must have in common with the one that goes on with it, beside the model."""
        ...

    def turns(self, working: Path) -> list[Round]:
        """All rounds; what they need beside the recipe is written to the directory `working`."""
        ...

    def train(self, turn: Round, student: StudentConfig, out: Path) -> None:
        """Train a pruned model, or go on with it."""
        ...

    def measure(self, model: str) -> dict[str, Any]:
        """What held-out data say of a model."""
        ...

    def inputs(self) -> dict[str, str]:
        """What the whole run reads, by role, as hashes."""
        ...

    def summary(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of the recovered model, as the manifest has them."""
        ...

    def line(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
        """What is said of a round on the console: measured before and after its training; None for nothing."""
        ...


def check_turns(prune: PruneConfig, rounds: int, student: str | None, has_adapters: bool, group: str) -> None:
    """Refuse what cannot be recovered.

    Args:
      student: the model that is trained.
      group: of the recipe, that says how.
    Raises: ConfigError.
    """
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1; found {rounds}")
    if student != prune.model:
        raise ConfigError(f"{group}.student: recovery trains prune.model ({prune.model}); leave the student out")
    if prune.moments is not None and rounds > 1:
        raise ConfigError("prune.moments are those of the unpruned model; with more than one round, leave them out")
    if is_sparse(prune):
        round_patterns(prune.pattern, rounds)
        if has_adapters:
            raise ConfigError(f"{group}.lora: merging adapters fills the zeros of a sparse model; leave it out")


def is_sparse(prune: PruneConfig) -> bool:
    """Whether single weights are pruned, whose zeros are then held."""
    return prune.method in SOLVERS


def recover(task: Recovery, out: Path, how: How) -> Checkpoint:
    """Do all rounds and write the recovered model.

    Args:
      task: what is cut and how it is trained.
      out: directory to write; work happens in `<out>.partial`.
      how: resume goes on with an interrupted run of the same config: finished rounds stay, the one under way goes on.
    Raises: ConfigError when a round would remove nothing, and what pruning and training raise.
    """
    if join().world_size > 1:
        raise ConfigError(
            f"limbeck {task.stage} runs in one process; on several, call limbeck prune and limbeck {task.trainer} in "
            "turn."
        )
    model = task.config.prune.model
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as working:
        state = working / f"{STATE_PREFIX}{task.stage.replace(' ', '-')}.json"
        claim(state, task.identity, model)
        turns = task.turns(working)
        unpruned, records = once(working / UNPRUNED, partial(task.measure, model)), []
        for number, turn in enumerate(turns, start=1):
            directory = working / f"round-{number}"
            turn = turn._replace(prune=replace(turn.prune, model=model))
            records.append(once(directory / RECORD, partial(_round, task, turn, directory)))
            _say(task, number, records[-1])
            model = str(directory / "recovered")
        _finish(task, working, unpruned, records)
        (working / UNPRUNED).unlink()
        state.unlink()
    return Checkpoint(out)


def _round(task: Recovery, turn: Round, directory: Path) -> dict[str, Any]:
    """Prune, train, and compare on held-out data; what is finished already is not done again."""
    pruned, recovered = directory / "pruned", directory / "recovered"
    if not Checkpoint(pruned).is_finished:
        prune.run(turn.prune, pruned, how=How(resume=True))
    if not Checkpoint(recovered).is_finished:
        student = StudentConfig(model=str(pruned), keep_zeros=is_sparse(turn.prune))
        task.train(turn, student, recovered)
    cut, trained = Checkpoint(pruned).manifest, Checkpoint(recovered).manifest
    return {
        **{name: cut["metrics"][name] for name in _SIZES if name in cut["metrics"]},
        "pruned": task.measure(str(pruned)),
        "recovered": task.measure(str(recovered)),
        "tokens": trained["ledger"]["tokens"],
        "flops": trained["ledger"]["flops"]["total"],
        "prune_seconds": sum(cut["ledger"]["seconds"].values()),
        "train_seconds": trained["ledger"]["train_seconds"],
        "kept_step": trained["metrics"].get("kept_step"),
        "steps": trained["ledger"]["steps"],
    }


def _finish(task: Recovery, working: Path, unpruned: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Move the last round's model to the top, its mask beside it, and write the manifest."""
    ledger = Ledger()
    for number in range(1, len(records) + 1):
        for part in ("pruned", "recovered"):
            ledger.restore(Checkpoint(working / f"round-{number}" / part).manifest["ledger"])
    last = working / f"round-{len(records)}"
    for file in sorted((last / "recovered").iterdir()):
        if file.name not in _STAYS:
            file.replace(working / file.name)
    if is_sparse(task.config.prune):
        _add_mask(working, last / "pruned" / MASK_FILE)
    write_manifest(
        working,
        stage=task.stage,
        config=task.config,
        inputs=task.inputs(),
        ledger=ledger.as_dict(),
        metrics={
            "parameters": records[-1]["parameters"],
            **task.summary(records[-1]["recovered"]),
            "unpruned": unpruned,
            "rounds": records,
        },
    )


def _add_mask(directory: Path, mask: Path) -> None:
    """The mask, and an index: without one vLLM takes every safetensors file for weights."""
    if not (directory / INDEX).exists():
        writer = ShardWriter(directory, 1)
        if (directory / "model.safetensors").exists():
            (directory / "model.safetensors").replace(writer.path(0))
        writer.finish()
    (directory / MASK_FILE).write_bytes(mask.read_bytes())


def _say(task: Recovery, number: int, record: Mapping[str, Any]) -> None:
    line = task.line(record["pruned"], record["recovered"])
    if line is not None:
        console.print(f"round {number}: {record['parameters']:,} parameters; {line}", highlight=False)
