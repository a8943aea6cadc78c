"""A model passed block by block over fixed tokens, with blocks left out, and the loss at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.compress.calibrate import Rows
from limbeck.distill.divergence import forward_kl
from limbeck.errors import CompressionError
from limbeck.models.anatomy import backbone_of, causal_lm_of, head_of
from limbeck.models.probe import logit_scale

LossName = Literal["forward_kl", "cross_entropy"]
_LOGITS_BYTES = 64 << 20
"""Logits that are held at once."""


class Passes:
    """Rows of tokens behind the embedding, and what it takes to send them through any of the blocks.

    The loss is measured against the model as it is when this is made; its weights may change afterwards.
    """

    def __init__(self, model: Any, rows: Rows, loss: LossName = "forward_kl", rows_at_once: int = 8) -> None:
        """Pass the rows through the whole model once.

        Args:
          model: a causal LM in evaluation mode.
          rows: tokens held out from calibration; the loss is taken where a token and the next are no padding.
          loss: `forward_kl` to the model itself, or `cross_entropy` of the next tokens.
          rows_at_once: rows in a pass.
        Raises: CompressionError when there is no token to predict.
        """
        self._lm, self._backbone, self._loss = causal_lm_of(model), backbone_of(model), loss
        self.layers: list[Any] = list(self._backbone.layers)  # type: ignore[arg-type]
        self._norm: Any = _final_norm(self._backbone)
        predicting = rows.valid[:, :-1] & rows.valid[:, 1:]
        self.tokens = int(predicting.sum())
        input_ids, predicting = (x.to(self._lm.device) for x in (rows.input_ids, predicting))
        if not self.tokens:
            raise CompressionError("the held-out rows have no token with a next one; give longer rows.")
        # Masks and positions of one row hold for all of them, and broadcast.
        self._calls = self._record(input_ids[:1])[1]
        self.entered: list[Tensor] = []
        """What enters the first block, float [n T D] of each pass."""
        self._places, self._targets = [], []
        for ids, places in zip(input_ids.split(rows_at_once), predicting.split(rows_at_once), strict=True):
            entered, _, hidden = self._record(ids)
            self.entered.append(entered)
            self._places.append(places)
            self._targets.append(hidden[:, :-1][places] if loss == "forward_kl" else ids[:, 1:][places])

    @torch.no_grad()
    def run(self, hidden: Tensor, layers: Sequence[int]) -> Tensor:
        """Send hidden states [n T D] through some blocks, in the order given."""
        for layer in layers:
            output = self.layers[layer](hidden, **self._calls[layer])
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    @torch.no_grad()
    def loss(self, number: int, hidden: Tensor) -> float:
        """Sum of the loss over the tokens of a pass; hidden [n T D] left the last block."""
        hidden = self._norm(hidden)[:, :-1][self._places[number]]
        size = max(_LOGITS_BYTES // (4 * self._lm.config.vocab_size), 1)
        parts = zip(hidden.split(size), self._targets[number].split(size), strict=True)
        return sum(float(self._loss_of(rows, targets)) for rows, targets in parts)

    def mean_loss(self, layers: Sequence[int]) -> float:
        """Mean loss a token with only some blocks, in the order given."""
        passes = enumerate(self.entered)
        return sum(self.loss(number, self.run(entered, layers)) for number, entered in passes) / self.tokens

    def _loss_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        log_probs = self._log_probs(hidden)
        if self._loss == "forward_kl":
            return forward_kl(log_probs, self._log_probs(targets))[0].sum(dtype=torch.float64)
        return -log_probs.gather(1, targets[:, None]).sum(dtype=torch.float64)

    def _log_probs(self, hidden: Tensor) -> Tensor:
        return head_of(self._lm).logits(hidden * logit_scale(self._lm)).float().log_softmax(-1)

    @torch.no_grad()
    def _record(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]], Tensor]:
        """What enters the first block, what else each block is called with, and the last hidden states."""
        entered: list[Tensor] = []
        calls: list[dict[str, Any]] = []

        def keep(_: Any, arguments: tuple[Tensor, ...], call: dict[str, Any]) -> None:
            if not calls:
                entered.append(arguments[0])
            calls.append(call)

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        try:
            hidden = self._backbone(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        return entered[0], calls, hidden


def _final_norm(backbone: Any) -> Any:
    """What stands between the last block and the head.

    Raises: CompressionError for a model that calls it otherwise.
    """
    for name in ("norm", "final_layernorm"):
        if hasattr(backbone, name):
            return getattr(backbone, name)
    raise CompressionError(f"{type(backbone).__name__} has no norm behind its blocks; its layers are not removed.")
