"""Score a shard: the teacher's forward pass, what is kept of every position, and how true that is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.cost.memory import HEAD_ROWS
from limbeck.ledger import Ledger, backbone_forward_flops, head_forward_flops
from limbeck.models.anatomy import Head, head_of, hidden_rows, sizes_of
from limbeck.models.load import load_model
from limbeck.teacher import projected
from limbeck.teacher.cache import CacheConfig, Spec
from limbeck.teacher.codec import ENTRY_LEVELS, TAIL_LEVELS, Entries, encode, levels_of
from limbeck.teacher.shard import Stored, write_shard
from limbeck.teacher.topk import TopKTargets

_BATCH_TOKENS = 4096
_SAMPLE_EVERY = 16
"""One row in so many is compared with the full teacher."""


def score_shard(model: Any, spec: Spec, members: Sequence[Stored], path: Path, ledger: Ledger) -> None:
    """Run the teacher over `members`, whose order is that of the shard, and write the shard at `path`."""
    records: list[bytes] = []
    flops_before = ledger.flops["teacher"]
    sample = {
        "rows": 0,
        "entries": 0.0,
        "mass": 0.0,
        "kl": None if spec.config.mode in ("sampled", "projected") else 0.0,
    }
    for group in forward_groups(members):
        with ledger.phase("teacher"):
            hidden = hidden_before(model, spec, [member.as_read() for member in group], ledger)
            sizes = [int(member.positions.sum()) for member in group]
            for member, rows in zip(group, hidden.split(sizes), strict=True):
                records.append(_record(model, spec, member, rows, sample))
    facts = {"sample": sample, "spec": spec.identity, "flops": ledger.flops["teacher"] - flops_before}
    write_shard(path, members, records, spec.vocab_size, facts)


def forward_groups(members: Sequence[Stored]) -> Iterator[list[Stored]]:
    """The sequences of a shard that go through the teacher together."""
    group: list[Stored] = []
    for member in members:
        if group and sum(len(m.as_read().ids) for m in (*group, member)) > _BATCH_TOKENS:
            yield group
            group = []
        group.append(member)
    yield group


@torch.inference_mode()
def hidden_before(model: Any, spec: Spec, group: Sequence[Stored], ledger: Ledger) -> Tensor:
    """Hidden states before the stored positions of all sequences of the group."""
    device = head_of(model).weight.device
    lengths = [len(member.ids) for member in group]
    ids = torch.from_numpy(np.concatenate([member.ids for member in group]).astype(np.int64)).unsqueeze(0)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    rows = torch.from_numpy(np.nonzero(np.concatenate([member.positions for member in group]))[0]) - 1
    hidden, computed = hidden_rows(model, ids.to(device), positions.to(device), rows.to(device), lengths)
    sizes = sizes_of(model, spec.teacher_vocab)
    head = 0 if spec.config.mode == "hidden" else head_forward_flops(sizes, len(rows))
    if spec.config.mode == "projected":
        head += 2 * len(rows) * spec.vocab_size * spec.hidden_size
    ledger.add_flops(teacher=backbone_forward_flops(sizes, computed) + head)
    ledger.count(tokens=sum(lengths), sequences=len(group))
    return hidden


@torch.inference_mode()
def _record(model: Any, spec: Spec, member: Stored, hidden: Tensor, sample: dict[str, Any]) -> bytes:
    """What is stored of a sequence; adds to the sums of the sampled rows."""
    if spec.config.mode == "hidden":
        sampled = len(hidden[::_SAMPLE_EVERY])
        sample["rows"] += sampled
        sample["mass"] += float(sampled)
        return hidden.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    if spec.config.mode == "projected":
        return _project(spec, head_of(model).rows(slice(spec.vocab_size)), hidden, sample)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(member.ids.tobytes()).digest()[:7]))
    head = head_of(model).rows(slice(spec.vocab_size))
    parts = []
    for rows in hidden.split(HEAD_ROWS):
        log_probs = head.logits(rows).float().log_softmax(-1)
        if spec.config.mode == "sampled":
            entries = draw(log_probs.cpu(), spec.config.num_samples, generator)
        else:
            entries = keep(log_probs, spec.config)
        parts.append(entries)
        _compare(log_probs[::_SAMPLE_EVERY].cpu(), entries.select(np.arange(len(rows))[::_SAMPLE_EVERY]), spec, sample)
    return encode(Entries.join(parts), spec.vocab_size)


def _project(spec: Spec, head: Head, hidden: Tensor, sample: dict[str, Any]) -> bytes:
    """A record of mode projected; adds the squared error and size of the sampled rows' c to the sums."""
    config, student = spec.config, student_head(spec.config.student, spec.vocab_size, hidden.device)
    parts = []
    for rows in hidden.split(HEAD_ROWS):
        log_probs = (head.logits(rows).float() / config.temperature).log_softmax(-1)
        parts.append(projected.project(log_probs, student, config.temperature))
    mean_rows, constants = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))
    record = projected.encode(mean_rows, constants, config.precision)
    stored, _ = projected.decode(record, len(mean_rows), config.precision)
    sampled = slice(None, None, _SAMPLE_EVERY)
    sample["rows"] += len(mean_rows[sampled])
    sample["mass"] += float(len(mean_rows[sampled]))
    sample["squared_error"] = sample.get("squared_error", 0.0) + float((stored - mean_rows)[sampled].square().sum())
    sample["squared"] = sample.get("squared", 0.0) + float(mean_rows[sampled].square().sum())
    return record


