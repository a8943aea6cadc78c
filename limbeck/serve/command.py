"""`limbeck serve`: this server, or the check, command and start of another engine."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from limbeck.errors import ConfigError
from limbeck.serve.config import ServeConfig
from limbeck.serve.handover import hand_over

KEY_VARIABLE = "LIMBECK_API_KEY"


def run(config: ServeConfig, dry_run: bool = False) -> dict[str, Any] | None:
    """Serve until a signal comes.

    Args:
      dry_run: only check the model for another engine and tell the command.
    Raises: ConfigError when the server's packages, or the other engine, are not installed.
    """
    if config.api_key is None:
        config = dataclasses.replace(config, api_key=os.environ.get(KEY_VARIABLE))
    if config.engine != "limbeck":
        return hand_over(config, dry_run)
    if dry_run:
        raise ConfigError("serve: --dry-run tells the command of another engine; name one by --engine.")
    try:
        from limbeck.serve.server import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"limbeck serve needs {error.name}: pip install 'limbeck[serve]'.") from error
    serve(config)
    return None
