"""Stored targets: one teacher pass, kept as top-k log-probs and tail mass, for every run that reads the same tokens.

What a causal teacher says about a token depends only on the tokens before it, so a sequence that is cut at its end
needs no targets of its own: it shares the rows of the longest sequence that it begins. `build_store` therefore runs
the teacher on the sequences that are no prefix of another one, and indexes all of them by a hash of their token ids.
A sequence that is not in the index is an error, never a guess.

One directory: `targets.safetensors` with `ids` [P K], `log_probs` [P K] float16 or float32, `log_tail` [P], and the
index `keys` [S], `offsets` [S], `lengths` [S]; row `offset + t` is what the teacher says after token t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from limbeck.errors import CheckpointError, PairError
from limbeck.ledger import Ledger, backbone_forward_flops, head_forward_flops
from limbeck.models.anatomy import Computed, head_of, hidden_states, sizes_of
from limbeck.teacher.targets import TopKTargets
from limbeck.traces.batch import Batch, Example
from limbeck.traces.sample import tokens_key

FILE = "targets.safetensors"
_HEAD_ROWS = 256
"""Positions whose full logits exist at a time while a store is built."""


class TargetStore:
    """Top-k targets on disk, read by sequence."""

    def __init__(self, directory: Path) -> None:
        file = directory / FILE
        try:
            with safe_open(file, framework="pt") as tensors:
                self._tensors = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            self._metadata_path = file
            self._rows = dict(
                zip(
                    self._tensors["keys"].tolist(),
                    zip(self._tensors["offsets"].tolist(), self._tensors["lengths"].tolist(), strict=True),
                    strict=True,
                )
            )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{file}: no readable target store ({error}); build it again.") from error
        stored = len(self._tensors["log_tail"])
        if any(offset < 0 or offset + length > stored for offset, length in self._rows.values()):
            raise CheckpointError(f"{file}: its index points beyond its {stored} rows; build it again.")

    def targets(self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger) -> TopKTargets:
        """Stored targets for the tokens at flat indices `rows` of the batch.

        Raises: PairError when a sequence of the batch is not in the store.
        """
        with ledger.phase("teacher"):
            index = torch.cat([self._stored_rows(example, batch) for example in examples])
            stored = index[rows.cpu() - 1]
            device = batch.input_ids.device
            return TopKTargets(
                self._tensors["ids"][stored].to(device, torch.int64),
                self._tensors["log_probs"][stored].to(device, torch.float32),
                self._tensors["log_tail"][stored].to(device, torch.float32),
            )

    def _stored_rows(self, example: Example, batch: Batch) -> Tensor:
        key = _int_key(example.sample.input_ids)
        if key not in self._rows:
            raise PairError(
                f"{self._metadata_path}: no targets for {example.sample.source or 'a sequence'} as it is cut here "
                f"({len(example)} tokens); build the store from this run's traces and cuts."
            )
        offset, _ = self._rows[key]
        width = len(example) if batch.layout == "packed" else batch.input_ids.shape[1]
        return torch.arange(offset, offset + width).clamp_max(len(self._tensors["log_tail"]) - 1)


def build_store(
    model: Any,
    sequences: Sequence[np.ndarray],
    out: Path,
    *,
    top_k: int = 50,
    vocab_size: int | None = None,
    batch_tokens: int = 4096,
    ledger: Ledger | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Run the teacher once over `sequences` and store its top-k targets in the directory `out`.

    Args:
      model: a teacher loaded with the packed attention.
      sequences: int32 token ids; duplicates and prefixes of others cost nothing.
      top_k: entries kept a position, at most the vocabulary.
      vocab_size: the tokenizer's real vocabulary; head rows beyond it are padding and hold no mass.
      advance: called with the number of tokens done.
    Returns: counts for a manifest (sequences, tokens scored and shared, bytes a token, mean mass kept).
    """
    ledger = ledger or Ledger()
    roots, index = share_prefixes(sequences)
    rows = head_of(model).weight.shape[0]
    vocab_size = min(vocab_size or rows, rows)
    top_k = min(top_k, vocab_size)
    parts: dict[str, list[Tensor]] = {"ids": [], "log_probs": [], "log_tail": []}
    for group in _groups(roots, batch_tokens):
        with ledger.phase("teacher"):
            targets = _score(model, group, top_k, vocab_size)
        lengths = [len(sequence) for sequence in group]
        sizes = sizes_of(model, vocab_size)
        backbone_flops = backbone_forward_flops(sizes, Computed.whole(lengths))
        ledger.add_flops(teacher=backbone_flops + head_forward_flops(sizes, sum(lengths)))
        ledger.count(tokens=sum(lengths), sequences=len(group))
        parts["ids"].append(targets.ids.to(torch.int32))
        parts["log_probs"].append(targets.log_probs)
        parts["log_tail"].append(targets.log_tail)
        if advance is not None:
            advance(sum(lengths))
    tensors = {name: torch.cat(part) for name, part in parts.items()}
    tensors |= index
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / FILE)
    tokens = len(tensors["log_tail"])
    return {
        "sequences": len(sequences),
        "tokens_scored": tokens,
        "tokens_asked": int(sum(len(sequence) for sequence in sequences)),
        "top_k": top_k,
        "bytes_per_token": (out / FILE).stat().st_size / max(1, tokens),
        "mass_kept": float(1 - tensors["log_tail"].exp().mean()) if tokens else 1.0,
    }


