"""ISAs above AVX2, in software: the checks of tests/ops, and every format's bits for all tiles of AMX.

Where the CPU has an ISA, tests/ops runs it natively too; these run wherever AVX2 is. The emulated library lists its
ISAs beside scalar and AVX2, so tests/ops as it stands, run with that library, compares them: fp32 activations, splits
of K and N, several threads, fused products, experts.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulated_process import differences, run_emulated

from dist_lowbit.formats import FORMATS
from tests.guarded_driver import build_driver, run_driver

ISAS = ["avx_vnni_emulated", "avx512_vnni_emulated", "amx_emulated"]
SOME = ["sym_int4", "asym_int5", "nf3", "fp8_e4m3"]  # one of each way to decode
REST = [name for name in FORMATS if name not in SOME]
# One test of each kind, and how many of them there are at least.
QUICK = [
    ("fp32_activations_give and (sym_int4 or asym_int5 or nf3 or fp16)", 4),
    ("tree_over_ranks and 576 and (sym_int4 or asym_int4 or nf4)", 3),
    ("threads_that_share and (sym_int4 or fp8_e4m3)", 2),
    ("fused_call_has_the_bits and 5-33", 8),
    ("codes_with_fp32_activations_are_fused", 1),
    ("experts_over_ranks and sym_int4", 1),
]


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("isa", ISAS)
def test_equals_the_reference(isa: str, format: str, emulated: Path) -> None:
    assert differences(*SOME)[isa][format] == []


@pytest.mark.slow
@pytest.mark.parametrize("format", REST)
@pytest.mark.parametrize("isa", ISAS)
def test_every_format_equals_the_reference(isa: str, format: str, emulated: Path) -> None:
    assert differences(*REST)[isa][format] == []


def passed(*arguments: str) -> int:
    """Run some of tests/ops on the emulated library; return how many passed. None may fail or be skipped."""
    printed = run_emulated("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    last = printed.strip().splitlines()[-1]
    assert "skipped" not in last, last
    found = re.search(r"(\d+) passed", last)
    assert found is not None, last
    return int(found[1])


def test_the_checks_of_real_isas_hold(emulated: Path) -> None:
    files = [f"tests/ops/test_{name}.py" for name in ("ops_linear", "fused", "experts")]
    chosen = " or ".join(f"({words})" for words, _ in QUICK)
    assert passed("-k", chosen, *files) >= sum(count for _, count in QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("ops_linear", 500), ("fused", 30), ("experts", 20)])
def test_all_checks_of_real_isas_hold(name: str, least: int, emulated: Path) -> None:
    assert passed("--slow", f"tests/ops/test_{name}.py") >= least


@pytest.mark.slow
def test_nothing_beyond_a_buffer_is_touched(emulated: Path, tmp_path: Path) -> None:
    """Fused products, experts and whole decoders on the emulated ISAs too."""
    last = run_driver(build_driver(emulated, tmp_path))
    assert last.endswith(" 0 failures, on scalar avx2 " + " ".join(ISAS))
