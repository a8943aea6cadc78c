"""Whether a tokenizer and a model belong together: ids beyond the embedding have no row in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from limbeck.errors import ModelError
from limbeck.models.load import vocabulary_size
from limbeck.progress import console


def check_tokens(model: str, tokenizer: Any, vocab_size: int, ids: Tensor | None = None) -> None:
    """Refuse a tokenizer that makes ids beyond the embedding of ordinary text, or of this text.

    Special tokens that the text has none of are told and let pass: some text models are published with the tokenizer of
    their multimodal relatives.

    Args:
      model: for messages.
      vocab_size: V, the rows of the embedding.
      ids: int64, the text that the model will be shown.
    Raises: ModelError.
    """
    size = vocabulary_size(tokenizer)
    if size <= vocab_size:
        return
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    added = tokenizer.added_tokens_decoder
    is_ordinary = any(number not in added or not added[number].special for number in beyond)
    text = f"{model}: the tokenizer has {size} tokens, the model {vocab_size}"
    if is_ordinary or (ids is not None and ids.numel() and int(ids.max()) >= vocab_size):
        raise ModelError(
            f"{text}: {beyond[min(beyond)]!r} has no embedding. Resize the model's embedding, or remove the token."
        )
    console.print(f"{text}; {len(beyond)} special tokens have no embedding, and may not be used.", highlight=False)
