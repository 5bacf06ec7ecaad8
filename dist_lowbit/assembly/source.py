"""Build a low-bit model straight from ordinary model files: never the whole model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dist_lowbit.checkpoint import TensorSource
from dist_lowbit.comm import Group
from dist_lowbit.core.log import logger
from dist_lowbit.formats import Format
from dist_lowbit.models import family_of
from dist_lowbit.quantize import Recipe

from .attach import attach
from .build import build
from .matrices import other_names
from .mode import Mode
from .optimize import block_under, embeddings, excluded, form_under, optimize, transposed_linears
from .skeleton import empty_model, read_config
from .target import Target, make_target
from .together import together
from .weights import SourceWeights


def source_weights(model: nn.Module, source: TensorSource, recipe: Recipe) -> SourceWeights:
    """Return the weights of model files as a recipe quantizes them, for a model on meta."""
    own = embeddings(model)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    aliases = tied | {kept: name for name, kept in tied.items()}
    renamed, stacks = other_names(model, source)
    aliases = {name: renamed.get(other, other) for name, other in aliases.items()} | renamed
    transposed = transposed_linears(model)
    family = family_of(model.config) if hasattr(model, "config") else None
    unit_rows = {family.names.lm_head} if family is not None and family.normalise_head else set[str]()

    def form_of(name: str) -> tuple[Format, int | None] | None:
        return form_under(recipe, name, name in own)

    return SourceWeights(source, form_of, transposed, aliases, stacks, unit_rows)


def source_target(model: nn.Module, recipe: Recipe, tp: int) -> tuple[Target, frozenset[str]]:
    """Return the plan of a model on meta under a recipe, and the Linears that the recipe leaves alone."""
    kept = excluded(model, recipe)
    return make_target(model, lambda name: block_under(recipe, name), tp, lambda name: name not in kept), kept


def missing(model: nn.Module, weights: SourceWeights) -> list[str]:
    """Return the tensors of a model that its files hold under another name, or not at all."""
    return [name for name in model.state_dict() if not weights.has(name)]


def from_source(
    cls: Any,
    directory: Path,
    recipe: Recipe,
    group: Group,
    mode: Mode,
    *,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Quantize a model from its files, matrix by matrix, this rank's part only. All ranks must call together.

    Files whose names differ from the model's (Hugging Face renames some while loading) are loaded the ordinary
    way first, in full; a line says so. Peak memory otherwise: this rank's part plus one matrix.
    """
    with together(group), TensorSource(directory) as source:
        model = empty_model(cls, read_config(directory, trust_remote_code), directory, trust_remote_code)
        weights = source_weights(model, source, recipe)
        renamed = missing(model, weights)
        if not renamed:
            target, kept = source_target(model, recipe, group.size)
            build(model, target, weights, group, recipe, kept, mode)
            return attach(model)
    logger.warning("%s is loaded in full before it is quantized: its files have no %s", directory, renamed[0])
    live = cls.from_pretrained(str(directory), dtype="auto", trust_remote_code=trust_remote_code, **kwargs)
    return optimize(live, recipe, group, mode)
