"""Choosing a kernel and an ISA: refusals are sentences, and a forced ISA is the one that runs."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from dist_lowbit import ops
from dist_lowbit.core.errors import KernelError
from dist_lowbit.core.log import logger
from dist_lowbit.formats import quantize
from dist_lowbit.ops.compiled import _c_spec
from dist_lowbit.ops.kernel import _warn_of_reference


def spec(format: str = "sym_int4", **changes: object) -> ops.LinearSpec:
    return dataclasses.replace(ops.LinearSpec.of(quantize(torch.ones(4, 128), format)), **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cuda"}, "runs on the CPU"),
        ({"compute": "int4"}, "compute is 'int4'; expected int8 or fp32"),
        ({"cuts": (0, 1, 1, 1, 1, 1, 1, 1, 128)}, "within a summation block"),
        ({"group_size": 1 << 16}, "32768"),
    ],
)
def test_the_compiled_kernel_says_why_not(changes: dict[str, object], reason: str, library: ctypes.CDLL) -> None:
    why = ops.kernel("cpu").why_not(spec(**changes))
    assert why is not None
    assert reason in why


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"codec": 2, "element": 1, "scale": 2, "group_size": -1}, "elements of 8 bits need scales"),
        ({"n": 1 << 60}, "above 2^31 - 1"),
        ({"k": 1 << 31}, "above 2^31 - 1"),
    ],
)
def test_the_library_refuses_what_its_arithmetic_does_not_cover(
    fields: dict[str, int], reason: str, library: ctypes.CDLL
) -> None:
    c_spec = _c_spec(spec())
    for name, value in fields.items():
        setattr(c_spec, name, value)
    c_spec.cuts[:] = [0] * 8 + [c_spec.k]
    assert reason in library.dlb_linear_why_not(ctypes.byref(c_spec)).decode()
    assert library.dlb_linear_packed_bytes(ctypes.byref(c_spec)) < 0


def test_an_unknown_arithmetic_is_refused_by_all(library: ctypes.CDLL) -> None:
    for form in ("sym_int4", "bf16"):
        with pytest.raises(KernelError, match="reference: compute is 'int3'"):
            ops.choose(spec(form, compute="int3"))


def test_refusals_of_all_kernels_are_listed(library: ctypes.CDLL) -> None:
    with pytest.raises(KernelError, match=r"cpu: .*; reference: "):
        ops.choose(spec(cuts=(0, 1, 1, 1, 1, 1, 1, 1, 128)))
    with pytest.raises(KernelError, match="cpu, xpu_int4, dequantized, reference"):
        ops.kernel("gpu")


def test_a_buffer_of_another_weight_is_refused(library: ctypes.CDLL) -> None:
    weight = quantize(torch.ones(4, 128), "sym_int4")
    for kernel in ops.KERNELS:
        opaque = kernel.prepack(weight, spec())
        with pytest.raises(KernelError):
            kernel.unpack(opaque, spec(format="sym_int8"))
        with pytest.raises(KernelError):
            kernel.unpack(torch.zeros(512, dtype=torch.uint8), spec())
    with pytest.raises(KernelError, match="no prepacked weight"):
        ops.linear(torch.ones(1, 128), ops.kernel("cpu").prepack(weight, spec())[:-1], "cpu", 4)


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True, timeout=60
    )


ACTIVE = "from dist_lowbit import ops; print(ops.active_isa())"


def test_the_environment_forces_an_isa(library: ctypes.CDLL) -> None:
    assert run_python(ACTIVE, DIST_LOWBIT_ISA="scalar").stdout.strip() == "scalar"
    wrong = run_python(ACTIVE, DIST_LOWBIT_ISA="mmx").stderr
    assert "expected auto or one of scalar, avx2" in wrong


@pytest.mark.slow
def test_the_best_isa_is_taken_by_itself(library: ctypes.CDLL) -> None:
    best = [name for name, supported, _ in ops.isas() if supported][-1]
    assert run_python(ACTIVE, DIST_LOWBIT_ISA="auto").stdout.strip() == best


def test_without_a_library_the_reference_runs_and_is_warned_of_once() -> None:
    code = (
        "import torch; from dist_lowbit import ops; from dist_lowbit.formats import quantize\n"
        "s = ops.LinearSpec.of(quantize(torch.ones(4, 64), 'sym_int4'))\n"
        "ops.choose(s)\n"
        "print(ops.choose(s).name, ops.isas(), ops.kernel('cpu').why_not(s))"
    )
    out = run_python(code, DIST_LOWBIT_LIBRARY="none")
    assert out.stdout.startswith("reference [] switched off"), out.stderr
    want = "a sym_int4 Linear runs on the slow reference: cpu: switched off by DIST_LOWBIT_LIBRARY=none"
    assert out.stderr.strip() == want


def test_a_linear_that_no_compiled_kernel_takes_is_warned_of_once(
    library: ctypes.CDLL, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _warn_of_reference.cache_clear()
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    try:
        for size in (64, 1 << 16, 1 << 16):
            ops.choose(ops.LinearSpec.of(quantize(torch.ones(4, 64), "sym_int4", size)))
    finally:
        logger.removeHandler(caplog.handler)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("a sym_int4 Linear runs on the slow reference: cpu: the group size is above 32768")


def test_a_table_has_no_integer_whose_negative_int8_lacks(library: ctypes.CDLL) -> None:
    c_spec = _c_spec(spec("nf3"))
    assert library.dlb_linear_why_not(ctypes.byref(c_spec)) is None
    c_spec.table[3] = -128
    assert b"below -127" in library.dlb_linear_why_not(ctypes.byref(c_spec))
