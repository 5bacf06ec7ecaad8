"""torch's own matrix products, timed on request: a script of its own (see child.py), which knows torch alone.

Its argument: the cpus to run on, a thread each. Requests: {"op": "prepare", "n", "k", "group_size", "bytes"} makes the
weights, copied until they take that many bytes; the answer names the peers. {"op": "batch", "name", "m", "seconds"}
runs one of them, and the answer holds the microseconds of each run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Product = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


def _int4pack(n: int, k: int, group: int) -> list[torch.Tensor]:
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return [packed, torch.rand(k // group, n, 2).to(torch.bfloat16)]


def _int8pack(n: int, k: int, group: int) -> list[torch.Tensor]:
    return [torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n).to(torch.bfloat16)]


def _floats(dtype: torch.dtype) -> Callable[[int, int, int], list[torch.Tensor]]:
    return lambda n, k, group: [torch.randn(n, k).to(dtype)]


def _run_int4(group: int) -> Product:
    return lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], group, w[1])


def _why_not_int4(n: int, k: int, group: int) -> str | None:
    if group not in (32, 64, 128, 256) or k % group:
        return f"it takes whole groups of 32, 64, 128 or 256, not K = {k} in groups of {group}"
    return None if n % 16 == 0 else f"it takes N in multiples of 16, not {n}"


def _why_not_int8(k: int) -> str | None:
    # With another K it reads beyond its weight (torch 2.13).
    return None if k % 8 == 0 else f"it takes K in multiples of 8, not {k}"


class Peers:
    """The weights of one shape in each of torch's forms.

    Activations are bf16 for the packed ones: what those operators are fast with (fp32 and fp16 take them through slow
    paths, 20 times and more).
    """

    def __init__(self, n: int, k: int, group_size: int, total: int) -> None:
        torch.manual_seed(0)
        self.k, self.at = k, 0
        rows: dict[str, tuple[str, int, torch.dtype, Any, Product]] = {
            "torch.int4pack": ("int4", group_size, torch.bfloat16, _int4pack, _run_int4(group_size)),
            "torch.int8pack": (
                "int8",
                -1,
                torch.bfloat16,
                _int8pack,
                lambda x, w: torch.ops.aten._weight_int8pack_mm(x, w[0], w[1]),
            ),
            "torch.float32": (
                "fp32",
                -1,
                torch.float32,
                _floats(torch.float32),
                lambda x, w: torch.nn.functional.linear(x, w[0]),
            ),
            "torch.bfloat16": (
                "bf16",
                -1,
                torch.bfloat16,
                _floats(torch.bfloat16),
                lambda x, w: torch.nn.functional.linear(x, w[0]),
            ),
        }
        why = {"torch.int4pack": _why_not_int4(n, k, group_size), "torch.int8pack": _why_not_int8(k)}
        self.left_out = {name: reason for name, reason in why.items() if reason is not None}
        self.rows = {name: row for name, row in rows.items() if name not in self.left_out}
        self.weights: dict[str, list[list[torch.Tensor]]] = {}
        self.bytes: dict[str, int] = {}
        for name, (_, group, _, make, _) in self.rows.items():
            first = make(n, k, group)
            self.bytes[name] = sum(part.nbytes for part in first)
            copies = max(2, -(-total // self.bytes[name]))
            self.weights[name] = [first, *([part.clone() for part in first] for _ in range(copies - 1))]

    def describe(self) -> dict[str, Any]:
        """Return what there is to measure."""
        found = [
            {"name": name, "format": form, "group_size": group, "bytes": self.bytes[name]}
            for name, (form, group, *_) in self.rows.items()
        ]
        isa = torch.backends.cpu.get_cpu_capability()
        return {"peers": found, "left_out": self.left_out, "isa": isa, "threads": torch.get_num_threads()}

    def batch(self, name: str, m: int, seconds: float) -> list[float]:
        """Run one peer for some seconds, once at least, a copy of the weights after the other."""
        _, _, dtype, _, product = self.rows[name]
        copies = self.weights[name]
        x = torch.randn(m, self.k).to(dtype)
        times: list[float] = []
        spent = -1.0
        while spent < seconds:
            weight = copies[self.at % len(copies)]
            self.at += 1
            started = time.perf_counter()
            product(x, weight)
            took = time.perf_counter() - started
            if spent >= 0:
                times.append(took * 1e6)
            spent = max(spent, 0.0) + (took if times else 0.0)  # the first run wakes the threads and is not counted
        return times


def main() -> None:
    """Answer requests until stdin ends."""
    os.sched_setaffinity(0, {int(cpu) for cpu in sys.argv[1].split(",")})  # torch starts its threads at first use
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is none of the protocol
    peers: Peers | None = None
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            answer: dict[str, Any]
            try:
                if request["op"] == "prepare":
                    peers = None  # the old weights go before the new ones come
                    peers = Peers(request["n"], request["k"], request["group_size"], request["bytes"])
                    answer = peers.describe()
                else:
                    assert peers is not None
                    answer = {"times_us": peers.batch(request["name"], request["m"], request["seconds"])}
            except RuntimeError as error:
                answer = {"error": " ".join(str(error).split())[:300]}
            channel.write(json.dumps(answer) + "\n")
            channel.flush()


if __name__ == "__main__":
    main()
