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

from .bare import BareForCausalLM
from .mode import Mode
from .target import Target, family_why_not

_EXECUTORS: dict[str, Any] = {"native": NativeDecoder, "torch": TorchDecoder}  # in order of preference


def choose_executor(program: Program, mode: Mode) -> Executor:
    """Return the first executor that takes a program, or the one that the mode names.

    A UsageError has every reason where none does. Falling back from the compiled one is said, where it could be there.
    """
    kind = mode.device_type
    names = list(_EXECUTORS) if mode.decoder == "auto" else [mode.decoder]
    reasons: list[str] = []
    for name in names:
        why = _EXECUTORS[name].why_not(program, mode.cache_name, kind)
        if why is None:
            for refusal in reasons if kind == "cpu" else ():
                logger.warning("the decoder runs on %s operations: %s", name, refusal)
            chosen: Executor = _EXECUTORS[name](program, mode.device)
            return chosen
        reasons.append(f"{name}: {why}")
    raise UsageError("no decoder takes this model: " + "; ".join(reasons))


def use_decoder(model: nn.Module, target: Target, group: Group, mode: Mode) -> bool:
    """Swap the base model of a known family for the fused decoder; its modules keep their names. Return whether it was.

    A model that the family's data does not describe in full keeps Hugging Face's forward, and a line says why; where
    that forward cannot run, or a decoder was asked for by name, the reason is the error.
    """
    assert target.family is not None
    needed = _no_fallback(model, target)
    try:
        program = build_program(model, target.family, target.plan, group)
    except PlanError as error:
        if mode.decoder != "auto" or needed is not None or mode.device_type != "cpu":
            raise
        logger.warning("Hugging Face's forward runs this model, slower than the decoder: %s", error)
        return False
    parent, _, leaf = target.family.names.base.rpartition(".")
    check_group(group, mode)
    executor = choose_executor(program, mode)
    original = model.get_submodule(target.family.names.base)
    setattr(model.get_submodule(parent), leaf, FusedBackbone(original, executor, mode.cache_name, needed))
    if mode.device_type != "cpu":
        # The rest of the model, for its head, for generate() and for what Hugging Face's forward still does.
        model.get_submodule(
            f"{target.family.names.base}.{target.family.names.embed}"
        ).weight = executor.program.embed.weight
        model.to(executor.device)
    return True


def check_group(group: Group, mode: Mode) -> None:
    """Refuse a group that does not add tensors where they are to be."""
    kind = mode.device_type
    if group.size > 1 and kind not in group.device_types:
        raise UsageError(
            f"device is {mode.device!r}, and the group {group.name} adds tensors on {', '.join(group.device_types)} "
            "alone; set DIST_LOWBIT_BACKEND to nccl for cuda, to xccl for xpu",
            argument="device",
        )


def require_decoder(model: nn.Module, target: Target, mode: Mode) -> None:
    """Refuse what the decoder alone honours for a model that it does not run; say so of an unknown family."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if target.family is None and mode.decoder in ("native", "torch"):
        raise UsageError(
            f"decoder is {mode.decoder!r}, and {family_why_not(model)}; leave it, or DIST_LOWBIT_DECODER, out",
            argument="decoder",
        )
    if mode.kv_cache_dtype != "auto" and (target.family is None or not mode.optimize_llm):
        raise UsageError(
            f"kv_cache_dtype is {mode.kv_cache_dtype!r}, and Hugging Face's forward, which runs this model, has "
            "a cache of its own; leave it, or DIST_LOWBIT_KV_CACHE_DTYPE, out",
            argument="kv_cache_dtype",
        )
    if target.family is None and kind is not None and mode.optimize_llm:
        logger.warning("%s: Hugging Face's forward runs it, over low-bit Linears", family_why_not(model))
    if target.family is None and mode.device_type != "cpu":
        raise UsageError(
            f"device is {mode.device!r}, where causal language models of known families run alone, and "
            f"{family_why_not(model)}; leave it out",
            argument="device",
        )


def _no_fallback(model: nn.Module, target: Target) -> str | None:
    """Return why Hugging Face's own forward cannot run a built model, None where it can."""
    assert target.family is not None
    if isinstance(model, BareForCausalLM):
        return f"transformers has none for {target.family.model_type}"
    if target.plan.tp > 1 and target.family.own_decoder:
        return f"that of {target.family.model_type} cannot run on a part of the heads"
    return None
