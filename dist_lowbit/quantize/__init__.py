"""Floor 2: which module gets which format, and by which algorithm. Knows no ranks and no kernels.

An algorithm is one file here and one line in ALGORITHMS.
"""

from .recipe import Recipe
from .rtn import Algorithm, rtn

ALGORITHMS: dict[str, Algorithm] = {
    "rtn": rtn,
}

__all__ = ["ALGORITHMS", "Algorithm", "Recipe", "rtn"]
