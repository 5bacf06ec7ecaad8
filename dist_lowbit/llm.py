"""The `ipex.llm` of the ancestor: `optimize(model, dtype=..., quantization_config=...)`, same arguments.

    import dist_lowbit as dlb
    model = dlb.llm.optimize(model.eval(), dtype=torch.bfloat16, quantization_config="sym_int4", inplace=True)

Nothing falls back in silence: what cannot be done is a UsageError.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_lowbit.assembly.mode import mode_here
from dist_lowbit.assembly.optimize import optimize as _optimize
from dist_lowbit.comm import Group
from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.log import logger
from dist_lowbit.formats import cast_name
from dist_lowbit.quantize import Recipe

__all__ = ["optimize", "optimize_transformers"]


def optimize(
    model: nn.Module,
    optimizer: Any = None,
    dtype: torch.dtype = torch.float32,
    inplace: bool = False,
    device: str = "cpu",
    quantization_config: Any = None,
    qconfig_summary_file: Any = None,
    low_precision_checkpoint: Any = None,
    sample_inputs: Any = None,
    deployment_mode: bool = True,
    cache_weight_for_large_batch: bool = False,
    *,
    group: Group | None = None,
) -> nn.Module:
    """Return a model that runs on the fused decoder, its Linears packed.

    model: a Hugging Face causal language model in eval mode; other modules get low-bit Linears only, and a line says
    so. dtype: float32, bfloat16 or float16, of weights that are not quantized, of activations outside the decoder and
    of the cache. inplace: change `model` itself, else a copy (twice the memory for a while). quantization_config: None
    (weights in `dtype`), a format's name such as "sym_int4", a Recipe, or a mapping with "low_bit" and optionally
    "group_size" and "modules_to_not_convert". group: the ranks to split over (None: one); all must call together.

    sample_inputs and deployment_mode are accepted: there is nothing to trace. cache_weight_for_large_batch too: one
    layout serves prefill and decode. optimizer, qconfig_summary_file, low_precision_checkpoint and a model in training
    mode are a UsageError, and so is DeepSpeed's engine: give its `module`, which is taken over with its group. device:
    where the result runs: "cpu", or one of torch's ("cuda", "xpu:1"), for models of known families, on the decoder of
    torch operations; `model` itself lies on the cpu.
    """
    _refuse(model, optimizer, qconfig_summary_file, low_precision_checkpoint)
    if cache_weight_for_large_batch:
        logger.info("cache_weight_for_large_batch needs no second copy here: one layout serves prefill and decode")
    mode = mode_here(dtype, device=device)
    recipe = _recipe(quantization_config, mode.dtype)
    return _optimize(model if inplace else copy.deepcopy(model), recipe, group, mode)


def _refuse(model: Any, optimizer: Any, summary: Any, checkpoint: Any) -> None:
    """Raise UsageError for what cannot be honoured."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("optimize takes the eager model; this one is traced already")
    if not isinstance(model, nn.Module):
        raise UsageError(f"optimize takes an nn.Module; this is a {type(model).__name__}")
    if type(model).__module__.startswith("deepspeed.") and isinstance(getattr(model, "module", None), nn.Module):
        raise UsageError(
            f"this is DeepSpeed's {type(model).__name__}, not the model inside it; give optimize engine.module"
        )
    if optimizer is not None:
        raise UsageError("optimize is for inference; an optimizer was given, and low-bit weights cannot be trained")
    if model.training:
        raise UsageError("this model is in training mode; call model.eval() before optimize")
    if summary is not None:
        raise UsageError(
            "qconfig_summary_file tells static activation ranges; activations are quantized dynamically here"
        )
    if checkpoint is not None:
        raise UsageError(
            "low_precision_checkpoint is not read here; convert the original weights with quantization_config"
        )


def _recipe(config: Any, dtype: torch.dtype) -> Recipe:
    """Return the recipe that a quantization_config asks for."""
    if config is None:
        return Recipe(cast_name(dtype))
    if isinstance(config, Recipe):
        return config
    if isinstance(config, str):
        return Recipe(config)
    if isinstance(config, Mapping) and "low_bit" in config:
        known = {"low_bit", "group_size", "modules_to_not_convert"}
        strange = sorted(config.keys() - known)
        if strange:
            raise UsageError(f"quantization_config has {strange[0]!r}; expected {', '.join(sorted(known))}")
        return Recipe(config["low_bit"], config.get("group_size"), config.get("modules_to_not_convert") or ())
    raise UsageError(
        f"quantization_config is {type(config).__name__}; expected a format's name, a Recipe, or a mapping with low_bit"
    )


optimize_transformers = optimize  # the ancestor's older name
