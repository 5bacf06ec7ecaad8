"""Processes that have the emulated library in place of the real one: a process has one library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "build" / "emulated" / "libdist_lowbit_emulated.so"


def run_emulated(*arguments: str | Path, **more: str) -> str:
    """Run Python with the emulated library in place of the real one, and `more` variables; return what it prints."""
    environ = os.environ | {
        "DIST_LOWBIT_LIBRARY": str(LIBRARY),
        "DIST_LOWBIT_ISA": "auto",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        **more,
    }
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=115, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@cache
def differences(*formats: str) -> dict[str, dict[str, list[str]]]:
    """Return what differs from the reference, by ISA and format: one process for all of the formats."""
    script = Path(__file__).with_name("compare.py")
    # Of such small products a second thread mostly waits, at full speed. tests/ops covers several threads.
    found: dict[str, dict[str, list[str]]] = json.loads(run_emulated(script, *formats, OMP_NUM_THREADS="1"))
    return found