def share_prefixes(sequences: Sequence[np.ndarray]) -> tuple[list[np.ndarray], dict[str, Tensor]]:
    """The sequences that begin no other one, and for all of them where their rows will stand.

    Sorted by bytes in big-endian order, every sequence stands directly before those that it begins.
    """
    unique = sorted({np.ascontiguousarray(s, dtype=">i4").tobytes() for s in sequences})
    root_of: list[int] = [0] * len(unique)
    for i in range(len(unique) - 1, -1, -1):
        is_prefix = i + 1 < len(unique) and unique[i + 1].startswith(unique[i])
        root_of[i] = root_of[i + 1] if is_prefix else i
    root_numbers = sorted(set(root_of))
    roots = [np.frombuffer(unique[i], dtype=">i4").astype(np.int32) for i in root_numbers]
    starts = np.concatenate([[0], np.cumsum([len(root) for root in roots])]).astype(np.int64)
    offset_of = dict(zip(root_numbers, starts, strict=False))
    arrays = [np.frombuffer(data, dtype=">i4").astype(np.int32) for data in unique]
    return roots, {
        "keys": torch.tensor([_int_key(array) for array in arrays], dtype=torch.int64),
        "offsets": torch.tensor([int(offset_of[root]) for root in root_of], dtype=torch.int64),
        "lengths": torch.tensor([len(array) for array in arrays], dtype=torch.int64),
    }


def _groups(roots: Sequence[np.ndarray], batch_tokens: int) -> list[list[np.ndarray]]:
    groups: list[list[np.ndarray]] = []
    total = batch_tokens + 1
    for root in roots:
        if total + len(root) > batch_tokens:
            groups.append([])
            total = 0
        groups[-1].append(root)
        total += len(root)
    return groups


@torch.inference_mode()
def _score(model: Any, group: Sequence[np.ndarray], top_k: int, vocab_size: int) -> TopKTargets:
    lengths = [len(sequence) for sequence in group]
    device = head_of(model).weight.device
    input_ids = torch.from_numpy(np.concatenate(group).astype(np.int64)).unsqueeze(0).to(device)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(device)
    hidden = hidden_states(model, input_ids, positions, lengths)[0]
    weight, bias = head_of(model)
    weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    parts = []
    for rows in hidden.split(_HEAD_ROWS):
        logits = torch.nn.functional.linear(rows, weight, bias).float()
        values, ids = logits.topk(top_k, dim=-1)
        norm = logits.logsumexp(-1)
        # The tail is what is left when the kept entries are taken out: exact even where it is tiny.
        log_tail = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - norm
        parts.append((ids, values - norm.unsqueeze(-1), log_tail))
    ids, log_probs, tails = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return TopKTargets(ids, log_probs, tails)


def _int_key(input_ids: np.ndarray) -> int:
    """The hash of a token sequence as a signed 64-bit integer, the form safetensors can index."""
    return int.from_bytes(bytes.fromhex(tokens_key(input_ids)), "big", signed=True)
