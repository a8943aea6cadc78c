"""What a model itself says of texts that a rounded one wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.engine.backend import Backend
from limbeck.engine.backends import decoder_of
from limbeck.engine.complete import Completion
from limbeck.engine.states import Segment

HEAD_ROWS = 256
"""Positions whose logits are in memory at once."""


def rescore(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Completion]], temperature: float
) -> None:
    """Set `exact_log_probs` of all completions: log softmax(logits / temperature) of each token, in the weights' type.

    Args:
      completions: of each prompt, which is read once for all of them.
    """
    texts = zip(prompts, completions, strict=True)
    longest = max((len(prompt) + len(one.token_ids) for prompt, samples in texts for one in samples), default=1)
    decoder = decoder_of(model, "float32", longest)
    for prompt, samples in zip(prompts, completions, strict=True):
        states = decoder.states(len(prompt))
        if len(prompt) > 1:
            decoder.run([Segment(prompt[:-1], states, 0, grows=True)])
        texts_behind = [Segment([prompt[-1], *one.token_ids[:-1]], states, len(prompt) - 1) for one in samples]
        rows = decoder.run(texts_behind, every_row=True).split([len(one.token_ids) for one in samples])
        for completion, own in zip(samples, rows, strict=True):
            completion.exact_log_probs = _log_probs(decoder, own, completion.token_ids, temperature)


@torch.inference_mode()
def _log_probs(decoder: Backend, rows: Tensor, tokens: Sequence[int], temperature: float) -> list[float]:
    found: list[float] = []
    for part, ids in zip(rows.split(HEAD_ROWS), torch.tensor(tokens).split(HEAD_ROWS), strict=True):
        log_probs = (decoder.logits(part) / temperature).log_softmax(-1)
        found += log_probs.gather(1, ids[:, None].to(log_probs.device))[:, 0].tolist()
    return found
