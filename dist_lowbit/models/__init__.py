"""Floor 3: model families as data. No forward, no numbers: which matrix plays which role, and where sizes stand."""

from .family import Family, ModelDims, Names, dims_of, lookup, setting
from .registry import FAMILIES, family_of

__all__ = ["FAMILIES", "Family", "ModelDims", "Names", "dims_of", "family_of", "lookup", "setting"]
