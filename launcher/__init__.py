"""Start one process per rank, bound to its cores and memory, and end them all when one dies.

Standard library only: no torch, nothing of dist_lowbit. Its contract with a rank is the environment that it
sets (README.md). `python -m launcher` from a checkout, `python -m dist_lowbit.launcher` installed.
"""

from __future__ import annotations
