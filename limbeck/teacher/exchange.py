"""The stages `limbeck teacher export` and `limbeck teacher import`: caches that other trainers read, and theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from limbeck.checkpoint import Checkpoint, hash_path, output_directory, write_json, write_manifest
from limbeck.config import checked
from limbeck.errors import ConfigError, DataError
from limbeck.models.load import load_tokenizer, model_hash, vocabulary_size
from limbeck.progress import bar, say
from limbeck.stage import How
from limbeck.teacher.build import SHARD_POSITIONS, cut_shards
from limbeck.teacher.cache import SPEC, CacheConfig, Spec, TeacherCache, seal
from limbeck.teacher.codec import MOST_ENTRIES, TAIL_LEVELS, decode, encode
from limbeck.teacher.columns import READERS, WRITERS, Format, Sequence, entries_of
from limbeck.teacher.shard import Stored, write_shard

_GROUP_ROWS = 256
"""Sequences written at a time."""


@checked
class ExportCacheConfig:
    """A finished teacher cache of mode top_k or sampled, and whose columns are wanted."""

    cache: Path
    """Its directory."""
    format: Format
    """parquet: what the cache holds | distillkit, axolotl: columns that their trainers read."""
    top_k: int = MOST_ENTRIES
    """Most entries of a row; the tables of distillkit and axolotl are as wide as the widest."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MOST_ENTRIES:
            raise ConfigError(f"top_k must be in 1 to {MOST_ENTRIES}; found {self.top_k}")


@checked
class ImportCacheConfig:
    """Columns of top-k targets, and the teacher whose they are."""

    source: Path
    """Parquet file, or a directory of them, with the columns of parquet, distillkit (raw top-k) or axolotl."""
    teacher: str
    """Directory, alias or hub id of the teacher; its tokenizer gives the vocabulary."""


