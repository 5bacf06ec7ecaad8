"""Shapes of known models, as the fields of their Hugging Face configs: sizes only, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from dist_lowbit.assembly.skeleton import read_config
from dist_lowbit.core.errors import UsageError


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab}
    rest = {"model_type": "llama", "max_position_embeddings": 4096, "tie_word_embeddings": False}
    return {**rest, **sizes, **more}


# Sizes: each model's config.json on the hub. llama-1b is TinyLlama's with full attention; "/8" is what one of eight
# ranks holds: an eighth of the heads, of the MLP and of the vocabulary, at the model's own width.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": _llama(2048, 22, 32, 4, 5632, 32000),
    "llama2-7b": _llama(4096, 32, 32, 32, 11008, 32000),
    "llama2-13b": _llama(5120, 40, 40, 40, 13824, 32000),
    "llama2-70b": _llama(8192, 80, 64, 8, 28672, 32000),
    "llama2-70b/8": _llama(8192, 80, 8, 1, 3584, 4000, head_dim=128),
    "llama3-8b": _llama(4096, 32, 32, 8, 14336, 128256, max_position_embeddings=8192, rope_theta=500000.0),
    "llama3-70b/8": _llama(
        8192, 80, 8, 1, 3584, 16032, head_dim=128, max_position_embeddings=8192, rope_theta=500000.0
    ),
    "mistral-7b": _llama(4096, 32, 32, 8, 14336, 32000, model_type="mistral", sliding_window=None),
    "mixtral-8x7b": _llama(
        *(4096, 32, 32, 8, 14336, 32000),
        model_type="mixtral",
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
    ),
    "qwen2-7b": _llama(3584, 28, 28, 4, 18944, 152064, model_type="qwen2", rope_theta=1000000.0),
    "qwen3-8b": _llama(4096, 36, 32, 8, 12288, 151936, model_type="qwen3", head_dim=128, rope_theta=1000000.0),
    "phi3-mini": _llama(3072, 32, 32, 32, 8192, 32064, model_type="phi3", pad_token_id=0),
}


def config_of(shape: str) -> Any:
    """Return the Hugging Face config of a shape: a name of SHAPES, or a directory that holds a config.json."""
    if shape in SHAPES:
        fields = dict(SHAPES[shape])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if shape and Path(shape).is_dir():
        return read_config(shape)
    raise UsageError(f"--shape is {shape!r}; expected a directory with a config.json, or one of {', '.join(SHAPES)}")
