"""A byte-level BPE tokenizer and its chat template as GGUF metadata.

llama.cpp has the rules that split text before BPE built in under names; a name is given only where the tokenizer's own
rule is known to be that one, since a wrong one tokenizes most texts right and some wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from limbeck.compress.export.lint import Finding
from limbeck.errors import CompressionError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_QWEN2: "qwen2", _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1): "llama-bpe"}
"""Regular expression of the split -> llama.cpp's name."""


def add_vocabulary(writer: Any, tokenizer: Any, vocab_size: int, pre_tokenizer: str | None = None) -> list[Finding]:
    """Add tokens, merges, special ids and the chat template.

    Args:
      writer: a GGUFWriter.
      tokenizer: a fast tokenizer.
      vocab_size: rows of the embedding; ids without a token are filled up.
      pre_tokenizer: llama.cpp's name for the split; None finds it out.
    Returns: what llama.cpp will tokenize otherwise.
    Raises: CompressionError for a tokenizer of another kind, or with a split of no known name.
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    if tree["model"].get("type") != "BPE" or not _is_byte_level(tree["pre_tokenizer"]):
        raise CompressionError(
            f"the tokenizer is a {tree['model'].get('type')} model that is not byte-level BPE; GGUF export carries "
            "byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM)."
        )
    findings = [*_of_normalizer(tree), *_of_added(tree)]
    _check_model(tree["model"])
    tokens, types = _tokens(tree, tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer or split_name(tree["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tree["model"]["merges"]
    if merges:
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _add_special(writer, tokenizer)
    return findings


def _add_special(writer: Any, tokenizer: Any) -> None:
    """Ids of special tokens, which of them frame a text, and the chat template."""
    for kind in ("bos", "eos", "pad"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{kind}_token_id")(token_id)
    framing = tokenizer("")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and tokenizer.bos_token_id in framing)
    if tokenizer.eos_token_id in framing and tokenizer.eos_token_id != tokenizer.bos_token_id:
        writer.add_add_eos_token(True)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _of_normalizer(tree: dict[str, Any]) -> Iterator[Finding]:
    """GGUF has no place for what a tokenizer does to text before it splits it.

    Raises: CompressionError for anything but the normal form, in which nearly all text is.
    """
    found = tree.get("normalizer")
    if found is None:
        return
    kinds = [part["type"] for part in found.get("normalizers", [found])]
    if kinds and set(kinds) != {"NFC"}:
        raise CompressionError(
            f"the tokenizer changes text before it splits it ({', '.join(kinds)}), which llama.cpp does not."
        )
    if kinds:
        yield Finding("normalizer", "warning", "text is brought to NFC first, by llama.cpp not; other forms differ")


def _of_added(tree: dict[str, Any]) -> Iterator[Finding]:
    """Added tokens that take the spaces beside them, or stand as whole words only."""
    flags = ("lstrip", "rstrip", "single_word")
    for entry in tree["added_tokens"]:
        found = [flag for flag in flags if entry.get(flag)]
        if found:
            text = f"{entry['content']!r} is added with {', '.join(found)}, which llama.cpp does not know"
            yield Finding("added-tokens", "error", text)


def _check_model(model: dict[str, Any]) -> None:
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback"):
        if model.get(option):
            raise CompressionError(f"the tokenizer's BPE has {option} {model[option]!r}, which llama.cpp's has not.")


def split_name(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text.

    Raises: CompressionError when it is none that is known to be the same.
    """
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kinds = [part["type"] for part in parts]
    name = None
    if not parts[-1].get("add_prefix_space"):
        name = _own_split(kinds, parts[0]) if parts[-1].get("use_regex", True) else _known_split(kinds, parts[0])
    if name is not None:
        return name
    raise CompressionError(
        f"the tokenizer splits text by {kinds} in a way that has no known name in llama.cpp; if you know it, set "
        "pre_tokenizer."
    )


def _own_split(kinds: list[str], first: dict[str, Any]) -> str | None:
    """Of a tokenizer that splits as the byte level itself does."""
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    return "smollm" if kinds == ["Digits", "ByteLevel"] and first["individual_digits"] else None


def _known_split(kinds: list[str], first: dict[str, Any]) -> str | None:
    """Of a tokenizer that splits by an expression of its own before."""
    return SPLITS.get(first["pattern"].get("Regex", "")) if kinds == ["Split", "ByteLevel"] else None


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return parts[-1]["type"] == "ByteLevel"


def _tokens(tree: dict[str, Any], tokenizer: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in tree["added_tokens"]}
    if max(by_id) >= vocab_size:
        raise CompressionError(f"the tokenizer has {max(by_id) + 1} tokens, the model {vocab_size}; they do not match.")
    tokens, types = [], []
    for token_id in range(vocab_size):
        entry = added.get(token_id)
        if token_id not in by_id:
            tokens.append(f"[PAD{token_id}]")
            types.append(_UNUSED)
        else:
            tokens.append(by_id[token_id])
            types.append(_NORMAL if entry is None else _CONTROL if entry["special"] else _USER_DEFINED)
    return tokens, types
