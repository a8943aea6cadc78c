"""`limbeck serve`: this server, or the check, command and start of another engine."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from limbeck.errors import ConfigError
from limbeck.serve.config import ServeConfig
from limbeck.serve.handover import hand_over, start_of

KEY_VARIABLE = "LIMBECK_API_KEY"


def run(config: ServeConfig) -> None:
    """Serve until a signal comes.

    Raises: ConfigError when the server's packages, or the other engine, are not installed.
    """
    if config.api_key is None:
        config = dataclasses.replace(config, api_key=os.environ.get(KEY_VARIABLE))
    if config.engine != "limbeck":
        hand_over(config)
    try:
        from limbeck.serve.server import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"limbeck serve needs {error.name}: pip install 'limbeck[serve]'.") from error
    serve(config)


def check(config: ServeConfig) -> dict[str, Any]:
    """What would start another engine, and what to know about it; nothing is started.

    Raises: ConfigError for an export that the engine does not read.
    """
    if config.engine == "limbeck":
        raise ConfigError("serve: --dry-run tells the command of another engine; name one by --engine.")
    return start_of(config)
