"""What a family is: fields only. Which module plays which role, and which step of a layer a config turns on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_lowbit.core.errors import PlanError

Setting = str | int | float | bool | None


@dataclass(frozen=True)
class ModelDims:
    """The sizes that decide how a model is cut: counts, and elements for head_dim."""

    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


@dataclass(frozen=True)
class Names:
    """Where modules stand; "" for what a family does not have. A module that is absent or None counts as not there.

    base: the module that computes the hidden states. embed to project_out: under base. qkv to shared_gate: under a
    layer (`{base}.{layers}.0`). lm_head: of the whole model.
    """

    base: str = "model"
    embed: str = "embed_tokens"
    embed_norm: str = ""
    project_in: str = ""
    positions: str = ""
    layers: str = "layers"
    final_norm: str = "norm"
    project_out: str = ""
    lm_head: str = "lm_head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    q_norm: str = ""
    k_norm: str = ""
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = ""
    experts: str = ""
    shared_up: tuple[str, ...] = ()
    shared_down: str = ""
    shared_gate: str = ""
    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attn_post_norm: str = ""
    mlp_post_norm: str = ""


@dataclass(frozen=True)
class Family:
    """One entry, keyed by config.model_type.

    A field of type Setting is a constant, or "@name" for the config's attribute of that name (dots go deeper; an
    attribute that is missing or None is 0).

    qkv_by_head: the rows of a fused qkv come per key/value head, [its queries, key, value], instead of all queries
    first. gated: the MLP is activation(gate) * up. activation: a name of decoder.program.ACTIVATIONS or of HF's.
    up_first: a fused gate_up has the rows of up first. rope: "half" (pairs i, i + dim / 2), "pairs" (2i, 2i + 1) or
    "". rope_dim: rotated elements of a head where the config says it itself (else by its rope_parameters).
    alibi: whether slopes are added; alibi_max: the largest exponent of a slope; alibi_scaled: the slopes, rounded to
    bfloat16, are multiplied by the scale of the scores. window: the attribute of the sliding window; a config with
    layer_types says which layers slide. query_scalar: the scores' scale is its -1/2nd power (0: head_dim).
    scale: the scale itself (0: as above). norm_offset: what is added to a norm's stored weight.
    parallel, norm_after, residual_normed, mask_positions, position_offset, clip, softcaps: see decoder.program.
    top_k, renormalise: of a router. expect: attributes that must have a value for the decoder to apply.

    local_heads: attributes of an attention module, or of its config ("config.x"), that HF's forward reads as the
    number of query or key/value heads it holds. own_decoder: HF's forward cannot run on a part of the heads.
    sizes: config attribute (or number) of each field of ModelDims, where it is not the usual one.
    rope_base, rope_ratio, rope_share: for configs without rope_parameters: the base of the frequencies (0: theirs), a
    factor of it (0: none), and the part of a head that turns. longest: positions beyond which the family goes on in a
    way that is not computed here (0: none). normalise_head: the head's rows are brought to length 1 when it is read.
    bare: transformers has no code for this family; its usual names of sizes -> the config's own.
    kinds: what else changes where config attributes have some values: the first that applies.
    """

    model_type: str
    names: Names = Names()
    qkv_by_head: bool = False
    gated: bool = True
    up_first: bool = False
    activation: str = "@hidden_act"
    norm_offset: float = 0.0
    embed_scale: str = ""  # "", or "sqrt_hidden"
    rope: str = "half"
    rope_dim: Setting = 0
    alibi: Setting = False
    alibi_max: Setting = 8
    alibi_scaled: bool = False
    window: Setting = 0
    query_scalar: Setting = 0
    scale: Setting = 0
    clip: Setting = 0
    attn_softcap: Setting = 0
    logit_softcap: Setting = 0
    parallel: Setting = False
    norm_after: bool = False
    residual_normed: Setting = False
    mask_positions: bool = False
    position_offset: int = 0
    top_k: Setting = 0
    renormalise: Setting = True
    expect: Mapping[str, Any] = field(default_factory=dict)
    local_heads: Mapping[str, str] = field(default_factory=dict)
    own_decoder: bool = False
    sizes: Mapping[str, str | int] = field(default_factory=dict)
    rope_base: Setting = 0
    rope_ratio: Setting = 0
    rope_share: float = 1.0
    longest: Setting = 0
    normalise_head: bool = False
    bare: Mapping[str, str] | None = None
    kinds: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """Return the modules without which a model is not this family's (such as one with another head)."""
        return (f"{self.names.base}.{self.names.embed}", self.names.lm_head)

    @property
    def roles(self) -> dict[str, str]:
        """Return glob over module names -> role (the words of parallel.roles), total over what is quantized."""
        n = self.names
        roles = {f"{n.base}.{n.embed}": "embed", n.lm_head: "lm_head"}
        roles |= {f"{n.base}.{name}": "whole" for name in (n.project_in, n.project_out) if name}
        fused = "qkv_by_head" if self.qkv_by_head else "qkv"
        layer = dict(zip(n.qkv, ("q", "kv", "kv") if len(n.qkv) == 3 else (fused,), strict=True))
        layer[n.o] = "o"
        for up, down in ((n.up, n.down), (n.shared_up, n.shared_down)):
            layer |= dict.fromkeys(up, "gate_up" if self.gated and len(up) == 1 else "up")
            layer |= {down: "down"} if down else {}
        if n.experts:
            layer |= {f"{n.experts}.gate_up_proj": "expert_gate_up", f"{n.experts}.down_proj": "expert_down"}
        return roles | {f"{n.base}.{n.layers}.*.{name}": role for name, role in layer.items()}

    @property
    def keep(self) -> tuple[str, ...]:
        """Return globs of matrices that stay whole and in high precision."""
        n = self.names
        # A router's weight is a parameter of a module that is no Linear, so its own name is the matrix's.
        layer = (f"{n.router}.weight" if n.router else "", n.shared_gate)
        kept = tuple(f"{n.base}.{n.layers}.*.{name}" for name in layer if name)
        return (*kept, f"{n.base}.{n.positions}") if n.positions else kept

    def embedding_scale(self, config: Any) -> float:
        """Return the factor of token embeddings."""
        return float(config.hidden_size) ** 0.5 if self.embed_scale == "sqrt_hidden" else 1.0


def setting(config: Any, value: Any) -> Any:
    """Return a Setting's value for a config."""
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    return lookup(config, value[1:]) or 0


def lookup(config: Any, name: str) -> Any:
    """Return a config's attribute, dots going deeper (into dicts, too); None where it is missing."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
    return config


_USUAL: dict[str, str | int] = {
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
}


def dims_of(family: Family, config: Any) -> ModelDims:
    """Read a family's sizes from a Hugging Face config; a missing or impossible one is a PlanError."""
    names = _USUAL | dict(family.sizes)
    read: dict[str, Any] = {
        want: name if isinstance(name, int) else getattr(config, name, None) for want, name in names.items()
    }
    read["kv_heads"] = read["kv_heads"] or read["heads"]
    if not read["head_dim"] and read["heads"]:
        read["head_dim"] = config.hidden_size // read["heads"]
    missing = [str(names[name]) for name, value in read.items() if not isinstance(value, int) or value < 1]
    if missing:
        raise PlanError(f"the config of this {family.model_type} model has no usable {', '.join(missing)}")
    dims = ModelDims(**{name: int(value) for name, value in read.items()})
    if dims.heads % dims.kv_heads:
        raise PlanError(
            f"this {family.model_type} model has {dims.heads} attention heads over {dims.kv_heads} key/value heads; "
            f"expected a multiple"
        )
    return dims
