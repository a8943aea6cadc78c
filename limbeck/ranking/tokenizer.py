"""A tokenizer made of the texts of a run, for models that are trained from scratch: byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


_REPEATS = 8
"""Times that a label is read beside every text: more often than any template repeats a word, so it is merged first."""


def train_tokenizer(texts: Iterable[str], labels: Sequence[str], vocabulary_tokens: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most so many tokens; any text can be written, and the same texts give the same tokenizer.

    Args:
      texts: what the merges are learned on.
      labels: words that are to be one token each.
      vocabulary_tokens: at least 257, the bytes and the end of text.
    Source: Sennrich, Haddow and Birch 2016, over bytes as in GPT-2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_tokens,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = "".join(labels) * _REPEATS
    tokenizer.train_from_iterator((text + words for text in texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
