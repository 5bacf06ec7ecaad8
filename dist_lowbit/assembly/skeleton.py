"""Models without weights: parameters on the meta device, buffers real."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedModel

from dist_lowbit.core.errors import UsageError

from .bare import register_bare


def empty_model(cls: Any, config: Any, directory: str | Path, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """Build a model of a Hugging Face class (or Auto class) with its parameters on meta.

    Only an Auto class looks for Python code that comes with the model. Its
    generation config is read from `directory` where there is one, and its config remembers the directory.
    Cost: no weight is allocated.
    """
    own = isinstance(cls, type) and issubclass(cls, PreTrainedModel)
    create = getattr(cls, "_from_config" if own else "from_config")
    if trust_remote_code and not own:
        kwargs["trust_remote_code"] = True
    try:
        with init_empty_weights(include_buffers=False):
            model = create(config, dtype=torch.float32, **kwargs)
    except (ArithmeticError, LookupError, RuntimeError) as error:  # heads or sizes of 0 or less, an unknown rope
        raise UsageError(
            f"cannot build the model that {Path(directory) / 'config.json'} describes: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; correct its values"
        ) from error
    model.config._name_or_path = str(directory)
    if (Path(directory) / "generation_config.json").is_file() and getattr(model, "can_generate", lambda: False)():
        model.generation_config = GenerationConfig.from_pretrained(str(directory))
    return model


def read_config(directory: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the Hugging Face config of a directory, without any note of a quantization."""
    register_bare()
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise UsageError(f"{directory} holds no config.json, so it is no model directory")
    values = _check_code(directory, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    except (ValueError, ArithmeticError, OSError, LookupError, TypeError, StrictDataclassError) as error:
        kind = values.get("model_type")
        if "AutoConfig" not in (values.get("auto_map") or {}) and str(kind) not in CONFIG_MAPPING:
            raise UsageError(
                f"{directory / 'config.json'} says {'no model_type' if kind is None else f'model_type {kind!r}'}; "
                f"expected one that transformers {transformers.__version__} knows, such as llama; correct it, or "
                "install a transformers that knows this model"
            ) from error
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UsageError(f"cannot read the config of {directory}: {text}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _check_code(directory: Path, trusted: bool) -> dict[str, Any]:
    """Return what config.json says; code of a model's own that is not trusted is a UsageError.

    transformers would ask at the terminal.
    """
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{directory / 'config.json'} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{directory / 'config.json'} holds a {type(values).__name__}; expected an object")
    own = "AutoConfig" in (values.get("auto_map") or {}) and values.get("model_type") not in CONFIG_MAPPING
    if own and not trusted:
        raise UsageError(
            f"{directory} comes with Python code of its own; read it, then allow it with --trust-remote-code "
            f"(trust_remote_code=True)"
        )
    return values


def class_of(config: Any) -> Any:
    """Return the transformers class that a config names first, or the Auto class for causal models."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


@contextlib.contextmanager
def low_memory_init() -> Iterator[None]:
    """Within this context, `from_pretrained` of any Hugging Face class returns a model without weights.

    Its parameters are on meta, whatever weight files the directory has or lacks; load_low_bit fills them. The one
    place where a method of another library is replaced: for the time of the context, nestable, and put back also
    when an exception leaves it. Not for several threads at once.
    """
    original = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, name_or_path: Any, *args: Any, **kwargs: Any) -> nn.Module:
        directory = _local(name_or_path, kwargs)
        config = kwargs.pop("config", None)
        if config is None:
            config = read_config(directory, bool(kwargs.get("trust_remote_code")))
        elif hasattr(config, "quantization_config"):
            del config.quantization_config
        attention = {k: kwargs[k] for k in ("attn_implementation",) if kwargs.get(k) is not None}
        model: nn.Module = empty_model(cls, config, directory, **attention)
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original


def _local(name_or_path: Any, kwargs: dict[str, Any]) -> Path:
    from .hub import resolve

    return resolve(str(name_or_path), revision=kwargs.get("revision"), files="config")
