"""How a model runs once it is put together: one value that every way to a model takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.settings import CHOICES, check_choice, settings
from dist_lowbit.formats import cast_name
from dist_lowbit.ops import usable_device


@dataclass(frozen=True)
class Mode:
    """How to run.

    dtype: of activations and of every tensor that is not quantized. compute: what integer formats' activations are
    rounded to, "int8" or "fp32". decoder: "native" (compiled), "torch" (torch operations, any device), "auto" (the
    first that takes the model), "off" (Hugging Face's forward over low-bit Linears). kv_cache_dtype: of the decoder's
    cache, fp32, fp16, bf16 or int8; "auto" is the one of activations. device: where weights and cache lie and steps
    run: "cpu", or one of torch's, such as "cuda" or "xpu:1", which the decoder of torch operations alone runs on.
    dtype_open: a checkpoint's own dtype takes the place of `dtype`, which nobody has chosen.
    """

    dtype: torch.dtype = torch.float32
    compute: str = "int8"
    decoder: str = "auto"
    kv_cache_dtype: str = "auto"
    device: str = "cpu"
    dtype_open: bool = False

    def __post_init__(self) -> None:
        for name in CHOICES:
            check_choice(name, name, getattr(self, name))
        if self.device_type != "cpu" and self.decoder not in ("auto", "torch"):
            what = "the compiled decoder" if self.decoder == "native" else "Hugging Face's forward over low-bit Linears"
            raise UsageError(
                f"device is {self.device!r}, and {what} runs on the cpu; take the decoder 'torch', with optimize_llm "
                "on, or leave the device out",
                argument="device",
            )

    @property
    def optimize_llm(self) -> bool:
        """Return whether the project's own steps are used."""
        return self.decoder != "off"

    @property
    def device_type(self) -> str:
        """Return the kind of device: cpu, cuda or xpu; a UsageError where torch lacks the device."""
        return usable_device(self.device).type

    @property
    def cache_name(self) -> str:
        """Return the dtype of the cache by name."""
        return cast_name(self.dtype) if self.kv_cache_dtype == "auto" else self.kv_cache_dtype


def as_dtype(value: Any) -> torch.dtype:
    """Return a dtype of activations from a dtype, its name, or None / "auto" (fp32, the one all CPUs are fast at)."""
    if value is None or value == "auto":
        return torch.float32
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"torch_dtype is {value!r}; expected float32, float16, bfloat16 or auto")
    assert isinstance(found, torch.dtype)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as config.json and lowbit.json write it; as_dtype reads it."""
    return str(dtype).removeprefix("torch.")


def mode_here(
    torch_dtype: Any = None,
    compute: str | None = None,
    decoder: str | None = None,
    kv_cache_dtype: str | None = None,
    device: str | torch.device | None = None,
) -> Mode:
    """Return a mode with what is not given filled in from the settings."""
    own = settings()
    return Mode(
        as_dtype(torch_dtype),
        compute or own.compute,
        decoder or own.decoder,
        kv_cache_dtype or own.kv_cache_dtype,
        "cpu" if device is None else str(device),
        dtype_open=torch_dtype in (None, "auto"),
    )


def switched(mode: Mode, optimize_llm: bool) -> Mode:
    """Return a mode with the decoder off unless `optimize_llm`."""
    return mode if optimize_llm else replace(mode, decoder="off")
