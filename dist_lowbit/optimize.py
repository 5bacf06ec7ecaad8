"""The one-line API: optimize_model, save_low_bit, low_memory_init, load_low_bit, convert, init_inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dist_lowbit.assembly import convert as _convert
from dist_lowbit.assembly import load as _load
from dist_lowbit.assembly import optimize as _optimize
from dist_lowbit.assembly.hf_quantizer import register
from dist_lowbit.assembly.hub import resolve
from dist_lowbit.assembly.inference import InferenceEngine, split_model
from dist_lowbit.assembly.mode import switched
from dist_lowbit.assembly.paths import require_path
from dist_lowbit.assembly.skeleton import low_memory_init
from dist_lowbit.checkpoint import is_checkpoint as is_low_bit
from dist_lowbit.comm import Group
from dist_lowbit.core.errors import UsageError
from dist_lowbit.quantize import Recipe

__all__ = ["convert", "init_inference", "is_low_bit", "load_low_bit", "low_memory_init", "optimize_model"]

register()


def optimize_model(
    model: nn.Module,
    low_bit: str = "sym_int4",
    optimize_llm: bool = True,
    modules_to_not_convert: Sequence[str] | None = None,
    cpu_embedding: bool = False,
    lightweight_bmm: bool = False,
    *,
    group: Group | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Quantize every Linear of any PyTorch model in place, and return the model.

    model: on the CPU, fp32, fp16 or bf16. low_bit: a format's name (docs/formats.md). optimize_llm: run models of a
    known family on the fused decoder (False: Hugging Face's forward over low-bit Linears). Either way torch's own
    operations get one thread of the process: the cores are the kernels'. modules_to_not_convert:
    substrings of module names, or globs of the whole dotted name where they contain * ? or [ ("*.mlp.*").
    cpu_embedding: accepted; on the CPU embeddings are there already. lightweight_bmm: accepted and without effect (it
    switched a GPU kernel of an ancestor). group: the ranks to split the model over (None: one); all ranks must call
    together.

    Further keywords: torch_dtype (of activations and unquantized tensors, default float32; the decoder's logits are
    float32 in any case), group_size, compute
    ("int8" or "fp32"), decoder ("auto", "native", "torch", "off"), kv_cache_dtype ("auto", "fp32", "fp16", "bf16",
    "int8"), device ("cpu"; "cuda", "xpu:1" and the like for known families, on the decoder of torch operations: the
    result lies there). Others are a UsageError. The model gains `save_low_bit(directory)`. Unknown formats and NaN or
    Inf weights are a FormatError. Cost: one pass over the weights; peak memory the model plus one matrix.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"optimize_model takes an nn.Module; this is a {type(model).__name__}")
    group_size, mode = _optimize.read_options(kwargs, "optimize_model")
    recipe = Recipe(low_bit, group_size, modules_to_not_convert or ())
    return _optimize.optimize(model, recipe, group, switched(mode, optimize_llm))


def load_low_bit(
    model: nn.Module, model_path: str | Path | None = None, *, group: Group | None = None, **kwargs: Any
) -> nn.Module:
    """Load a directory of save_low_bit into a model of the same architecture, and return it.

    model: from low_memory_init, or loaded the ordinary way. group: the ranks to split over, whatever number of ranks
    saved; all must call together. Keywords: torch_dtype (default: that of the saved model), compute, decoder,
    kv_cache_dtype, device, optimize_llm (see optimize_model). Damage or a directory of another model is a
    CheckpointError; a directory that is no low-bit checkpoint a UsageError.
    """
    optimize_llm = kwargs.pop("optimize_llm", True)
    mode = switched(_optimize.mode_options(kwargs, "load_low_bit"), optimize_llm)
    return _load.load_low_bit(model, model_path, group=group, mode=mode)


def convert(
    model: str | Path,
    directory: str | Path,
    low_bit: str = "sym_int4",
    tp: int = 1,
    *,
    group_size: int | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Convert model files (a directory or a hub id) to a low-bit checkpoint of `tp` rank files.

    Never holds the whole model: peak memory is a few tensors. The result loads at any number of ranks.
    """
    target = require_path(directory, "convert", "a directory to write")
    recipe = Recipe(low_bit, group_size, modules_to_not_convert or ())
    source = resolve(str(model), revision)
    _convert.convert(source, Path(target).expanduser(), recipe, tp, trust_remote_code=trust_remote_code)


# Arguments of DeepSpeed's init_inference that ask for what is so anyway, with the values that do.
_GIVEN = {
    "replace_with_kernel_inject": (False,),
    "kernel_inject": (False,),
    "enable_cuda_graph": (False,),
    "replace_method": ("auto", None),
    "keep_module_on_host": (False, True),
    "return_tuple": (True, False),
    "set_empty_params": (True, False),
    "injection_policy": (None,),
    "ep_size": (1,),
    "moe": (False,),
}


def init_inference(
    model: nn.Module,
    config: Mapping[str, Any] | None = None,
    *,
    low_bit: str | None = None,
    tensor_parallel: Mapping[str, Any] | int | str | Group | None = None,
    dtype: Any = None,
    checkpoint: str | Path | Mapping[str, Any] | None = None,
    base_dir: str | None = None,
    save_mp_checkpoint_path: str | Path | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    **kwargs: Any,
) -> InferenceEngine:
    """Split a model over the ranks of this job and quantize it, as DeepSpeed's call of this name splits one.

    model: live on the CPU, or on meta with `checkpoint`. config: a dict of the other arguments, which win over it.
    low_bit: a format's name (None: the weights keep their dtype). tensor_parallel: {"tp_size": N}, N must be the ranks
    that were started; None joins them all; {"tp_group": group} or a Group is used as it is. dtype: of activations.
    checkpoint: a directory or hub id of model files or of a low-bit checkpoint, or DeepSpeed's description of files;
    each rank reads its own part only. save_mp_checkpoint_path: save_low_bit there; it loads at any number of ranks.
    mp_size, tp, max_out_tokens, min_out_tokens and what optimize_model takes (group_size, compute, decoder,
    kv_cache_dtype, device) are accepted; another name, or a value that asks for CUDA kernels, is a UsageError.

    Returns an engine whose `module` is the model, in place. All ranks must call together.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"init_inference takes an nn.Module; this is a {type(model).__name__}")
    if config is not None:
        own = {"low_bit": low_bit, "tensor_parallel": tensor_parallel, "dtype": dtype, "checkpoint": checkpoint}
        own |= {"base_dir": base_dir, "save_mp_checkpoint_path": save_mp_checkpoint_path}
        own |= {"modules_to_not_convert": modules_to_not_convert, **kwargs}
        return init_inference(model, **{**config, **{name: value for name, value in own.items() if value is not None}})
    for name, values in _GIVEN.items():
        if kwargs.pop(name, values[0]) not in values:
            raise UsageError(f"init_inference runs no injected kernels; {name} must be {values[0]!r}, or left out")
    for name in ("max_out_tokens", "max_tokens", "min_out_tokens", "min_tokens"):
        kwargs.pop(name, None)  # sizes of a buffer that is not needed here
    for name in ("mp_size", "tp"):
        tensor_parallel = kwargs.pop(name, None) or tensor_parallel
    if dtype is not None:
        kwargs["torch_dtype"] = dtype
    group_size, mode = _optimize.read_options(kwargs, "init_inference")
    return split_model(
        model,
        tensor_parallel,
        low_bit,
        group_size,
        mode,
        keep=tuple(modules_to_not_convert or ()),
        checkpoint=checkpoint,
        base_dir=base_dir,
        save_path=save_mp_checkpoint_path,
    )
