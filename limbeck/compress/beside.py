"""What stands beside a model's weights: tokenizer, chat templates, generation config; carried over as they are."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import transformers

from limbeck.errors import CheckpointError
from limbeck.models.load import load_tokenizer, locate, quiet

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_TEMPLATES = "additional_chat_templates"


def copy_beside(model: str, directory: Path) -> None:
    """The files of a local model as they stand, else what its tokenizer and generation config write.

    Raises: CheckpointError when they cannot be written.
    """
    place = locate(model)
    source = Path(place.path)
    if place.is_local and place.gguf_file is None:
        for file in _FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, directory / file)
        if (source / _TEMPLATES).is_dir():
            shutil.copytree(source / _TEMPLATES, directory / _TEMPLATES)
        return
    try:
        load_tokenizer(model, pads=False).save_pretrained(directory)
    except Exception as error:  # the tokenizers library raises plain ones, a full disk included
        raise CheckpointError(f"{directory}: the tokenizer cannot be written ({error}).") from error
    with quiet(), contextlib.suppress(OSError):  # most small checkpoints have none
        config = transformers.GenerationConfig.from_pretrained(place.path, local_files_only=place.is_local)
        config.save_pretrained(directory)
