"""dist-lowbit generate as a user starts it: a process with an exit code and two streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def environment(**changes: str) -> dict[str, str]:
    """Return this environment without a launcher's variables, with the tree importable."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in foreign}
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return env | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | changes


def start(*words: str, module: str = "dist_lowbit.cli", **changes: str) -> subprocess.Popen[str]:
    """Start a command and return its process, both streams piped."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        env=environment(**changes),
        cwd=ROOT,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def generate_text(checkpoint: Path, *words: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run dist-lowbit generate to its end."""
    process = start("generate", str(checkpoint), *words, **changes)
    try:
        out, err = process.communicate(timeout=90)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
