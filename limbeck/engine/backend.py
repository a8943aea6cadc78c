"""What a back end is: everything that the scorer and the generator ask of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from limbeck.engine.states import Segment


class Backend(Protocol):
    """A causal language model that reads segments of texts and keeps their states."""

    config: Any
    """Of transformers."""
    context: int
    """Tokens of a text that the model itself can have."""
    max_tokens: int
    """Tokens of a text here."""
    vocab_size: int
    embeddings: int
    """Token ids that may stand in a prompt."""
    has_blocks: bool
    """Whether states can be cut into blocks, so that prefixes can be kept and shared."""

    @property
    def is_int8(self) -> bool:
        """Whether the linear layers are."""

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, all layers."""

    def states(self, tokens: int) -> Any:
        """Room for the states of a text."""

    def behind(self, states: Any, room: int) -> Any:
        """Room for tokens behind a prompt, whose states others may go on using."""

    def run(self, segments: Sequence[Segment], every_row: bool = False) -> Tensor:
        """What stands behind each segment's last token, or each token's: [S D], in their order.

        Raises: ModelError for texts beyond `max_tokens`, ids beyond the vocabulary, and empty segments.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits [S V] of what `run` returns."""

    def label_logits(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Logits [S C] of C tokens."""

    def log_normalizers(self, hidden: Tensor) -> Tensor:
        """Log-sum-exp [S] of all logits."""
