"""Build the oneCCL shim if need be and print its path: python -m dist_lowbit.kernels.ccl."""

from __future__ import annotations

import sys

from .build import ShimMissing, ensure

if __name__ == "__main__":
    try:
        print(ensure())
    except ShimMissing as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
