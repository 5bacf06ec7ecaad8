"""Running the command line, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dist_lowbit.sample

ROOT = Path(__file__).parent.parent.parent
SAMPLE = dist_lowbit.sample.path()


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """Return the one line of an error; fail if there is more than that."""
        assert self.code != 0
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        return self.err


Cli = Callable[..., Done]


def environment(**more: str) -> dict[str, str]:
    """Return an environment for a process of its own, in which the tree can be imported."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DIST_LOWBIT_LOG": "error", **more}


def process(*words: object, limit: float = 100, stdin: str = "", **more: str) -> Done:
    """Run a command line in a process of its own."""
    command = [sys.executable, "-m", "dist_lowbit.cli", *map(str, words)]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=limit, env=environment(**more), check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def edit(path: Path, **values: object) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")
