"""Floor 3: model families as data. No forward, no numbers: which matrix plays which role, and where sizes stand."""

from .family import Family, ModelDims, dims_of
from .registry import FAMILIES, family_of

__all__ = ["FAMILIES", "Family", "ModelDims", "dims_of", "family_of"]
