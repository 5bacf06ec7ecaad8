"""A model's name to a directory: a local path as it is, a hub id through huggingface_hub's cache."""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from dist_lowbit.comm import Group
from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.log import logger
from dist_lowbit.core.settings import settings

from .paths import expand

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
_SMALL = ["*.json", "*.py", "*.txt", "*.model", "*.jinja"]
# Copies of the weights that transformers does not read.
_IGNORED = ["*/*.safetensors", "*/*.bin", "consolidated*"]
_PATIENCE_S = 5.0  # how often at least a rank that downloads tells the others that it is alive


def resolve(model: str, revision: str | None = None, files: str = "all") -> Path:
    """Return the local directory of a model: a path, or a hub id downloaded into the hub's cache.

    HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured by huggingface_hub. What is neither a directory nor a hub id,
    and an id that cannot be had (offline and not cached, unknown, no access), is a UsageError.
    """
    path = expand(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{model} is a file; expected a model directory or a hub id")
    if not _HUB_ID.fullmatch(model) or model.startswith((".", "/", "~")):
        raise UsageError(f"{model} does not exist; expected a model directory or a hub id")
    try:
        return _download(model, revision, weights=files == "all")
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


def _download(model: str, revision: str | None, weights: bool) -> Path:
    wanted = [*_SMALL, *(["*.safetensors"] if weights else [])]
    path = Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=_IGNORED))
    if weights and not any(path.glob("*.safetensors")):  # old repositories hold their weights as .bin only
        wanted = [*_SMALL, "*.bin"]
        path = Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=_IGNORED))
    return path


def resolve_together(model: str, group: Group, local_rank: int, revision: str | None = None) -> Path:
    """Resolve a model on every rank, downloading once per host. All ranks of the group must call together.

    A download may take hours: meanwhile the ranks keep telling each other that they are alive.
    """
    if group.size == 1 or all(group.gather_object(expand(model).exists())):
        return resolve(model, revision)
    if local_rank != 0:
        logger.warning("waiting for the first rank of this host to have %s", model)
        _await(group, None)
        return resolve(model, revision)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(resolve, model, revision)
        _await(group, work)
        return work.result()


def _await(group: Group, work: Future[Path] | None) -> None:
    """Return when the work of every rank is done; the first UsageError of any is raised on all."""
    patience = min(_PATIENCE_S, settings().timeout / 4)  # well before silence is a fault
    while True:
        failure, done = None, work is None
        if work is not None:
            done = bool(wait([work], patience).done)
            if done and (error := work.exception()) is not None:
                if not isinstance(error, UsageError):
                    raise error
                failure = str(error)
        told = group.gather_object({"done": done, "failure": failure})
        first = next((item["failure"] for item in told if item["failure"]), None)
        if first is not None:
            raise UsageError(first)
        if all(item["done"] for item in told):
            return
