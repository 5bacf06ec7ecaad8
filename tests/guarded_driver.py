"""The driver of kernels/cpu/tests, linked to a library: every buffer against a page that may not be touched."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCES = sorted((Path(__file__).parents[1] / "kernels" / "cpu" / "tests").glob("*.cpp"))


def build_driver(shared: Path, folder: Path) -> Path:
    """Compile the driver into `folder`; return the program."""
    program = folder / "guarded"
    command = ["c++", "-std=c++17", "-O1", *SOURCES, shared, f"-Wl,-rpath,{shared.parent}", "-o", program]
    subprocess.run(command, check=True, timeout=100)
    return program


def run_driver(program: Path) -> str:
    """Run all of it; return its last line, which names the ISAs."""
    done = subprocess.run([program], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
