"""Runs the formats named as arguments on every ISA of DIST_LOWBIT_LIBRARY; prints what differs as JSON.

A process of its own: a process has one library. {isa: {format: [one line per difference]}}
"""

from __future__ import annotations

import json
import sys

import torch

from dist_lowbit import ops
from dist_lowbit.formats import FORMATS, quantize
from dist_lowbit.ops import reference

# Tokens: none, one and all tiles of AMX (16, 32 and 64 tokens at a time), each with and without a ragged rest.
TOKENS = (1, 3, 8, 15, 16, 17, 31, 48, 64, 117)
# N: less than a panel, whole panels, a ragged last one. K: less than a chunk, odd and even numbers of chunks, ragged.
SHAPES = ((7, 1), (16, 64), (33, 100), (40, 352), (17, 576))
GROUPS = (32, 64, 96, 128, -1)


def differences(format: str, isa: str, generator: torch.Generator) -> list[str]:
    """Return a line for each case in which the ISA's result differs in a bit from what it has to be.

    Codes have to give the reference's bits; elements, which the reference adds in fp64, those of AVX2.
    """
    exact, found = reference.exact_codes(FORMATS[format]), []
    for index, (n, k) in enumerate(SHAPES):
        x = torch.randn(max(TOKENS), k, generator=generator)
        for group_size in (GROUPS[index], GROUPS[(index + 2) % len(GROUPS)]):
            weight = quantize(torch.randn(n, k, generator=generator), format, group_size)
            spec = ops.LinearSpec.of(weight, ops.whole_cuts(k, weight.block))
            kernel = ops.choose(spec)
            opaque = kernel.prepack(weight, spec)
            if exact:
                want = reference.linear(x, weight, spec.cuts, "int8")
            else:
                want = torch.empty(max(TOKENS), n)
                ops.select_isa("avx2")
                kernel.run(x, opaque, want)
            ops.select_isa(isa)
            for m in TOKENS:
                got = torch.full((m, n), 7.0)
                kernel.run(x[:m], opaque, got)
                if kernel.name != "cpu" or not torch.equal(got, want[:m]):
                    found.append(f"{n}x{k}, group {group_size}, M={m}, kernel {kernel.name}")
    return found


def main() -> None:
    names = [name for name, supported, _ in ops.isas() if supported and name.endswith("_emulated")]
    result = {
        isa: {format: differences(format, isa, torch.Generator().manual_seed(7)) for format in sys.argv[1:]}
        for isa in names
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
