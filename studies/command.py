"""What every study's command line shares: `python -m studies.NAME [--FIELD value ...] [--out DIRECTORY] [--resume]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from limbeck.config import build
from limbeck.errors import LimbeckError
from limbeck.flags import apply_flags, describe
from limbeck.stage import How


def main(config_class: type, run: Callable[..., Any], name: str) -> None:
    """Call `run(config, out, how=...)`; a user's mistake is one line and exit code 2."""
    try:
        config, options = read(config_class, name, sys.argv[1:])
        run(config, options.out, how=How(overwrite=options.overwrite, resume=options.resume))
    except (LimbeckError, OSError) as error:
        print(f"studies.{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print((options.out / "table.md").read_text(encoding="utf-8"))


def read(config_class: type, name: str, arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """The config that the flags describe, and the options out, overwrite and resume.

    Raises: ConfigError for a flag that is no field, or a value that cannot work.
    """
    fields = "\n".join(f"  --{field.path.replace('_', '-')}: {field.doc}" for field in describe(config_class))
    parser = argparse.ArgumentParser(
        f"python -m studies.{name}",
        allow_abbrev=False,
        epilog=f"fields:\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs", "studies", name), help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    options, flags = parser.parse_known_args(arguments)
    return build(config_class, apply_flags(config_class, {}, flags), f"studies.{name}"), options
