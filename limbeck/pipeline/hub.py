"""Send an export with its card to the Hugging Face Hub, or to a server that speaks its protocol (HF_ENDPOINT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from limbeck.checkpoint import MANIFEST
from limbeck.errors import ConfigError, LimbeckError
from limbeck.pipeline.config import HubConfig

STAYS = (MANIFEST, "*.partial")
"""What is not sent: the manifest names paths of this machine."""


def push(config: HubConfig, directory: Path) -> dict[str, Any]:
    """Make the repository where it is missing and commit all files of `directory` to it at once.

    Returns: `repository`, `commit` and `url`.
    Raises: ConfigError for a name that the Hub refuses, and where there is no token or no network is allowed;
      LimbeckError when the Hub refuses the files or does not answer.
    """
    api = HfApi()
    try:
        api.create_repo(config.repository, private=config.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=config.repository,
            folder_path=directory,
            commit_message="Weights and model card",
            revision=config.revision,
            ignore_patterns=list(STAYS),
        )
    except (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise ConfigError(f"push_to_hub {config.repository}: {_one_line(error)}") from error
    except (HfHubHTTPError, httpx.HTTPError, ValueError) as error:
        raise LimbeckError(
            f"push_to_hub {config.repository}: the Hub refused or did not answer ({_one_line(error)}). Nothing else is "
            "lost: call the pipeline again."
        ) from error
    return {"repository": config.repository, "commit": commit.oid, "url": commit.commit_url}


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
