"""A teacher cache: what a teacher says, on disk, for every run that reads the same tokens.

A causal teacher's word on a token depends only on the tokens before it. So a sequence is looked up by its exact token
ids, and one that begins a stored sequence (a cut at the end) shares its rows. Lead fractions, supervisions, epochs,
seeds and students therefore share one cache. A position that is not stored is an error, never a guess.

    DIR/cache.json       who the teacher is and what is kept of it
    DIR/shard-*.bin      immutable parts (see shard.py)
    DIR/limbeck.json     what made it, its cost and its fidelity
    DIR/checksums.txt    SHA-256 of all the others, in the format of sha256sum; written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.config import checked, config_hash, only
from limbeck.errors import CheckpointError, ConfigError, PairError, nearest
from limbeck.ledger import Ledger
from limbeck.models.anatomy import NOTHING_GIVEN, Given, Head
from limbeck.teacher import projected
from limbeck.teacher.codec import MOST_ENTRIES, Entries, decode
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.projected import Precision, ProjectedTargets
from limbeck.teacher.shard import Shard, damaged
from limbeck.teacher.targets import OneTeacherTargets
from limbeck.teacher.topk import TopKTargets
from limbeck.traces.batch import Batch, Example

SPEC, CHECKSUMS, SHARDS = "cache.json", "checksums.txt", "shard-*.bin"
Mode = Literal["top_k", "sampled", "hidden", "projected"]
MODES = ("top_k", "sampled", "hidden", "projected")
_PROJECTED_FIELDS = ("student", "temperature", "precision")
_TRANSLATED_FIELDS = ("tokenizer", "read_as", "vocab_read")


@checked
class CacheConfig:
    """What is kept of the teacher at a position."""

    mode: Mode = "top_k"
    """top_k: the likeliest entries and the mass of the rest | sampled: draws from the teacher, an unbiased target
    (RS-KD, arXiv 2503.16870) | hidden: the last hidden state, from which any divergence is exact | projected: the
    whole distribution through the head of a student that keeps it, from which forward KL is exact."""
    top_k: int = 128
    """Most entries kept at a position, 1 to 255 (mode top_k)."""
    min_probability: float = 9e-4
    """Entries below this probability go to the tail; the likeliest is always kept (mode top_k)."""
    num_samples: int = 50
    """Draws at a position (mode sampled)."""
    tokenizer: str = only("mode", "top_k", default="")
    """Directory, alias or hub id of a model whose tokenizer the student has, where it is not the teacher's: the teacher
    reads the same texts in its own tokens, and what it says is stored for the student's."""
    student: str = only("mode", "projected", default="")
    """Directory, alias or hub id of the student whose head the targets are for."""
    temperature: float = only("mode", "projected", default=1.0)
    """Softmax temperature of the KD term, > 0."""
    precision: Precision = only("mode", "projected", default="bf16")
    """Of the stored numbers: float32, bf16, or int8 with one scale a position."""
    privileged: str = ""
    """What the teacher is asked instead of the prompt, as "{prompt} A right answer is {reference}.": it may hold
    {prompt}, {reference}, {thought} and {answer}. Empty: what the student is asked."""

    def __post_init__(self) -> None:
        if self.privileged and self.tokenizer:
            raise ConfigError("privileged is for a teacher with the student's tokenizer; leave tokenizer out")
        if self.mode not in MODES:
            raise ConfigError(f"mode: unknown {self.mode!r}; {nearest(str(self.mode), MODES)}")
        if not 1 <= self.top_k <= MOST_ENTRIES:
            raise ConfigError(f"top_k must be in 1 to {MOST_ENTRIES}; found {self.top_k}")
        if not 0 <= self.min_probability < 1:
            raise ConfigError(f"min_probability must be in [0, 1); found {self.min_probability}")
        if not 1 <= self.num_samples <= MOST_ENTRIES:
            raise ConfigError(f"num_samples must be in 1 to {MOST_ENTRIES}; found {self.num_samples}")
        if (self.mode == "projected") != bool(self.student):
            raise ConfigError(f"mode {self.mode}: student {self.student!r}; mode projected, and no other, needs one")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be finite and above 0; found {self.temperature}")