@lru_cache(maxsize=1)
def student_head(name: str, vocab_size: int, device: torch.device) -> Head:
    """The head of the student that targets are projected for, over the vocabulary, in float32."""
    weight, bias, softcap = head_of(load_model(name, torch.float32, device="cpu")).rows(slice(vocab_size))
    return Head(weight.detach().to(device), None if bias is None else bias.detach().to(device), softcap)


def keep(log_probs: Tensor, config: CacheConfig) -> Entries:
    """The entries of [n V] log-probabilities that have at least `min_probability`: at least one, at most `top_k`.

    Chosen where the log-probabilities are, so that only these leave an accelerator.
    """
    values, ids = log_probs.topk(min(config.top_k, log_probs.shape[1]), dim=-1)
    probs = values.exp()
    kept = probs >= config.min_probability
    kept[:, 0] = True
    # Exact even where it is tiny: what is left over is added up, not subtracted from 1.
    dropped = log_probs.scatter(-1, ids, -torch.inf).exp().sum(-1) + probs.masked_fill(kept, 0.0).sum(-1)
    # Sorted by id; what is not kept goes to the end of its row.
    order = ids.masked_fill(~kept, log_probs.shape[1]).argsort(-1)
    mask = kept.gather(-1, order).cpu().numpy()
    return Entries(
        kept.sum(-1).cpu().numpy(),
        ids.gather(-1, order).cpu().numpy()[mask],
        np.maximum(1, levels_of(probs.gather(-1, order).cpu().numpy()[mask], ENTRY_LEVELS)),
        levels_of(dropped.cpu().numpy(), TAIL_LEVELS),
    )


def draw(log_probs: Tensor, num_samples: int, generator: torch.Generator) -> Entries:
    """`num_samples` draws from each row, counted: E[count / num_samples] is the teacher (RS-KD, arXiv 2503.16870)."""
    draws = torch.multinomial(log_probs.exp(), num_samples, replacement=True, generator=generator)
    vocab = log_probs.shape[1]
    keys, counts = np.unique((draws + torch.arange(len(draws))[:, None] * vocab).numpy(), return_counts=True)
    rows = np.bincount(keys // vocab, minlength=len(draws))
    return Entries(rows, keys % vocab, counts, np.zeros(len(draws), dtype=np.int64))


def _compare(log_probs: Tensor, entries: Entries, spec: Spec, sample: dict[str, Any]) -> None:
    """Add the rows' KL(teacher || what is stored), the mass and the number of their entries to the sums."""
    is_sampled = spec.config.mode == "sampled"
    targets = entries.targets(spec.config.num_samples if is_sampled else None)
    kept = torch.isfinite(targets.log_probs)
    mass = log_probs.gather(-1, targets.ids).exp().masked_fill(~kept, 0.0).sum(-1)
    sample["rows"] += len(log_probs)
    sample["entries"] += float(kept.sum())
    sample["mass"] += float(mass.sum())
    if not is_sampled:
        sample["kl"] += float(reconstruction_kl(log_probs, targets).sum())


def reconstruction_kl(log_probs: Tensor, targets: TopKTargets) -> Tensor:
    """KL(p || q) [n] in nats, where q has the stored entries and spreads the stored tail evenly over all others.

    Args:
      log_probs: [n V] of the full teacher.
      targets: of the same rows.
    """
    kept = torch.isfinite(targets.log_probs)
    others = log_probs.shape[1] - kept.sum(-1)
    even = targets.log_tail - others.clamp(min=1).log()
    # The last entry of a row stands in its padding too, with a value that must not be written over its own.
    first_values = torch.where(kept, targets.log_probs, targets.log_probs.gather(-1, kept.sum(-1, keepdim=True) - 1))
    stored = even[:, None].expand_as(log_probs).scatter(-1, targets.ids, first_values)
    probs = log_probs.exp()
    return torch.where(probs > 0, probs * (log_probs - stored.clamp(min=-1000.0)), 0.0).sum(-1)
