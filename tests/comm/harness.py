"""Real ranks for tests: one helper process imports torch once and forks a process per rank.

A body is a function `body(job: Job) -> JSON value` of a module that the farm is given; every rank runs it in its own
process.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """What a rank is told."""

    rank: int
    size: int
    folder: Path
    args: dict[str, Any]

    def note(self, name: str, value: object = None) -> None:
        """Leave a value for the test, also from a rank that is about to die."""
        (self.folder / f"{name}.{self.rank}").write_text(json.dumps(value))


@dataclass
class Outcome:
    """What came of the ranks. `values` has an entry for each rank that returned."""

    folder: Path
    late: list[int]  # ranks that did not end in time
    values: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    output: str = ""

    def note(self, name: str, rank: int) -> Any:
        """Return what a rank left."""
        return json.loads((self.folder / f"{name}.{rank}").read_text())


def free_port() -> int:
    """Return a port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Farm:
    """The helper process: its runs cost a fork for each rank instead of an import of torch.

    `wrapper` is a command that runs it, such as one that changes the name space; `bodies` the modules of the bodies.
    """

    def __init__(self, folder: Path, wrapper: tuple[str, ...] = (), *bodies: str) -> None:
        self.folder = folder
        self.runs = 0
        foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        clean = {name: value for name, value in os.environ.items() if name not in foreign}
        clean["PYTHONPATH"] = str(ROOT)
        command = [*wrapper, sys.executable, "-m", "tests.comm.harness", ",".join(bodies or ("tests.comm.bodies",))]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=clean, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        body: str,
        size: int,
        args: dict[str, Any] | None = None,
        lost: tuple[int, ...] = (),
        timeout: float = 60.0,
        environ: dict[str, str] | None = None,
    ) -> Outcome:
        """Run `body` on `size` ranks. Those in `lost` are not waited for, and killed when the others are done."""
        place = self.folder / str(self.runs)
        self.runs += 1
        place.mkdir(parents=True)
        spec = {"body": body, "size": size, "args": args or {}, "lost": lost, "timeout": timeout}
        spec |= {"environ": environ or {}, "folder": str(place), "port": free_port()}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(spec) + "\n")
        self.process.stdin.flush()
        late = json.loads(self.process.stdout.readline())
        return _collect(place, size, late, (place / "output").read_text())

    def close(self) -> None:
        """End the helper process."""
        self.process.communicate(timeout=30)


def run_under_mpirun(
    folder: Path, body: str, size: int, args: dict[str, Any], timeout: float = 100.0, wrapper: tuple[str, ...] = ()
) -> Outcome:
    """Run `body` of tests.comm.bodies on ranks that mpirun starts; each imports torch for itself."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = {"body": body, "size": size, "args": args, "folder": str(folder)}
    command = [*wrapper, mpirun(), "-n", str(size), sys.executable, "-m", "tests.comm.harness", "tests.comm.bodies"]
    process = subprocess.Popen(
        [*command, json.dumps(spec)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks, too
        output = process.communicate()[0] + f"\nnot done within {timeout:g} s"
    return _collect(folder, size, [], output)


def mpirun() -> str:
    """Return the mpirun of this environment."""
    return str(Path(sys.executable).with_name("mpirun"))


def _collect(folder: Path, size: int, late: list[int], output: str) -> Outcome:
    outcome = Outcome(folder, late=late, output=output)
    for rank in range(size):
        path = folder / f"result.{rank}"
        if path.exists():
            result = json.loads(path.read_text())
            (outcome.values if result["ok"] else outcome.errors)[rank] = result["value"]
    return outcome


def _rank_main(spec: dict[str, Any], rank: int) -> None:
    size = spec["size"]
    ours = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": spec["port"], **spec["environ"]}
    os.environ.update({name: str(value) for name, value in ours.items()})
    _run_body(spec, rank)


def _run_body(spec: dict[str, Any], rank: int) -> None:
    import torch

    modules = import_bodies()
    body = next(getattr(module, spec["body"]) for module in modules if hasattr(module, spec["body"]))
    torch.set_num_threads(1)
    job = Job(rank, spec["size"], Path(spec["folder"]), spec["args"])
    try:
        result = {"ok": True, "value": body(job)}
    except BaseException:
        result = {"ok": False, "value": traceback.format_exc()}
    temporary = job.folder / f"writing.{rank}"
    temporary.write_text(json.dumps(result))
    temporary.rename(job.folder / f"result.{rank}")


def import_bodies() -> list[ModuleType]:
    return [importlib.import_module(name) for name in sys.argv[1].split(",")]


def start(spec: dict[str, Any]) -> list[int]:
    """Fork the ranks, wait for those that are expected to end, and return those that did not."""
    pids: dict[int, int] = {}
    output = os.open(Path(spec["folder"]) / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for rank in range(spec["size"]):
        pid = os.fork()
        if pid == 0:
            os.dup2(output, 1)
            os.dup2(output, 2)
            _rank_main(spec, rank)
            if spec["args"].get("whole_exit"):
                sys.exit(0)
            atexit._run_exitfuncs()  # finalizers, as at an ordinary end; the rest of it takes a second
            os._exit(0)
        pids[rank] = pid
    os.close(output)
    deadline = time.monotonic() + spec["timeout"]
    waiting = {rank: pid for rank, pid in pids.items() if rank not in spec["lost"]}
    while waiting and time.monotonic() < deadline:
        for rank, pid in list(waiting.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del waiting[rank]
        time.sleep(0.005)
    # The dead stay zombies until here, which is what a surviving rank meets under a launcher, too.
    for pid in [*waiting.values(), *(pids[rank] for rank in spec["lost"])]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return sorted(waiting)


def main() -> None:
    """Make the runs that come in, one a line, and answer each with the ranks that did not end in time.

    With a run as second argument this process is one of its ranks, started by mpirun.
    """
    if len(sys.argv) > 2:
        from dist_lowbit.core.rank import current

        _run_body(json.loads(sys.argv[2]), current().rank)
        return
    import_bodies()  # torch and the package, before any fork
    while line := sys.stdin.readline():
        print(json.dumps(start(json.loads(line))), flush=True)
    atexit._run_exitfuncs()  # as in a rank
    os._exit(0)


if __name__ == "__main__":
    main()