def export_cache(config: ExportCacheConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `targets.parquet` and a manifest into `out`.

    Raises: ConfigError for a cache of whole distributions; CheckpointError for a damaged one.
    """
    cache = TeacherCache(config.cache)
    mode = cache.spec.config.mode
    if mode not in ("top_k", "sampled"):
        raise ConfigError(f"{config.cache}: of mode {mode}, which has no entries; export needs top_k or sampled.")
    width = max((int(sequence.counts.max(initial=0)) for sequence in _read_cache(cache, config.top_k)), default=0)
    total, positions = sum(len(shard) for shard in cache.shards), 0
    with output_directory(out, overwrite=how.overwrite) as working:
        group: list[dict[str, Any]] = []
        writer = None
        with bar("teacher export, sequences", total) as progress:
            for sequence in _read_cache(cache, config.top_k):
                group.append(WRITERS[config.format](sequence, width))
                positions += len(sequence.positions)
                if len(group) == _GROUP_ROWS:
                    writer = _write(working / "targets.parquet", group, writer)
                progress.advance(1)
            writer = _write(working / "targets.parquet", group, writer)
        writer.close()
        write_manifest(
            working,
            stage="teacher export",
            config=config,
            inputs={"cache": cache.spec.identity},
            metrics={"sequences": total, "positions": positions, "entries_of_widest_row": width},
        )
    return Checkpoint(out)


def _read_cache(cache: TeacherCache, top_k: int) -> Iterator[Sequence]:
    spec = cache.spec
    draws = spec.config.num_samples if spec.config.mode == "sampled" else None
    for shard in cache.shards:
        for number in range(len(shard)):
            stored = shard.sequence(number)
            entries = decode(shard.record(number), int(stored.positions.sum()), spec.vocab_size)
            # Rows that are all tail tell nothing (`translated.unknown`).
            told = np.flatnonzero(entries.levels[np.cumsum(entries.counts) - entries.counts] > 0)
            entries = entries.select(told)
            targets = entries.targets(draws)
            log_probs = targets.log_probs.numpy()
            yield Sequence(
                stored.ids,
                np.flatnonzero(stored.positions)[told],
                entries.counts,
                entries.ids.astype(np.int32),
                log_probs[np.arange(log_probs.shape[1]) < entries.counts[:, None]],
                targets.log_tail.numpy(),
            ).kept(top_k)


def _write(path: Path, group: list[dict[str, Any]], writer: Any) -> Any:
    """Append the rows to the file, and empty the list."""
    names = list(group[0]) if group else []
    table = pa.table({name: pa.array([row[name] for row in group]) for name in names})
    if writer is None:
        writer = pq.ParquetWriter(path, table.schema)
    if group:
        writer.write_table(table.cast(writer.schema))
    group.clear()
    return writer


def import_cache(config: ImportCacheConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write a teacher cache of what the columns hold into `out`.

    Raises: DataError for columns of none of the formats, and ids outside the vocabulary.
    """
    vocab = vocabulary_size(load_tokenizer(config.teacher))
    found: dict[bytes, Sequence] = {}
    rows = 0
    for sequence in _read_columns(config.source, vocab):
        rows += 1
        # The order of a shard is that of the ids as big-endian integers.
        found.setdefault(sequence.ids.astype(">u4").tobytes(), sequence)
    if not found:
        raise DataError(f"{config.source}: no rows with targets; nothing to import.")
    if rows > len(found):
        say(f"note: {rows - len(found)} of {rows} rows repeat the tokens of another one; the first of each is kept.")
    sequences = [found[key] for key in sorted(found)]
    widest = max(int(sequence.counts.max(initial=1)) for sequence in sequences)
    kept = CacheConfig(top_k=min(widest, MOST_ENTRIES), min_probability=0.0)
    spec = Spec(config.teacher, model_hash(config.teacher), vocab, 0, "float32", kept)
    with output_directory(out, overwrite=how.overwrite) as working:
        write_json(working / SPEC, spec.as_dict())
        _write_shards(working, spec, sequences)
        write_manifest(
            working,
            stage="teacher import",
            config=config,
            inputs={"source": hash_path(config.source), "teacher": spec.teacher_hash},
            metrics={"sequences": len(sequences), "positions": sum(len(one.positions) for one in sequences)},
        )
        seal(working)
    return Checkpoint(out)


def _read_columns(source: Path, vocab: int) -> Iterator[Sequence]:
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source}: no .parquet files in it.")
    for file in files:
        try:
            opened = pq.ParquetFile(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file}: no Parquet file ({error}).") from error
        names = set(opened.schema_arrow.names)
        read = next((read for needed, read in READERS.values() if names.issuperset(needed)), None)
        if read is None:
            known = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in READERS.items())
            raise DataError(f"{file}: has the columns {', '.join(sorted(names))}; expected those of {known}.")
        for batch in opened.iter_batches(_GROUP_ROWS):
            for number, row in enumerate(batch.to_pylist()):
                sequence = read(row)
                ids = np.concatenate([sequence.ids, sequence.entry_ids])
                if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
                    raise DataError(f"{file}: row {number} has token ids outside the vocabulary of {vocab}.")
                if len(sequence.positions):
                    yield sequence


def _write_shards(out: Path, spec: Spec, sequences: list[Sequence]) -> None:
    by_ids = {id(sequence.ids): sequence for sequence in sequences}
    stored = []
    for sequence in sequences:
        mask = np.zeros(len(sequence.ids), bool)
        mask[sequence.positions] = True
        stored.append(Stored(sequence.ids, mask))
    for number, members in enumerate(cut_shards(stored, SHARD_POSITIONS)):
        entries = [entries_of(by_ids[id(member.ids)]) for member in members]
        sample = {
            "rows": sum(len(one.counts) for one in entries),
            "entries": float(sum(one.counts.sum() for one in entries)),
            "mass": float(sum((1 - np.square(one.tails / TAIL_LEVELS)).sum() for one in entries)),
            "kl": None,
        }
        facts = {"sample": sample, "spec": spec.identity, "flops": 0}
        records = [encode(one, spec.vocab_size) for one in entries]
        write_shard(out / f"shard-imported-{number:05d}.bin", members, records, spec.vocab_size, facts)
