"""Models of families that transformers has no code for: from config.json and the tensors alone, no remote code.

A family that says so (models.Family.bare) is entered in Hugging Face's Auto classes under its own model_type. Its model
is a tree of modules made from the names and shapes of the files' tensors; only the fused decoder gives it a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from dist_lowbit.checkpoint import CheckpointReader, TensorSource, is_checkpoint
from dist_lowbit.core.errors import UsageError
from dist_lowbit.models import FAMILIES, Family, family_of

Shapes = Mapping[str, tuple[int, ...]]


class BareConfig(PreTrainedConfig):  # type: ignore[misc]
    """The values of a config.json, with the usual names for what the family calls otherwise."""


class BareBase(nn.Module):
    """The part that the decoder stands in for. It has no forward of its own."""

    def __init__(self, config: BareConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: transformers has no forward for this family."""
        kind = self.config.model_type
        raise UsageError(f"a {kind} model runs on the fused decoder only; leave the decoder (and optimize_llm) on")


class BareForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model of a family that transformers lacks: base (swapped for the decoder), head, generate()."""

    config_class = BareConfig
    _supports_cache_class = True

    def __init__(self, config: BareConfig) -> None:
        super().__init__(config)
        family = _family(config)
        self.base_model_prefix = family.names.base.partition(".")[0]
        _plant(self, config, family, tensor_shapes(config._name_or_path))
        self._head = family.names.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, vocab] (of the last `logits_to_keep` positions), the cache, and a loss where asked."""
        base = getattr(self, self.base_model_prefix)
        out = base(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **rest,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_submodule(self._head)(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        names = _family(self.config).names
        return cast(nn.Module, self.get_submodule(f"{names.base}.{names.embed}"))

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return cast(nn.Module, self.get_submodule(self._head))

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: there is no training from random weights."""


def _family(config: PreTrainedConfig) -> Family:
    family = family_of(config)
    if family is None or family.bare is None:
        raise UsageError(f"a {config.model_type} model cannot be made from its tensors alone")
    return family


def tensor_shapes(directory: str | Path) -> Shapes:
    """Return the names and shapes of the tensors in a directory of model files or a low-bit checkpoint."""
    path = Path(directory or "/nonexistent")
    if is_checkpoint(path):
        with CheckpointReader(path) as reader:
            shapes = {name: tuple(info.shape) for name, info in reader.weights.items()}
            return shapes | {name: tuple(info.shape) for name, info in reader.tensors.items()}
    with TensorSource(path) as source:
        return {name: tuple(source[name].shape) for name in source}


def _plant(model: nn.Module, config: BareConfig, family: Family, shapes: Shapes) -> None:
    """Make a module for every weight, under its name: matrices are Linears or the embedding, vectors are norms."""
    names = family.names
    embedding = f"{names.base}.{names.embed}"
    top = names.base.partition(".")[0]
    for name, shape in shapes.items():
        module_name, _, leaf = name.rpartition(".")
        if leaf != "weight" or not (module_name == names.lm_head or module_name.startswith(f"{top}.")):
            continue  # biases come with their weight; tables such as inv_freq are computed
        parent: nn.Module = model
        path = module_name.split(".")
        for depth, part in enumerate(path[:-1]):
            if part not in parent._modules:
                layers = path[: depth + 1] == f"{names.base}.{names.layers}".split(".")
                parent.add_module(part, BareBase(config) if depth == 0 else nn.ModuleList() if layers else nn.Module())
            parent = cast(nn.Module, parent._modules[part])
        parent.add_module(path[-1], _leaf(module_name == embedding, shape, f"{module_name}.bias" in shapes, config))


def _leaf(embedding: bool, shape: tuple[int, ...], bias: bool, config: BareConfig) -> nn.Module:
    if len(shape) == 1:
        eps = config.rms_norm_eps
        return nn.LayerNorm(shape[0], eps=eps) if bias else nn.RMSNorm(shape[0], eps=eps)
    if embedding:
        return nn.Embedding(shape[0], shape[1])
    return nn.Linear(shape[1], shape[0], bias=bias)


def register_bare() -> None:
    """Enter the bare families in Hugging Face's Auto classes; again does no harm."""
    for model_type, family in FAMILIES.items():
        if family.bare is not None:
            fields = {"model_type": model_type, "attribute_map": dict(family.bare)}
            name = model_type.capitalize()
            config = type(f"{name}BareConfig", (BareConfig,), fields)
            model = type(f"{name}BareForCausalLM", (BareForCausalLM,), {"config_class": config})
            AutoConfig.register(model_type, config, exist_ok=True)
            AutoModelForCausalLM.register(config, model, exist_ok=True)
