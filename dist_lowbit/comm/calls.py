"""How messages name a call: its operation, what it moves and how much."""

from __future__ import annotations

from .tree import DTYPES

OPERATIONS = {1: "all_reduce", 2: "all_gather", 3: "broadcast", 4: "barrier"}  # enum dlb_shm_op, and the ccl shim's
ALL_REDUCE, ALL_GATHER, BROADCAST, BARRIER = OPERATIONS
ELEMENTS = ("fp32 numbers", "bf16 numbers", "fp16 numbers", "bytes")  # DTYPES, then what only moves
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}  # enum dlb_shm_dtype
BYTES = len(DTYPES)


def described(op: int, dtype: int, count: int, source: int) -> str:
    """Return "broadcast of 8 bytes from rank 1" and the like."""
    if op == BARRIER:
        return OPERATIONS[op]
    what = f"{OPERATIONS[op]} of {count} {ELEMENTS[dtype]}"
    return f"{what} from rank {source}" if op == BROADCAST else what
