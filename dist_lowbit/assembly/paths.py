"""Tell checkpoints from other directories. Imports neither transformers nor accelerate: the command line asks first."""

from __future__ import annotations

from pathlib import Path

from dist_lowbit.checkpoint import is_checkpoint
from dist_lowbit.core.errors import UsageError


def require_checkpoint(path: str | Path) -> Path:
    """Return a path that is a low-bit checkpoint; a model directory or anything else is a UsageError."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UsageError(f"{path} is no directory; expected one written by save_low_bit or dist-lowbit convert")
    if not is_checkpoint(path):
        kind = "an ordinary model" if (path / "config.json").is_file() else "no model"
        raise UsageError(
            f"{path} holds {kind}, no low-bit checkpoint (there is no lowbit.json); "
            f"make one with dist-lowbit convert, or with optimize_model and save_low_bit"
        )
    return path
