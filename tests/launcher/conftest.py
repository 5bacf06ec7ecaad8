"""The launcher as users start it: a process with an exit code and two streams."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LIMIT = 60.0  # of any one launcher: far above what one takes, so that a hang fails instead of hanging


def clean_environment() -> dict[str, str]:
    """Return the environment without what would change a launch, and with the tree importable from anywhere."""
    names = ("OMP_NUM_THREADS", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "DS_ACCELERATOR")
    env = {name: value for name, value in os.environ.items() if name not in names}
    return {**env, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])}


@dataclass
class Launch:
    """Starts launchers whose ranks run small scripts in `folder`."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def script(self, source: str, name: str = "script.py") -> str:
        path = self.folder / name
        path.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(source))
        return str(path)

    def start(self, *args: str, env: dict[str, str] | None = None, before: list[str] | None = None, **more: object):  # type: ignore[no-untyped-def]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        process = subprocess.Popen(
            [*(before or []), sys.executable, "-m", "dist_lowbit.launcher", *args],
            env={**clean_environment(), **(env or {})},
            cwd=self.folder,
            text=True,
            **streams,  # type: ignore[call-overload]
        )
        self.started.append(process)
        return process

    def __call__(self, *args: str, **more: object) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, **more)  # type: ignore[arg-type]
        out, err = process.communicate(timeout=LIMIT)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def pids(self, count: int, seconds: float = 10.0) -> list[int]:
        """Wait until each rank has written its pid to pid<rank>, and return the pids by rank."""
        return [int(self.wait_for(f"pid{rank}", seconds)) for rank in range(count)]

    def wait_for(self, name: str, seconds: float = 10.0) -> str:
        path = self.folder / name
        return str(until(lambda: path.exists() and path.read_text(), seconds))


def until(condition: Callable[[], object], seconds: float = 10.0):  # type: ignore[no-untyped-def]
    """Return the first true value of `condition`, asked again and again; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


def gone(pid: int) -> bool:
    """Return whether no process `pid` runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return re.sub(r".*\) ", "", stat)[0] in "ZX"


# Says where it is by a file that appears whole, then sleeps longer than any test.
READY = """
path = f"pid{rank}"
with open(path + ".new", "w") as f:
    f.write(str(os.getpid()))
os.rename(path + ".new", path)
"""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path)
    yield launch
    for process in launch.started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
