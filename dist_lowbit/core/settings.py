"""The settings that come from the environment: one struct, one prefix, read once.

Anything that belongs to a call is an argument of that call; a setting is what an operator wants to change
without touching a program.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from .errors import UsageError

PREFIX = "DIST_LOWBIT_"
# What a setting may be, where it is one of a few words; the first is the default.
CHOICES = {
    "compute": ("int8", "fp32"),
    "decoder": ("auto", "native", "torch", "off"),
    "kv_cache_dtype": ("auto", "fp32", "fp16", "bf16", "int8"),
}


@dataclass(frozen=True)
class Settings:
    """The environment, parsed. Times are in seconds."""

    isa: str = "auto"  # forces one ISA of the compiled kernels: scalar, avx2, ...
    backend: str = "auto"  # collective backend: auto, single, shm, gloo, ...
    compute: str = "int8"  # activations of integer formats: int8 (dynamic, per block) or fp32
    decoder: str = "auto"  # what runs a known family's model: auto, native, torch, or off (Hugging Face's forward)
    kv_cache_dtype: str = "auto"  # of the decoder's cache: auto, fp32, fp16, bf16, int8
    timeout: float = 60.0  # a peer silent for longer than this ends the job
    load_timeout: float = 1800.0  # the same while models load
    log: str = "warning"
    library: str = ""  # path of the compiled kernels, instead of the installed one; "none" for pure torch


def check_choice(name: str, called: str, value: object) -> None:
    """Raise UsageError if `value` is none of CHOICES[name]; the sentence calls it `called`."""
    choices = CHOICES[name]
    if value not in choices:
        sentence = f"{called} is {value!r}; expected {', '.join(choices[:-1])} or {choices[-1]}"
        raise UsageError(sentence, argument=name if called == name else None)


def parse(environ: Mapping[str, str]) -> Settings:
    """Return the settings in `environ`; an unknown name with our prefix or a bad value is a UsageError.

    An empty value is the same as none, as in most programs.
    """
    known = Settings.__dataclass_fields__
    values: dict[str, object] = {}
    for key, text in environ.items():
        if not key.startswith(PREFIX) or not text:
            continue
        name = key[len(PREFIX) :].lower()
        if name.startswith(("test_", "launch_")):  # read by the test-suite and set by the launcher
            continue
        if name not in known:
            names = ", ".join(PREFIX + n.upper() for n in known)
            raise UsageError(f"{key} is no setting; the settings are {names}")
        if isinstance(known[name].default, float):
            try:
                number = float(text)
            except ValueError:
                raise UsageError(f"{key} is {text!r}; expected a number of seconds") from None
            if not 0 < number < math.inf:
                raise UsageError(f"{key} is {text!r}; expected more than 0 seconds, and an end")
            values[name] = number
        else:
            values[name] = text
    for name, choices in CHOICES.items():
        check_choice(name, PREFIX + name.upper(), values.get(name, choices[0]))
    return Settings(**values)  # type: ignore[arg-type]


@cache
def settings() -> Settings:
    """Return this process's settings, read from the environment at the first call."""
    return parse(os.environ)
