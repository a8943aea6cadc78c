"""The fenced blocks of the documentation, and the marks that say what a block is.

A mark is an HTML comment on the line before the fence:

    <!-- not run: REASON -->      a block of commands or code that cannot run here; it is checked, not run
    <!-- recipe of: COMMAND -->   YAML that is a whole recipe of a command
    <!-- part of: COMMAND -->     YAML that is some of its fields

A block whose first line is a comment with a file's name (`# sweep.yaml`) is that file for what follows on its page.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from made_tokenizers import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("tutorials/*.md"))]
"""Pages for readers; reports that limbeck wrote are not among them."""
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
SHELL = ("bash", "sh")
PROSE = ("text",)
"""What the reader is shown: output, layouts, prompts."""
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^ *```$", re.M | re.S
)


class Block(NamedTuple):
    """One fenced block."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def name(self) -> str:
        """Where it stands, for the name of a test."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether it may be run here."""
        return not self.mark.startswith("not run:")

    @property
    def file(self) -> str | None:
        """The file that its first line names."""
        found = re.match(r"# (\S+\.(?:yaml|py|jsonl|csv))$", self.text.partition("\n")[0])
        return found[1] if found else None


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text[: found.start("language")].count("\n") + 1,
            found["language"].strip(),
            found["mark"] or "",
            found["text"],
        )
        for found in _BLOCK.finditer(text)
    ]


def all_blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in these languages."""
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def commands_of(text: str) -> list[str]:
    """The commands of a shell block, one each, without comments; heredocs and quotes over lines stay whole."""
    commands, open_line = [], ""
    for line in text.splitlines():
        open_line += line if not open_line else "\n" + line
        if line.endswith("\\"):
            open_line = open_line[:-1].rstrip() + " "
            continue
        if open_line.count("'") % 2:
            continue
        if open_line.strip() and not open_line.lstrip().startswith("#"):
            commands.append(open_line.strip().replace(" \n", " "))
        open_line = ""
    return commands


def save_text_model(directory: str) -> None:
    """A small random model whose tokenizer has ` yes` and ` no`, in the place of the one that a page speaks of."""
    tokenizer = byte_tokenizer(merges=["Ġ y", "Ġy e", "Ġye s", "Ġ n", "Ġn o"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
