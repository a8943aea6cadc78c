"""What the site holds beside the pages of this folder: the reference of the command line, made from the commands
themselves at every build, and the files outside of it that pages link to.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from limbeck.commands import COMMANDS, Command
from limbeck.flags import FieldInfo
from limbeck.help import OPTIONS, fields_of, options_of
from limbeck.stage import function_name

ROOT = Path(__file__).parent.parent
LINKED = ("benchmarks/results/*.md", "benchmarks/results/*.png", "recipes/*.yaml", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated page and the linked files."""
    files.append(File.generated(config, "cli.md", content=cli_page()))
    for path in sorted(path for pattern in LINKED for path in ROOT.glob(pattern)):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that leave docs/ in the repository stay within the site."""
    for place in ("benchmarks/", "recipes/", "CHANGELOG.md"):
        markdown = markdown.replace(f"](../{place}", f"]({place}").replace(f"](../../{place}", f"](../{place}")
    return markdown


def cli_page() -> str:
    """The reference of all commands as Markdown."""
    parts = [
        "# Commands",
        "A recipe is a YAML file of the fields below. Each field is also a flag, which may leave out the groups in "
        "front of a name that occurs once: `--lead-fraction 0.5` sets `truncation.lead_fraction`. The page is made "
        "from the commands themselves, as is `limbeck COMMAND --help`.",
        _table(["option", "does"], [[f"`{flag}`", _plain(text)] for flag, text in OPTIONS.items()]),
        *(_section(name, command) for name, command in COMMANDS.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _section(name: str, entry: Command) -> str:
    command = entry.load()
    subject = f"{command.subject.upper()} | " if command.subject else ""
    usage = f"limbeck {name} {subject}[RECIPE.yaml] [--FIELD value ...]"
    usage += f"\nlimbeck.{function_name(name)}(..., FIELD=value)"
    options = options_of(command)
    text = f"{entry.help[0].upper()}{entry.help[1:]}."
    head = f"## limbeck {name}\n\n{text}\n\n```text\n{usage}\n```\n\nOptions: {', '.join(f'`{o}`' for o in options)}"
    rows = [_row(info) for info in fields_of(command)]
    return f"{head}\n\n{_table(['field', 'meaning', 'type', 'default'], rows)}"


def _row(info: FieldInfo) -> list[str]:
    required = info.default is dataclasses.MISSING
    default = "required" if required else f"<code>{_plain(json.dumps(info.default, default=str))}</code>"
    return [f"`{info.path}`", _plain(info.doc), _plain(info.type_name), default]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text in which neither Markdown nor HTML finds a sign of its own."""
    return re.sub(r"[^\w\s.,;:=()/+-]|_", lambda sign: f"&#{ord(sign[0])};", text)
