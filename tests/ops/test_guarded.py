"""The library as it is shipped, driven by kernels/cpu/tests: every buffer against a forbidden page.

`make sanitize` runs the same driver on kernels built with sanitizers, tests/emulation on emulated ones.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.guarded_driver import build_driver, run_driver


@pytest.fixture
def driver(library: ctypes.CDLL, tmp_path: Path) -> Path:
    """The driver, linked to the library under test."""
    return build_driver(Path(library._name).resolve(), tmp_path)


@pytest.mark.slow
def test_nothing_beyond_a_buffer_is_touched(driver: Path) -> None:
    assert " 0 failures, on scalar" in run_driver(driver)


def test_runs_on_a_processor_without_avx(driver: Path) -> None:
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("qemu-x86_64 is not installed")
    if "LD_PRELOAD" in os.environ:
        pytest.skip("kernels with sanitizers do not run on an emulated processor")
    command = [qemu, "-cpu", "qemu64", str(driver), "--brief"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(" 0 failures, on scalar")
