"""Tell checkpoints from other directories. Imports neither transformers nor accelerate: the command line asks first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dist_lowbit.checkpoint import is_checkpoint
from dist_lowbit.core.errors import UsageError

# transformers refuses a directory without one of its weight files; this one holds no values.
STUB = "model.safetensors"


# More ranks than any model has heads or units for: a slip of the finger, told before the model is read.
_MOST_FILES = 1024


def expand(path: str | Path) -> Path:
    """Return a path with ~ expanded, where there is such a home."""
    return Path(os.path.expanduser(path))


def require_path(value: Any, caller: str, expected: str, what: str = "the directory") -> str:
    """Return a path, or a hub id, as text; another kind of argument, or an empty one, is a UsageError.

    caller, expected: the call, and what it takes. what: the argument that `value` is.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{caller} takes {expected}, and was given a {type(value).__name__} for {what}")
    path = os.fspath(value)
    if not path:  # which pathlib takes for the current directory
        raise UsageError(f"{caller} takes {expected}, and was given an empty string for {what}")
    return path


def require_checkpoint(path: str | Path) -> Path:
    """Return a path that is a low-bit checkpoint; a model directory or anything else is a UsageError."""
    path = expand(path)
    if not path.is_dir():
        raise UsageError(f"{path} is no directory; expected one written by save_low_bit or dist-lowbit convert")
    if not is_checkpoint(path):
        if any(path.glob("lowbit-*.safetensors")):
            raise UsageError(
                f"{path} holds data files of a low-bit checkpoint, but no lowbit.json: a save was cut off, or the file "
                f"is lost; save or convert anew"
            )
        plain = (path / "config.json").is_file()
        kind = "an ordinary model" if plain else "no model"
        other = ", or load it by from_pretrained(load_in_4bit=True) of dist_lowbit.transformers" if plain else ""
        raise UsageError(
            f"{path} holds {kind}, no low-bit checkpoint (there is no lowbit.json); "
            f"make one with dist-lowbit convert, or with optimize_model and save_low_bit{other}"
        )
    return path


def refuse_target(directory: Path) -> None:
    """Refuse to save into a file, a directory that cannot be written, or one with another model's weights."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{there} is a file; expected a directory to save into")
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        raise UsageError(f"cannot save into {directory}: {there} is not writable")
    if not directory.is_dir() or is_checkpoint(directory):
        return
    foreign = [
        path.name
        for path in sorted(directory.iterdir())
        if path.suffix in (".safetensors", ".bin") and not path.name.startswith("lowbit-") and path.name != STUB
    ]
    stub = directory / STUB
    if stub.is_file() and stub.stat().st_size > 4096:
        foreign.append(STUB)
    if foreign:
        raise UsageError(
            f"{directory} holds another model's weights ({foreign[0]}); choose an empty directory to save into"
        )


def check_conversion(source: Path, directory: Path, tp: int) -> None:
    """Refuse a conversion that cannot work, as far as paths and numbers tell. A hub id is no path yet: it passes."""
    if not isinstance(tp, int) or not 1 <= tp <= _MOST_FILES:
        raise UsageError(f"tp is {tp!r}; expected a number of rank files from 1 to {_MOST_FILES}", argument="tp")
    if is_checkpoint(source):
        raise UsageError(f"{source} is already a low-bit checkpoint; give the original model to convert")
    if source.is_dir() and not (source / "config.json").is_file():
        raise UsageError(f"{source} holds no config.json, so it is no model directory")
    if source.is_dir() and directory.is_dir() and source.samefile(directory):
        raise UsageError(f"{directory} is the model itself; choose another directory for the checkpoint")
    refuse_target(directory)
