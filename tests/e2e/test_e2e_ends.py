"""A rank that dies, stops or fails in mid-generation ends the job, at once and by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dist_lowbit.sample
from dist_lowbit.optimize import convert
from tests.e2e.command_line import start

SHM = Path("/dev/shm")
WITHIN = 5.0  # seconds for the launcher to end the others
SILENCE = 3.0  # DIST_LOWBIT_TIMEOUT of the test that stops a rank

FAILS = """
import sys
from dist_lowbit.comm import init_group
from dist_lowbit.engine.generate import generate
from dist_lowbit.engine.session import open_session

pieces = []

def fail(text):
    pieces.append(text)
    if len(pieces) == 5:
        raise ValueError("the fifth piece")

with init_group() as group:
    session = open_session(sys.argv[1], group)
    generate(session, "Once upon a time", 900, on_text=fail if group.rank == 1 else None)
"""


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of the sample model that never ends a story by itself."""
    place = tmp_path_factory.mktemp("endless")
    convert(dist_lowbit.sample.path(), place, "sym_int4", tp=2)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps(values | {"eos_token_id": None}))
    return place


def children(pid: int) -> dict[int, dict[str, str]]:
    """Return the environment of each process that descends from one, by pid."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, new = {}, {pid}
    while new := {child for child, parent in parents.items() if parent in new}:
        for child in new:
            try:
                words = Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace").split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            found[child] = dict(word.partition("=")[::2] for word in words if "=" in word)
    return found


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def generating(endless: Path) -> Iterator[tuple[subprocess.Popen[str], dict[int, int], list[int]]]:
    """Return a `dist-lowbit generate -n 2` that has begun to write, its ranks' pids, and all pids below it."""
    words = ("generate", str(endless), "-n", "2", "--greedy", "--max-new-tokens", "1000", "--prompt", "Once")
    process = start(*words, DIST_LOWBIT_TIMEOUT=str(SILENCE))
    try:
        assert process.stdout is not None
        first = process.stdout.read(len("Once upon a time, there was"))
        assert first.startswith("Once"), first or process.communicate()[1]
        below = children(process.pid)
        ranks = {int(env["RANK"]): pid for pid, env in below.items() if "RANK" in env}
        assert sorted(ranks) == [0, 1]
        yield process, ranks, list(below)
    finally:
        for pid in [*children(process.pid), process.pid]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def finish(process: subprocess.Popen[str], seconds: float) -> tuple[str, float]:
    """Wait for a process's end; return its stderr and how long it took."""
    begun = time.monotonic()
    _, err = process.communicate(timeout=seconds + 20)
    return err, time.monotonic() - begun


def nothing_left(pids: list[int], before: set[str]) -> None:
    """Check that no process below the launcher lives on, and that /dev/shm holds nothing new."""
    deadline = time.monotonic() + 2  # the guard outlives the launcher by an instant
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if alive(pid)]
    assert not {path.name for path in SHM.iterdir()} - before


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_job(generating, rank: int) -> None:  # type: ignore[no-untyped-def]
    process, ranks, below = generating
    before = {path.name for path in SHM.iterdir()}
    os.kill(ranks[rank], signal.SIGKILL)
    err, took = finish(process, WITHIN)
    assert took < WITHIN
    assert process.returncode == 128 + signal.SIGKILL
    assert f"rank {rank} (pid {ranks[rank]} on host" in err
    assert "SIGKILL" in err
    nothing_left(below, before)


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job(generating) -> None:  # type: ignore[no-untyped-def]
    process, ranks, below = generating
    before = {path.name for path in SHM.iterdir()}
    os.kill(ranks[1], signal.SIGSTOP)
    err, took = finish(process, SILENCE + WITHIN)
    assert SILENCE - 0.5 < took < SILENCE + WITHIN
    assert process.returncode == 3
    assert f"rank 1 (pid {ranks[1]}" in err
    assert "was silent for 3 s (it is stopped)" in err
    assert "Traceback" not in err
    nothing_left(below, before)


@pytest.mark.slow
def test_a_failing_rank_ends_the_job(endless: Path, tmp_path: Path) -> None:
    before = {path.name for path in SHM.iterdir()}
    (tmp_path / "fails.py").write_text(FAILS)
    process = start("-n", "2", str(tmp_path / "fails.py"), str(endless), module="dist_lowbit.launcher")
    try:
        err, _ = finish(process, 60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "ValueError: the fifth piece" in err
    assert "dist-lowbit run: rank 1 (pid " in err
    nothing_left([], before)
