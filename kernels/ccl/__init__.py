"""oneCCL on CPUs: the C++ shim over its static library, and the program that builds it (standard library only)."""

from .build import ShimMissing, built, ensure, why_not

__all__ = ["ShimMissing", "built", "ensure", "why_not"]
