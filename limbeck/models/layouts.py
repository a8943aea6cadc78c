"""Three ways to run sequences of unequal length: packed in one row, padded in groups, or each alone.

A batch comes packed (one row, the sequences behind one another) and its hidden states go back in that order, so what
asks for them need not know which way was taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.models.varlen import Cuts

Way = Literal["packed", "padded", "alone"]
"""In order of speed."""
WAYS: tuple[Way, ...] = ("packed", "padded", "alone")
_PADDED_OVER_REAL = 1.25
"""Most tokens of a padded group over its real ones."""


def run(
    decoder: Any,
    input_ids: Tensor,
    lengths: Sequence[int],
    way: Way,
    positions: Tensor | None = None,
    cuts: Cuts | None = None,
) -> Tensor:
    """Last hidden states [1 T D] of packed sequences.

    Args:
      decoder: of a causal LM; `packed` needs the packed attention.
      input_ids: int64 [1 T].
      lengths: tokens of each sequence, adding up to T.
      way: how they are run.
      positions: int64 [1 T], counted here when None.
      cuts: the lengths where the decoder is, for attention in one call.
    """
    if way == "packed":
        if positions is None:
            positions = torch.cat([torch.arange(n) for n in lengths])[None].to(input_ids.device)
        extra: dict[str, Any] = {} if cuts is None else {"cu_seq_lens_q": cuts.starts, "max_length_q": cuts.longest}
        return call(decoder, input_ids, positions, sequence_lengths=tuple(lengths), **extra)
    groups = padded_groups(lengths) if way == "padded" else [[number] for number in range(len(lengths))]
    return run_groups(decoder, input_ids, lengths, groups)


def run_groups(decoder: Any, input_ids: Tensor, lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> Tensor:
    """The same with the sequences of each group padded to a common length."""
    parts = input_ids[0].split(list(lengths))
    found: dict[int, Tensor] = {}
    for group in groups:
        width = max(lengths[number] for number in group)
        rows = input_ids.new_zeros(len(group), width)
        for row, number in zip(rows, group, strict=True):
            row[: lengths[number]] = parts[number]
        # Positions count on in the padding: transformers takes a jump in them for a packed row and builds a mask.
        positions = torch.arange(width, device=input_ids.device).expand(len(group), width)
        hidden = call(decoder, rows, positions)
        found |= {number: hidden[row, : lengths[number]] for row, number in enumerate(group)}
    return torch.cat([found[number] for number in range(len(lengths))])[None]


def padded_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the sequences that are padded to a common length, so that padding is a fifth of a group at most."""
    groups: list[list[int]] = []
    total = 0
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        total += lengths[number]
        if not groups or lengths[groups[-1][0]] * (len(groups[-1]) + 1) > _PADDED_OVER_REAL * total:
            groups.append([])
            total = lengths[number]
        groups[-1].append(number)
    return groups


def call(decoder: Any, input_ids: Tensor, positions: Tensor, **extra: Any) -> Tensor:
    """Last hidden states [B T D] of rows that the decoder takes as they are."""
    output = decoder(input_ids=input_ids, position_ids=positions, use_cache=False, **extra)
    return output.last_hidden_state
