"""Put the fused decoder in the place of a built model's base model."""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_lowbit.comm import Group
from dist_lowbit.core.errors import PlanError, UsageError
from dist_lowbit.core.log import logger
from dist_lowbit.decoder.backbone import FusedBackbone
from dist_lowbit.decoder.build_program import build_program
from dist_lowbit.decoder.native import NativeDecoder
from dist_lowbit.decoder.program import Program
from dist_lowbit.decoder.step import Executor
from dist_lowbit.decoder.torch_decoder import TorchDecoder
from dist_lowbit.ops import limit_torch

from .bare import BareForCausalLM
from .mode import Mode
from .target import Target

_EXECUTORS: dict[str, Any] = {"native": NativeDecoder, "torch": TorchDecoder}  # in order of preference


def choose_executor(program: Program, mode: Mode, device: str = "cpu") -> Executor:
    """Return the first executor that takes a program, or the one that the mode names.

    A UsageError has every reason where none does. Falling back from the compiled one is said.
    """
    names = list(_EXECUTORS) if mode.decoder == "auto" else [mode.decoder]
    reasons: list[str] = []
    for name in names:
        why = _EXECUTORS[name].why_not(program, mode.cache_name, device)
        if why is None:
            for refusal in reasons:
                logger.warning("the decoder runs on %s operations: %s", name, refusal)
            chosen: Executor = _EXECUTORS[name](program)
            return chosen
        reasons.append(f"{name}: {why}")
    raise UsageError("no decoder takes this model: " + "; ".join(reasons))


def use_decoder(model: nn.Module, target: Target, group: Group, mode: Mode) -> None:
    """Swap the base model of a known family for the fused decoder; its modules keep their names.

    A model that the family's data does not describe in full keeps Hugging Face's forward, and a line says why; where
    that forward cannot run, or a decoder was asked for by name, the reason is the error.
    """
    assert target.family is not None
    needed = _no_fallback(model, target)
    try:
        program = build_program(model, target.family, target.plan, group)
    except PlanError as error:
        if mode.decoder != "auto" or needed is not None:
            raise
        logger.warning("Hugging Face's forward runs this model, slower than the decoder: %s", error)
        return
    parent, _, leaf = target.family.names.base.rpartition(".")
    executor = choose_executor(program, mode)
    if executor.name == "native":
        limit_torch()  # both pools spin after their loops: two full ones on the same cores slow each other
    original = model.get_submodule(target.family.names.base)
    setattr(model.get_submodule(parent), leaf, FusedBackbone(original, program, executor, mode.cache_name, needed))


def _no_fallback(model: nn.Module, target: Target) -> str | None:
    """Return why Hugging Face's own forward cannot run a built model, None where it can."""
    assert target.family is not None
    if isinstance(model, BareForCausalLM):
        return f"transformers has none for {target.family.model_type}"
    if target.plan.tp > 1 and target.family.own_decoder:
        return f"that of {target.family.model_type} cannot run on a part of the heads"
    return None
