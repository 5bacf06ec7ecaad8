"""Hugging Face's Auto classes with low-bit loading and tensor parallelism.

from dist_lowbit.transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(path, load_in_4bit=True, tensor_parallel="auto")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import nn

from dist_lowbit.assembly.hf_quantizer import register
from dist_lowbit.assembly.hub import resolve_together
from dist_lowbit.assembly.load import load_low_bit
from dist_lowbit.assembly.mode import switched
from dist_lowbit.assembly.optimize import OPTIONS, mode_options, read_options
from dist_lowbit.assembly.paths import require_checkpoint, require_path
from dist_lowbit.assembly.ranks import join_ranks
from dist_lowbit.assembly.skeleton import empty_model, read_config
from dist_lowbit.assembly.source import from_source
from dist_lowbit.assembly.together import together
from dist_lowbit.checkpoint import is_checkpoint
from dist_lowbit.comm import Group
from dist_lowbit.core.errors import UsageError
from dist_lowbit.formats import cast_name, lookup
from dist_lowbit.quantize import Recipe

register()

# Names that other calls and other libraries use for what these classes call otherwise.
_OTHER_NAMES = {
    "optimize_llm": "optimize_model",
    "quantization_group_size": "group_size",
    "load_in_8bit": "load_in_low_bit='sym_int8'",
}


class _LowBitAuto:
    """One Auto class; `hf` is transformers' own."""

    hf: ClassVar[Any]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        load_in_4bit: bool = False,
        load_in_low_bit: str | None = None,
        tensor_parallel: int | str | Group | None = None,
        optimize_model: bool = True,
        modules_to_not_convert: Sequence[str] | None = None,
        cpu_embedding: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> nn.Module:
        """Load a model in a low-bit format: quantized on the way from its files, or as a checkpoint of ours.

        load_in_4bit: the same as load_in_low_bit="sym_int4". tensor_parallel: "auto" joins the ranks that this
        process was started with, a number also checks how many they are, a Group is used as it is, None is one
        rank; all ranks must call together. cpu_embedding: accepted; embeddings are on the CPU already. Without a
        format, and with no ranks to split over, Hugging Face's own from_pretrained answers, and keywords that go with
        a format are a UsageError. Further keywords:
        torch_dtype, group_size, compute, decoder, kv_cache_dtype, device (or device_map, of one device for all);
        optimize_model=False keeps Hugging Face's forward.
        """
        _check_switches(load_in_4bit=load_in_4bit, optimize_model=optimize_model)
        if load_in_4bit and load_in_low_bit not in (None, "sym_int4"):
            raise UsageError(f"load_in_4bit means sym_int4, but load_in_low_bit is {load_in_low_bit!r}; give one")
        low_bit = "sym_int4" if load_in_4bit else load_in_low_bit
        if low_bit is not None:
            lookup(low_bit)  # a wrong name is told before anything is read
        name = require_path(pretrained_model_name_or_path, f"{cls.__name__}.from_pretrained", "a directory or hub id")
        _refuse_other_names(kwargs, cls.__name__)
        group, local_rank = join_ranks(tensor_parallel, _renamed(kwargs).get("device"))
        directory = resolve_together(name, group, local_rank, revision)
        if is_checkpoint(directory):
            if low_bit is not None:
                raise UsageError(
                    f"{directory} is a low-bit checkpoint already; drop load_in_low_bit, or give the original model"
                )
            if modules_to_not_convert:
                raise UsageError(
                    "modules_to_not_convert goes with quantizing; this checkpoint says how it was quantized"
                )
            return cls._load(directory, group, optimize_model, trust_remote_code, kwargs)
        if low_bit is None and group.size == 1:
            _refuse_ours(kwargs | {"modules_to_not_convert": modules_to_not_convert or None}, cls.__name__)
            kwargs = {name: value for name, value in kwargs.items() if name not in _ONLY_OURS}
            kwargs |= {"trust_remote_code": trust_remote_code}
            model: nn.Module = cls.hf.from_pretrained(str(directory), **kwargs)
            return model
        named = _keywords(cls.from_pretrained)
        group_size, mode = read_options(_renamed(kwargs), f"{cls.__name__}.from_pretrained", named=named)
        recipe = Recipe(low_bit or _own_format(directory), group_size, modules_to_not_convert or ())
        return from_source(
            cls.hf,
            directory,
            recipe,
            group,
            switched(mode, optimize_model),
            trust_remote_code=trust_remote_code,
        )

    @classmethod
    def load_low_bit(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        tensor_parallel: int | str | Group | None = None,
        optimize_model: bool = True,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> nn.Module:
        """Load a directory written by save_low_bit or convert; anything else is a UsageError. See from_pretrained."""
        _check_switches(optimize_model=optimize_model)
        name = require_path(pretrained_model_name_or_path, f"{cls.__name__}.load_low_bit", "a directory or hub id")
        _refuse_other_names(kwargs, cls.__name__)
        group, local_rank = join_ranks(tensor_parallel, _renamed(kwargs).get("device"))
        directory = resolve_together(name, group, local_rank)
        return cls._load(require_checkpoint(directory), group, optimize_model, trust_remote_code, kwargs)

    @classmethod
    def _load(
        cls, directory: Path, group: Group, optimize_llm: bool, trust_remote_code: bool, kwargs: dict[str, Any]
    ) -> nn.Module:
        named = _keywords(cls.load_low_bit)
        mode = mode_options(_renamed(kwargs), f"{cls.__name__} with a low-bit checkpoint", named)
        with together(group):
            config = read_config(directory, trust_remote_code)
            model = empty_model(cls.hf, config, directory, trust_remote_code)
        return load_low_bit(model, directory, group=group, mode=switched(mode, optimize_llm))


# What Hugging Face's own from_pretrained has no use for.
_ONLY_OURS = (*(name for name in OPTIONS if name != "torch_dtype"), "modules_to_not_convert")


# Names of transformers that are read as one of ours, or change nothing here (see _renamed).
_HARMLESS = ("low_cpu_mem_usage", "use_cache")
_THEIRS = ("dtype", "device_map", *_HARMLESS)


def _keywords(method: Callable[..., Any]) -> tuple[str, ...]:
    """Return the keywords that a method names, and those of transformers beside them."""
    parameters = inspect.signature(method).parameters.values()
    return (*(each.name for each in parameters if each.kind is each.KEYWORD_ONLY), *_THEIRS)


def _check_switches(**switches: Any) -> None:
    """Raise UsageError for a switch that is neither on, off nor None: every text but the empty one counts as true."""
    for name, value in switches.items():
        if value is not None and not isinstance(value, bool):
            raise UsageError(f"{name} is {value!r}; expected True or False")


def _refuse_other_names(kwargs: dict[str, Any], caller: str) -> None:
    """Raise UsageError for a keyword that has another name here."""
    if not kwargs.get("load_in_8bit", True):  # asks for nothing
        del kwargs["load_in_8bit"]
    for name in _OTHER_NAMES.keys() & kwargs.keys():
        raise UsageError(f"{caller} has no argument {name!r}; write {_OTHER_NAMES[name]} instead")


def _refuse_ours(kwargs: dict[str, Any], caller: str) -> None:
    """Raise UsageError for keywords that mean nothing where Hugging Face's own from_pretrained answers."""
    given = [name for name in _ONLY_OURS if kwargs.get(name) is not None]
    if given:
        raise UsageError(
            f"{caller}.from_pretrained was given {given[0]}, which needs a low-bit format, and neither load_in_low_bit "
            f"nor load_in_4bit says one; add load_in_low_bit='sym_int4' or the like, or leave {given[0]} out"
        )


def _renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments with those of transformers that say the same, or nothing here, taken out."""
    result = dict(kwargs)
    if "dtype" in result:  # transformers' newer name
        result["torch_dtype"] = result.pop("dtype")
    for harmless in _HARMLESS:
        result.pop(harmless, None)
    device_map = result.pop("device_map", None)
    if device_map is not None and device_map != "auto":
        if isinstance(device_map, dict) and set(device_map) == {""}:
            device_map = device_map[""]
        if not isinstance(device_map, (str, torch.device)):
            raise UsageError(f"device_map is {device_map!r}; expected auto, or one device for the whole model")
        result.setdefault("device", device_map)
    return result


def _own_format(directory: Path) -> str:
    """Return the cast that keeps the dtype a model was stored in."""
    return cast_name(getattr(read_config(directory), "dtype", None))


def _auto(name: str) -> type[_LowBitAuto]:
    return type(name, (_LowBitAuto,), {"hf": getattr(transformers, name), "__module__": __name__})


AutoModel = _auto("AutoModel")
AutoModelForCausalLM = _auto("AutoModelForCausalLM")
AutoModelForSeq2SeqLM = _auto("AutoModelForSeq2SeqLM")
AutoModelForSpeechSeq2Seq = _auto("AutoModelForSpeechSeq2Seq")
AutoModelForSequenceClassification = _auto("AutoModelForSequenceClassification")
AutoModelForTokenClassification = _auto("AutoModelForTokenClassification")
AutoModelForMaskedLM = _auto("AutoModelForMaskedLM")
AutoModelForQuestionAnswering = _auto("AutoModelForQuestionAnswering")
AutoModelForNextSentencePrediction = _auto("AutoModelForNextSentencePrediction")
AutoModelForMultipleChoice = _auto("AutoModelForMultipleChoice")
