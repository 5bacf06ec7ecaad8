"""A model's name to a directory: a local path as it is, a hub id through huggingface_hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from dist_lowbit.comm import Group
from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.log import logger

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
_PATTERNS = {
    "config": ["*.json", "*.py", "*.txt", "*.model", "*.jinja"],
    "all": ["*.json", "*.py", "*.txt", "*.model", "*.jinja", "*.safetensors", "*.bin"],
}


def resolve(model: str, revision: str | None = None, files: str = "all") -> Path:
    """Return the local directory of a model: a path, or a hub id downloaded into the hub's cache.

    HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured by huggingface_hub. What is neither a directory nor a hub id,
    and an id that cannot be had (offline and not cached, unknown, no access), is a UsageError.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{model} is a file; expected a model directory or a hub id")
    if not _HUB_ID.fullmatch(model) or model.startswith((".", "/", "~")):
        raise UsageError(f"{model} does not exist; expected a model directory or a hub id")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS[files]))
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"{model} is no local directory, and it is not in the hub's cache and cannot be downloaded from here; "
            f"check the path, or the network and HF_HUB_OFFLINE"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"{model} is neither a local directory nor a repository of the hub that you can read"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UsageError(f"cannot download {model}: {str(error).splitlines()[0]}") from error


def resolve_together(model: str, group: Group, local_rank: int, revision: str | None = None) -> Path:
    """Resolve a model on every rank, downloading once per host. All ranks of the group must call together."""
    if group.size == 1 or Path(model).expanduser().exists():
        return resolve(model, revision)
    if local_rank == 0:
        failure = None
        try:
            path = resolve(model, revision)
        except UsageError as error:
            failure = str(error)
    else:
        logger.warning("waiting for rank 0 of this host to have %s", model)
        failure = None
    first = next((text for text in group.gather_object(failure) if text), None)
    if first:
        raise UsageError(first)
    return path if local_rank == 0 else resolve(model, revision)
