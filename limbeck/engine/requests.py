"""What is asked of the engine and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from limbeck.errors import ConfigError, ModelError


class Request(NamedTuple):
    """Items to score behind one prefix."""

    prefix: Sequence[int]
    """Token ids, beginning-of-text included; may be empty."""
    items: Sequence[Sequence[int]]
    """Token ids of each item; an empty one scores the prefix itself."""
    labels: Sequence[int]
    """Ids of the label tokens."""
    full: bool = False
    """Whether to multiply the whole head, for log-probs over the vocabulary and the labels' mass."""


class Scores(NamedTuple):
    """Of one request: N items, C labels."""

    logits: Tensor
    """[N C] of the label tokens."""
    log_normalizers: Tensor | None
    """[N], log-sum-exp over the vocabulary, where it was asked for."""

    @property
    def label_log_probs(self) -> Tensor:
        """[N C], normalised over the labels."""
        return self.logits.log_softmax(1)

    @property
    def log_probs(self) -> Tensor:
        """[N C], normalised over the vocabulary."""
        return self.logits - self._normalizers()[:, None]

    @property
    def label_mass(self) -> Tensor:
        """[N], probability that the next token is one of the labels. Far below 1, the scores mean little."""
        return (self.logits.logsumexp(1) - self._normalizers()).exp()

    def _normalizers(self) -> Tensor:
        if self.log_normalizers is None:
            raise ConfigError("scores: the request was not `full`, so that the vocabulary's sum is not known.")
        return self.log_normalizers


def label_ids(tokenizer: Any, labels: Sequence[str]) -> list[int]:
    """Token ids of labels, each of which must be one token as written (spaces count).

    Raises: ModelError for a label of several tokens or none.
    """
    return single_tokens(labels, [tokenizer.encode(label, add_special_tokens=False) for label in labels])


def single_tokens(labels: Sequence[str], ids: Sequence[Sequence[int]]) -> list[int]:
    """The token of each label, by the ids of its text.

    Raises: ModelError for a label of several tokens or none.
    """
    for label, own in zip(labels, ids, strict=True):
        if len(own) != 1:
            raise ModelError(f"label {label[:40]!r} is {len(own)} tokens; a label is one token, say ' yes' or 'yes'.")
    return [own[0] for own in ids]


def text_request(tokenizer: Any, prefix: str, items: Sequence[str], labels: Sequence[str]) -> Request:
    """A request of texts. Prefix and items are tokenised apart, so that every item has the same prefix tokens."""
    return Request(
        tokenizer.encode(prefix),
        tokenizer(list(items), add_special_tokens=False)["input_ids"] if items else [],
        label_ids(tokenizer, labels),
    )