class Spec(NamedTuple):
    """Whose words a cache holds, and in which form; all its shards share it."""

    teacher: str
    """The name under which the teacher was loaded."""
    teacher_hash: str
    """`model_hash` of it."""
    vocab_size: int
    """Entries of the distributions; padding rows of the head are left out."""
    hidden_size: int
    """Of the teacher; of the student in mode projected."""
    dtype: str
    """Of the teacher's hidden states, such as float32."""
    config: CacheConfig
    head: str = ""
    """`head_hash` of the student in mode projected."""
    tokenizer: str = ""
    """`tokenizer_hash` of the student, where it is not the teacher's."""
    read_as: str = ""
    """Then a hash of how the teacher writes what it reads."""
    vocab_read: int = 0
    """Then the tokens of the teacher's vocabulary."""

    @property
    def teacher_vocab(self) -> int:
        """Tokens of the teacher's vocabulary, whose logits are computed."""
        return self.vocab_read or self.vocab_size

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; what some caches alone have is left out elsewhere, as caches of before have it."""
        tree = self._asdict() | {"config": dataclasses.asdict(self.config)}
        if self.config.mode != "projected":
            del tree["head"]
            for name in _PROJECTED_FIELDS:
                del tree["config"][name]
        if not self.tokenizer:
            del tree["config"]["tokenizer"]
            for name in _TRANSLATED_FIELDS:
                del tree[name]
        if not self.config.privileged:
            del tree["config"]["privileged"]
        return tree

    @property
    def identity(self) -> str:
        """A hash of all but the names of the models; every shard has it in its header."""
        tree = self.as_dict() | {"teacher": ""}
        for field, name in ((self.head, "student"), (self.tokenizer, "tokenizer")):
            if field:
                tree["config"][name] = ""
        return config_hash(tree)

    @classmethod
    def read(cls, directory: Path) -> Spec:
        """The spec of a cache.

        Raises: CheckpointError when there is none.
        """
        file = directory / SPEC
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            return cls(**tree | {"config": CacheConfig(**tree["config"])})
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{directory}: no teacher cache (no {SPEC}); write one with `limbeck teacher cache`."
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(damaged(file, "not the description of a cache")) from error


class TeacherCache:
    """Reads targets by sequence. Opening checks all but the records; each of these is checked whenever it is read."""

    in_step = False
    """Every process asks when it likes."""

    def __init__(self, directory: Path, head: Head | None = None) -> None:
        """Open a finished cache; `head` is the teacher's, needed for hidden states only.

        Raises: CheckpointError when it is missing, unfinished or damaged.
        """
        self.directory, self.spec, self._head = directory, Spec.read(directory), head
        if not (directory / CHECKSUMS).exists():
            raise CheckpointError(
                f"{directory}: this cache is not finished; run the command that writes it again, and it goes on."
            )
        check_sums(directory, lambda name: not name.startswith("shard-"))
        self.shards = open_shards(directory, self.spec)

    def targets(
        self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger, given: Given = NOTHING_GIVEN
    ) -> OneTeacherTargets:
        """Stored targets for the tokens at flat indices `rows`, in increasing order, of the batch.

        Raises: as `look_up`.
        """
        with ledger.phase("teacher"):
            return self.look_up(batch, examples, rows)

    def look_up(self, batch: Batch, examples: Sequence[Example], rows: Tensor) -> OneTeacherTargets:
        """The same without a ledger, on any thread, for a batch on the host or on a device.

        Raises: PairError when one of these positions is not in the cache; CheckpointError when it is damaged there.
        """
        if batch.layout == "packed":
            starts = np.concatenate([[0], np.cumsum(batch.sequence_lengths)])
        else:
            starts = np.arange(len(examples) + 1) * batch.input_ids.shape[1]
        asked = rows.cpu().numpy()
        bounds = np.searchsorted(asked, starts)
        parts = [
            self._read(example, asked[low:high] - start)
            for example, start, low, high in zip(examples, starts, bounds, bounds[1:], strict=False)
            if low < high
        ]
        return self._assemble(parts, batch.input_ids.device)

    def verify(self) -> None:
        """Read every byte of every file.

        Raises: CheckpointError that names all files with damage.
        """
        check_sums(self.directory, lambda name: True)
        for shard in self.shards:
            shard.verify()

    def _read(self, example: Example, positions: np.ndarray) -> Any:
        """What the mode keeps for predicting the tokens at `positions` of the example."""
        ids, best = example.sample.input_ids, None
        for shard in self.shards:
            for number in shard.find(ids):
                stored = shard.sequence(number).positions
                if stored[positions].all():
                    return self._decode(shard.record(number), stored, positions)
                best = stored
        if best is None:
            why = f"it holds no sequence that begins as this one of {len(ids)} tokens does"
        else:
            missing = positions[~best[positions]]
            why = f"its targets are not stored at {len(missing)} of the positions asked for (first: token {missing[0]})"
        raise PairError(
            f"{self.directory}: no targets for {example.sample.source or 'a sequence'} as it is cut here: {why}. Add "
            "them: run `limbeck teacher cache` into the same directory with this run's traces, cut and segments."
        )

    def _decode(self, record: bytes, stored: np.ndarray, positions: np.ndarray) -> Any:
        rows = np.cumsum(stored)[positions] - 1
        if self.spec.config.mode == "projected":
            kept = projected.decode(record, int(stored.sum()), self.spec.config.precision)
            return [tensor[torch.from_numpy(rows)] for tensor in kept]
        if self.spec.config.mode == "hidden":
            states = torch.frombuffer(bytearray(record), dtype=getattr(torch, self.spec.dtype))
            return states.view(-1, self.spec.hidden_size)[torch.from_numpy(rows)]
        return decode(record, int(stored.sum()), self.spec.vocab_size).select(rows)

    def _assemble(self, parts: list[Any], device: torch.device) -> OneTeacherTargets:
        config = self.spec.config
        if config.mode == "projected":
            parts = parts or [(torch.empty(0, self.spec.hidden_size), torch.empty(0))]
            mean_rows, constants = (torch.cat(tensors).to(device) for tensors in zip(*parts, strict=True))
            return ProjectedTargets(mean_rows, constants, config.temperature)
        if config.mode == "hidden":
            if self._head is None:
                raise PairError(f"{self.directory}: hidden states need the head of their teacher; give it.")
            hidden = torch.cat(parts) if parts else torch.empty(0, self._head.weight.shape[1])
            return DenseTargets(hidden.to(device), *self._head)
        if not parts:
            none = torch.empty(0, 1, device=device)
            return TopKTargets(none.long(), none, none[:, 0])
        targets = Entries.join(parts).targets(config.num_samples if config.mode == "sampled" else None)
        return TopKTargets(targets.ids.to(device), targets.log_probs.to(device), targets.log_tail.to(device))


def open_shards(directory: Path, spec: Spec, chosen: Callable[[Path], bool] = lambda path: True) -> list[Shard]:
    """The shards of a directory whose path `chosen` accepts.

    Raises: PairError when one is of another teacher or form than `spec`; CheckpointError when one is damaged.
    """
    shards = [Shard(path, spec.vocab_size) for path in sorted(directory.glob(SHARDS)) if chosen(path)]
    for shard in shards:
        if shard.header["spec"] != spec.identity:
            raise PairError(f"{shard.path}: of another teacher or form than the cache around it; take it away.")
    return shards


def seal(directory: Path) -> None:
    """Write the checksums of all files; after it the cache is finished."""
    lines = [_line(path) for path in _files(directory)]
    partial = directory / (CHECKSUMS + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(directory / CHECKSUMS)


def check_sums(directory: Path, chosen: Callable[[str], bool]) -> None:
    """Compare checksums.txt with the files whose names `chosen` accepts, and with the names of the others.

    Raises: CheckpointError that names every file that differs, is missing or is not listed.
    """
    try:
        text = (directory / CHECKSUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(damaged(directory / CHECKSUMS, "not readable")) from error
    listed = {line[66:].rstrip("\n"): line for line in text.splitlines(keepends=True)}
    present = {path.name: path for path in _files(directory)}
    wrong = sorted(listed.keys() ^ present.keys())
    wrong += [name for name, path in present.items() if name in listed and chosen(name) and listed[name] != _line(path)]
    if wrong:
        raise CheckpointError(damaged(directory / ", ".join(wrong), f"not as {CHECKSUMS} has it"))


def _files(directory: Path) -> list[Path]:
    return sorted([*directory.glob("*.json"), *directory.glob(SHARDS)])


def _line(path: Path) -> str:
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"
