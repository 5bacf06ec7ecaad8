"""Low-bit LLM inference, tensor-parallel over CPU sockets.

Public names load on first use, so that the launcher and `--help` start without torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from .core.after_import import after_import
from .core.version import __version__

_FACES = {
    "optimize_model": "dist_lowbit.optimize",
    "load_low_bit": "dist_lowbit.optimize",
    "low_memory_init": "dist_lowbit.optimize",
    "convert": "dist_lowbit.optimize",
    "init_group": "dist_lowbit.comm",
    "init_inference": "dist_lowbit.optimize",
    "BenchmarkWrapper": "dist_lowbit.engine.benchmark",
    "optimize_transformers": "dist_lowbit.llm",
}

__all__ = ["__version__", *_FACES]


_MODULES = ("llm",)  # faces that are reached as attributes


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"dist_lowbit.{name}")
    if name not in _FACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


def _register() -> None:
    importlib.import_module("dist_lowbit.assembly.hf_quantizer").register()


# transformers' from_pretrained shall know our directories, whichever of the two is imported first.
after_import("transformers.modeling_utils", _register)
