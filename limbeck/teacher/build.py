"""Write a teacher cache: plan its shards, score what is missing, report how true it is.

1. Sequences that begin another one are left to it; the rest are sorted and cut into shards. That plan, and a hash of it
   in the shards' names, depend on nothing but the sequences asked for and the spec.
2. Shards of other plans stay as they are, and what they hold is not scored again: further traces may be added.
3. A shard of this plan that is there and whole stays; one that is missing or damaged is scored and written.
4. Each shard holds, for a sample of its rows, the KL from the full teacher to what was written.

Killed at any moment, the same call goes on and ends with the same files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limbeck.checkpoint import Checkpoint, write_json, write_manifest
from limbeck.errors import CheckpointError, ConfigError, PairError
from limbeck.ledger import Ledger
from limbeck.models.anatomy import head_of
from limbeck.models.load import load_model, load_tokenizer, model_hash, vocabulary_size
from limbeck.models.placement import here
from limbeck.progress import bar
from limbeck.runner.place import Prepared
from limbeck.stage import Place
from limbeck.teacher.cache import CHECKSUMS, SPEC, CacheConfig, Spec, TeacherCache, check_sums, open_shards, seal
from limbeck.teacher.projected import head_hash
from limbeck.teacher.reading import Reading, Translation
from limbeck.teacher.score import score_shard, student_head
from limbeck.teacher.shard import PARTIAL, Shard, Stored
from limbeck.teacher.translated import score_translated
from limbeck.teacher.vocabulary_map import KINDS, VocabularyMap

SHARD_POSITIONS = 16_384
"""Positions in a shard: what a kill costs at most."""


def write_cache(
    teacher: str,
    config: CacheConfig,
    sequences: Sequence[Stored],
    out: Path,
    stage_config: Any,
    on: Place = "local",
    translation: Translation | None = None,
) -> dict[str, Any]:
    """Load the teacher, bring `out` to hold targets of all `sequences`, and finish it with manifest and checksums.

    Args:
      teacher: directory, alias or hub id.
      stage_config: what goes into the manifest as the config.
      on: where the teacher is loaded and the shards are scored.
      translation: what the teacher reads in place of the sequences, where they are of another tokenizer.
    Returns: the manifest's metrics: fidelity, bytes, cost, shards written and kept.
    Raises: ConfigError for another tokenizer without a translation, and what `fill_cache` raises.
    """
    if config.tokenizer and translation is None:
        raise ConfigError("cache.tokenizer: only `limbeck teacher cache` writes targets for another tokenizer.")
    scorer = Prepared(partial(load_model, teacher, layout="packed"), on)
    [(_, spec)] = scorer.map(partial(_spec, teacher, translation), [config])
    ledger = Ledger(here().device)
    positions = sum(int(root.positions.sum()) for root in share_prefixes(sequences))
    with bar("teacher cache, positions", positions) as progress:
        counts = fill_cache(
            scorer, spec, sequences, out, ledger=ledger, advance=progress.advance, translation=translation
        )
    if counts["shards_written"] == 0 and _is_sealed(out):
        return Checkpoint(out).manifest["metrics"]
    cost = ledger.as_dict()
    metrics = fidelity(open_shards(out, spec)) | counts | {"seconds": cost["train_seconds"]}
    write_manifest(
        out,
        stage="teacher cache",
        config=stage_config,
        inputs={"teacher": spec.teacher_hash},
        ledger=cost,
        metrics=metrics | {"tokens_asked": sum(len(s.ids) for s in sequences)},
    )
    seal(out)
    return Checkpoint(out).manifest["metrics"]


def stats(directory: Path) -> dict[str, Any]:
    """What a finished cache holds and costs: all files on disk over the positions stored."""
    cache = TeacherCache(directory)
    found = fidelity(cache.shards)
    size = sum(path.stat().st_size for path in directory.iterdir())
    config = {"teacher": cache.spec.teacher, "teacher_hash": cache.spec.teacher_hash, "mode": cache.spec.config.mode}
    return config | found | {"shards": len(cache.shards), "bytes": size, "bytes_per_token": size / found["positions"]}


def verify(directory: Path) -> dict[str, Any]:
    """Read every byte of a cache and compare all checksums; returns how much was read.

    Raises: CheckpointError that names the damaged files.
    """
    TeacherCache(directory).verify()
    return {"verified": str(directory), **{name: stats(directory)[name] for name in ("shards", "positions", "bytes")}}


def _spec(name: str, translation: Translation | None, model: Any, config: CacheConfig) -> Spec:
    return spec_of(model, name, model_hash(name), vocabulary_size(load_tokenizer(name)), config, translation)


def spec_of(
    model: Any,
    name: str,
    identity: str,
    vocab_size: int,
    config: CacheConfig,
    translation: Translation | None = None,
) -> Spec:
    """The spec of a cache of `model`, which was loaded as `name` and has the hash `identity`."""
    weight = head_of(model).weight
    dtype = str(weight.dtype).removeprefix("torch.")
    if translation is not None:
        if vocab_size > len(weight):
            raise PairError(f"teacher {name}: the tokenizer has {vocab_size} tokens, the model only {len(weight)}.")
        student = len(translation.vocabularies.student.table)
        return Spec(
            name,
            identity,
            student,
            weight.shape[1],
            dtype,
            config,
            tokenizer=translation.tokenizer,
            read_as=translation.read_as,
            vocab_read=vocab_size,
        )
    vocab_size = min(vocab_size, len(weight))
    if config.mode != "projected":
        return Spec(name, identity, vocab_size, weight.shape[1], dtype, config)
    head = student_head(config.student, vocab_size, weight.device)
    if len(head.weight) != vocab_size:
        raise PairError(
            f"cache.student {config.student}: its head has {len(head.weight)} rows, the teacher's vocabulary "
            f"{vocab_size}; both need one tokenizer."
        )
    return Spec(name, identity, vocab_size, head.weight.shape[1], dtype, config, head_hash(head))


def build_cache(
    model: Any,
    spec: Spec,
    sequences: Sequence[Stored],
    out: Path,
    *,
    shard_positions: int = SHARD_POSITIONS,
    ledger: Ledger | None = None,
) -> dict[str, Any]:
    """`fill_cache` with a `model` that is there, the teacher of `spec`, loaded with the packed attention."""
    return fill_cache(Prepared(lambda: model), spec, sequences, out, shard_positions=shard_positions, ledger=ledger)


class _Job(NamedTuple):
    """A shard to score."""

    path: Path
    members: Sequence[Stored]
    readings: Sequence[Reading] | None

    @property
    def positions(self) -> int:
        return sum(int(member.positions.sum()) for member in self.members)


def fill_cache(
    scorer: Prepared[Any],
    spec: Spec,
    sequences: Sequence[Stored],
    out: Path,
    *,
    shard_positions: int = SHARD_POSITIONS,
    ledger: Ledger | None = None,
    advance: Callable[[int], None] = lambda _: None,
    translation: Translation | None = None,
) -> dict[str, Any]:
    """Bring the directory `out` to hold targets of all `sequences`; `cache.seal` finishes it.

    Args:
      scorer: where the teacher of `spec` is loaded, with the packed attention, and scores.
      sequences: token ids and positions; duplicates and beginnings of others cost nothing.
      advance: called with the number of positions done.
      translation: as for `write_cache`.
    Returns: counts (shards written and kept, positions scored).
    Raises: PairError when `out` is the cache of another teacher or form; CheckpointError when a shard of another plan
      is damaged.
    """
    ledger = ledger or Ledger()
    _claim(out, spec)
    plan, shards = plan_shards(sequences, spec, out, shard_positions)
    jobs = [
        _Job(out / f"shard-{plan}-{number:05d}.bin", members, None if translation is None else translation.of(members))
        for number, members in enumerate(shards)
    ]
    missing = [job for job in jobs if not _is_whole(job.path, spec)]
    advance(sum(job.positions for job in jobs) - sum(job.positions for job in missing))
    if missing:
        (out / CHECKSUMS).unlink(missing_ok=True)
    vocabularies = None if translation is None else translation.vocabularies
    for job, cost in scorer.map(partial(_score, spec, vocabularies), missing):
        ledger.restore(cost)
        advance(job.positions)
    return {
        "shards_written": len(missing),
        "shards_kept": len(jobs) - len(missing),
        "positions_scored": sum(job.positions for job in missing),
    }


def _score(spec: Spec, vocabularies: VocabularyMap | None, model: Any, job: _Job) -> dict[str, Any]:
    """Write one shard; its cost."""
    ledger = Ledger(head_of(model).weight.device)
    if vocabularies is None or job.readings is None:
        score_shard(model, spec, job.members, job.path, ledger)
    else:
        score_translated(model, spec, vocabularies, job.members, job.readings, job.path, ledger)
    return ledger.as_dict()


def plan_shards(
    sequences: Sequence[Stored], spec: Spec, out: Path, shard_positions: int = SHARD_POSITIONS
) -> tuple[str, list[list[Stored]]]:
    """A name of the plan, and the members of each of its shards that no shard of another plan holds."""
    roots = share_prefixes(sequences)
    digest = hashlib.sha256(spec.identity.encode())
    for root in roots:
        digest.update(len(root.ids).to_bytes(8) + root.ids.astype(">u4").tobytes() + root.positions.tobytes())
        if root.given is not None:
            digest.update(root.given.tobytes())
    plan = digest.hexdigest()[:12]
    held = open_shards(out, spec, lambda path: not path.name.startswith(f"shard-{plan}-"))
    for shard in held:
        shard.verify()
    return plan, cut_shards([root for root in roots if not _is_held(root, held)], shard_positions)


def cut_shards(roots: Sequence[Stored], shard_positions: int = SHARD_POSITIONS) -> list[list[Stored]]:
    """Shards of at least so many positions, but for the last, in the order given; sequences without any go nowhere."""
    shards: list[list[Stored]] = [[]]
    filled = 0
    for root in roots:
        if not root.positions.any():
            continue
        if filled >= shard_positions:
            shards.append([])
            filled = 0
        shards[-1].append(root)
        filled += int(root.positions.sum())
    return [members for members in shards if members]


def share_prefixes(sequences: Sequence[Stored]) -> list[Stored]:
    """The sequences that begin no other one, sorted by their tokens; each has the positions of those that begin it.

    Raises: PairError where one text would be stored twice, with a teacher that was given different prompts.
    """
    merged: dict[bytes, np.ndarray] = {}
    given: dict[bytes, tuple[np.ndarray | None, int]] = {}
    for ids, positions, prompt, replaced in sequences:
        key = ids.astype(">u4").tobytes()
        _check_given(given.setdefault(key, (prompt, replaced))[0], prompt)
        merged[key] = merged[key] | positions if key in merged else positions.copy()
    roots: list[Stored] = []
    keys = sorted(merged)
    for number, key in enumerate(keys):
        follower = keys[number + 1] if number + 1 < len(keys) else b""
        if follower.startswith(key):
            _check_given(given[key][0], given[follower][0])
            merged[follower][: len(merged[key])] |= merged[key]
        else:
            roots.append(Stored(np.frombuffer(key, ">u4").astype(np.int32), merged[key], *given[key]))
    return roots


def _check_given(one: np.ndarray | None, other: np.ndarray | None) -> None:
    if one is not other and (one is None or other is None or not np.array_equal(one, other)):
        raise PairError("a text is to be stored for two different privileged prompts; use one trace a prompt.")


def fidelity(shards: Sequence[Shard]) -> dict[str, Any]:
    """How true a cache is and what it costs, over all its shards: means over the sampled rows, bytes over positions."""
    totals = {name: sum(shard.header[name] for shard in shards) for name in ("sequences", "tokens", "positions")}
    totals |= {name: sum(shard.header["sample"][name] for shard in shards) for name in ("rows", "entries", "mass")}
    divergences = [shard.header["sample"]["kl"] for shard in shards]
    errors, sizes = ([shard.header["sample"].get(name) for shard in shards] for name in ("squared_error", "squared"))
    rows, size = max(1, totals["rows"]), sum(shard.path.stat().st_size for shard in shards)
    return {
        "sequences": totals["sequences"],
        "tokens": totals["tokens"],
        "positions": totals["positions"],
        "bytes_per_token": size / max(1, totals["positions"]),
        "flops": sum(shard.header["flops"] for shard in shards),
        "sampled_rows": totals["rows"],
        "kl_to_full_teacher_nats": None if None in divergences else sum(divergences) / rows,
        **({} if None in errors or not shards else {"rounding_error": math.sqrt(sum(errors) / (sum(sizes) or 1.0))}),
        "mass_kept": totals["mass"] / rows,
        "entries_per_position": totals["entries"] / rows,
        **_translation_of([shard.header["translation"] for shard in shards if "translation" in shard.header], totals),
    }


def _translation_of(found: Sequence[dict[str, Any]], totals: dict[str, Any]) -> dict[str, Any]:
    """How true the targets for another tokenizer are: shares of the positions, and of the mass where there are any."""
    if not found:
        return {}
    sums = {name: sum(one[name] for one in found) for name in ("with_target", "same_start", "over_several", *KINDS)}
    known = max(1, sums["with_target"])
    mass = {f"mass_{kind}": sums[kind] / known for kind in KINDS}
    return {
        "vocabulary_matched": found[0]["vocabulary_matched"],
        "positions_with_target": sums["with_target"] / max(1, totals["positions"]),
        "positions_same_start": sums["same_start"] / known,
        "positions_over_several": sums["over_several"] / known,
        **mass,
        "mass_open": 1 - sum(mass.values()),
    }


def _claim(out: Path, spec: Spec) -> None:
    """Make `out` the directory of `spec`, or refuse one that is another's."""
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob("*" + PARTIAL):
        leftover.unlink()
    if not (out / SPEC).exists():
        if any(out.iterdir()):
            raise CheckpointError(f"{out}: not empty, and no teacher cache; choose another directory.")
        write_json(out / SPEC, spec.as_dict())
    try:
        found = Spec.read(out)
    except CheckpointError:
        # Damaged: written anew. Shards that are another teacher's are refused by their own headers.
        write_json(out / SPEC, spec.as_dict())
        return
    if found.identity != spec.identity:
        theirs, ours = found.as_dict(), spec.as_dict()
        names = [name for name in theirs | ours if ours.get(name) != theirs.get(name)]
        what = ", ".join(f"{name} {theirs.get(name)} there and {ours.get(name)} here" for name in names)
        raise PairError(f"{out}: holds another cache ({what}); choose another directory.")


def _is_sealed(out: Path) -> bool:
    try:
        check_sums(out, lambda name: True)
    except CheckpointError:
        return False
    return True


def _is_whole(path: Path, spec: Spec) -> bool:
    try:
        shard = Shard(path, spec.vocab_size)
        shard.verify()
    except CheckpointError:
        return False
    return shard.header["spec"] == spec.identity


def _is_held(root: Stored, shards: Sequence[Shard]) -> bool:
    return any(
        not (root.positions & ~shard.sequence(number).positions[: len(root.ids)]).any()
        for shard in shards
        for number in shard.find(root.ids)
    )
