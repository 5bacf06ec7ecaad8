"""One attention function for Hugging Face models, registered with transformers under the name "dist_lowbit".

It keeps a query row's result independent of the batch, the number of local heads, threads and the chunking of a prefill
(dist_lowbit.ops.attention). Nothing is patched: transformers' own AttentionInterface and AttentionMaskInterface call
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from dist_lowbit.core.errors import UsageError
from dist_lowbit.ops.attention import NOT_CAUSAL, attention

ATTENTION_NAME = "dist_lowbit"

# Set on the masks made here: int32 [B], the position of slot 0. A mask that a model rebuilds loses it; then positions
# are counted from slot 0, which moves the last bits of left-padded rows and of cropped sliding-window caches, and
# nothing else.
_START = "kv_start"
_USE_EAGER = '; call model.set_attn_implementation("eager") first'
# What other attention functions are given and this one does not compute.
_REFUSED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "block_indices": "block-sparse attention",
    "cache": "a paged cache",
    "head_mask": "a head mask",
}


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **rest: Any,
) -> torch.Tensor | None:
    """Make the mask of a forward: bool [B, 1, M, S], True is seen; None where plain causality says it all.

    Called by transformers with the arguments of its `sdpa_mask`; `attention_mask` is the bool [B, tokens] padding mask.
    """
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        attention_mask=attention_mask, **rest,
    )  # fmt: skip
    if mask is None:
        return None
    start = torch.full((batch_size,), kv_offset, dtype=torch.int32, device=mask.device)
    if attention_mask is not None and attention_mask.shape[0] == batch_size:
        # The tokens before the first real one are padding; a row of padding alone counts as not padded.
        padding = attention_mask.to(device=mask.device, dtype=torch.int8).argmax(dim=-1)
        start = start - padding.to(torch.int32)
    setattr(mask, _START, start)
    return mask


def _refuse(module: nn.Module, dropout: float, rest: dict[str, Any]) -> None:
    """Raise UsageError for whatever would be ignored otherwise."""
    where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
    if module.training:
        raise UsageError(
            f"{where} is in training mode, which {ATTENTION_NAME} attention does not do: call model.eval()"
        )
    if dropout:
        raise UsageError(f"{where} asks for attention dropout {dropout}, expected 0{_USE_EAGER}")
    if rest.get("output_attentions"):
        raise UsageError(f"{where} asks for output_attentions, but the weights are never formed as a whole{_USE_EAGER}")
    for name, what in _REFUSED.items():
        if rest.get(name) is not None:
            raise UsageError(f"{where} asks for {what} ({name}), which this attention does not compute{_USE_EAGER}")


def _kv_index(module: nn.Module, heads: int, kv_heads: int, device: torch.device) -> torch.Tensor:
    own = getattr(module, "kv_index", None)
    if isinstance(own, torch.Tensor):
        return own
    if own is not None:
        return torch.tensor(list(own), dtype=torch.int32, device=device)
    if heads % kv_heads:
        raise UsageError(
            f"{type(module).__name__} has {heads} query heads for {kv_heads} KV heads, expected a multiple; "
            "set module.kv_index to the KV head of each query head"
        )
    return torch.arange(heads, dtype=torch.int32, device=device) // (heads // kv_heads)


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor | None, slots: int) -> torch.Tensor | None:
    """Put a position bias (added to the scores) and a mask into one mask, cut to the slots there are."""
    mask = None if mask is None else mask[..., :slots]
    bias = None if bias is None else bias[..., :slots].float()
    if mask is None or bias is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' attention functions do: query [B, H, M, D], key and value [B, Hkv, S, D] -> [B, M, H, D].

    `module.kv_index` (int32 [H], or a list), where it is set, names the KV head of each local query head; else they are
    shared evenly. Without a mask the module is causal if it says so (`is_causal`). No weights are returned. Raises
    UsageError in training mode and for dropout, output_attentions, sinks and paged caches.
    """
    _refuse(module, dropout, rest)
    rows, slots = query.shape[2], key.shape[2]
    start = getattr(attention_mask, _START, None)
    causal_offset, window = NOT_CAUSAL, 0
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal:
        # transformers gives no mask for one row (which sees all), for a prefill from an empty cache, and for nothing
        # else. Slots beyond the rows of such a prefill are the unused ones of a static cache.
        causal_offset = 0 if rows > 1 else slots - 1
        window = sliding_window or 0
    out = attention(
        query,
        key,
        value,
        _kv_index(module, query.shape[1], key.shape[1], query.device),
        mask=_with_bias(attention_mask, position_bias, slots),
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal_offset=causal_offset,
        window=window,
        softcap=softcap or 0.0,
        kv_start=start,
    )
    return out, None


def register_attention() -> None:
    """Make `attn_implementation="dist_lowbit"` known to transformers in this process; again does no harm."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)


def _applies(model: PreTrainedModel) -> bool:
    by_interface = getattr(model, "_supports_attention_backend", False) or getattr(model, "_supports_sdpa", False)
    with_sinks = any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters())
    return bool(by_interface and model._can_set_attn_implementation() and not with_sinks)


def use_attention(model: nn.Module) -> bool:
    """Switch a Hugging Face model to the attention of dist_lowbit; return whether it applies.

    False, and nothing changed, for a model that is not from transformers, whose layers compute attention themselves, or
    that has attention sinks. Takes effect at the next forward and for all submodels; weights and caches stay as they
    are.
    """
    if not isinstance(model, PreTrainedModel) or not _applies(model):
        return False
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    return bool(model.config._attn_implementation == ATTENTION_NAME)
