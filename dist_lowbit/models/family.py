"""What a family is: fields only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_lowbit.core.errors import PlanError


@dataclass(frozen=True)
class ModelDims:
    """The sizes that decide how a model is cut: counts, and elements for head_dim, intermediate and vocab."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


@dataclass(frozen=True)
class Family:
    """One entry, keyed by config.model_type.

    roles: glob over module names -> role (the words of parallel.roles); total over every matrix of the model.
    keep: globs of matrices that stay whole and in high precision.
    attention: glob of the attention modules. local_heads: attributes of an attention module, or of its config
    ("config.x"), that HF's forward reads as the number of query or key/value heads it holds.
    names: config attribute of each field of ModelDims, where it is not the usual one.
    """

    model_type: str
    roles: Mapping[str, str]
    attention: str
    keep: tuple[str, ...] = ()
    local_heads: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


_USUAL = {
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
}


def dims_of(family: Family, config: Any) -> ModelDims:
    """Read a family's sizes from a Hugging Face config; a missing or impossible one is a PlanError."""
    read: dict[str, Any] = {
        want: getattr(config, family.names.get(want, usual), None) for want, usual in _USUAL.items()
    }
    read["kv_heads"] = read["kv_heads"] or read["heads"]
    if not read["head_dim"] and read["heads"]:
        read["head_dim"] = config.hidden_size // read["heads"]
    missing = [_USUAL[name] for name, value in read.items() if not isinstance(value, int) or value < 1]
    if missing:
        raise PlanError(f"the config of this {family.model_type} model has no usable {', '.join(missing)}")
    dims = ModelDims(**{name: int(value) for name, value in read.items()})
    if dims.heads % dims.kv_heads:
        raise PlanError(
            f"this {family.model_type} model has {dims.heads} attention heads over {dims.kv_heads} key/value heads; "
            f"expected a multiple"
        )
    return dims
