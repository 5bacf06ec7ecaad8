"""A save that is killed anywhere leaves the checkpoint before it, or the new one, and never anything else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from checkpoint_saving import random_weight, same, save

import dist_lowbit.checkpoint
from dist_lowbit.checkpoint import CheckpointReader, verify

OLD, NEW = random_weight("sym_int4", (4, 64), 32, 1), random_weight("sym_int4", (4, 64), 32, 2)
PACKAGE = str(Path(dist_lowbit.checkpoint.__file__).parent)


def child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at_line(files: tuple[str, ...], line: int) -> None:
    """End this process, as kill -9 would, before it runs the line-th line of the given modules."""
    seen = 0

    def count(frame: FrameType, event: str, arg: object) -> Callable[..., object] | None:
        nonlocal seen
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os._exit(9)
        return count

    sys.settrace(count)


def kill_everywhere(folder: Path, files: tuple[str, ...], step: int) -> int:
    """Kill a save at every step-th line, each time over a sound checkpoint; return how many were killed."""
    deaths = 0
    while True:
        save(folder, 1, {"w": (OLD, 0)}, {"t": torch.zeros(3)})

        def work(line: int = 1 + deaths * step) -> None:
            die_at_line(files, line)
            save(folder, 2, {"w": (NEW, 0)}, {"t": torch.ones(3)})

        code = child(work)
        with CheckpointReader(folder) as reader:
            new = reader.tp == 2
            assert same(reader.read_weight("w"), NEW if new else OLD)
            assert bool(reader.read_tensor("t").eq(float(new)).all())
        assert verify(folder).ok
        if code == 0:
            assert new
            return deaths
        assert code == 9
        deaths += 1


def test_killed_all_over_the_commit(tmp_path: Path) -> None:
    assert kill_everywhere(tmp_path, (f"{PACKAGE}/commit.py",), 3) > 20


def test_killed_all_over_the_writer(tmp_path: Path) -> None:
    assert kill_everywhere(tmp_path, (f"{PACKAGE}/writer.py",), 11) > 10


def test_a_first_save_that_is_killed_leaves_no_checkpoint(tmp_path: Path) -> None:
    def work() -> None:
        die_at_line((f"{PACKAGE}/commit.py",), 20)
        save(tmp_path, 2, {"w": (NEW, 0)})

    assert child(work) == 9
    assert not (tmp_path / "lowbit.json").exists()
    save(tmp_path, 2, {"w": (NEW, 0)})  # what was left behind is in nobody's way
    report = verify(tmp_path)
    assert report.ok
    assert len(report.unlisted) == 2


def test_savers_and_a_reader_at_once(tmp_path: Path) -> None:
    """Three processes save into one directory while a fourth reads: it always sees one whole save."""
    save(tmp_path, 1, {}, {"a": torch.zeros(4), "b": torch.zeros(4)})

    def saver(number: int) -> Callable[[], None]:
        def work() -> None:
            for i in range(12):
                value = torch.full((4,), float(number * 100 + i))
                save(tmp_path, number, {}, {"a": value, "b": value})

        return work

    pids = []
    for number in (1, 2, 3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                saver(number)()
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    seen = set()
    running = set(pids)
    while running:
        with CheckpointReader(tmp_path) as reader:
            a, b = reader.read_tensor("a"), reader.read_tensor("b")
            assert torch.equal(a, b)
            seen.add(float(a[0]))
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.discard(pid)
                assert status == 0
    assert len(seen) > 3
    assert verify(tmp_path).ok


@pytest.mark.parametrize("count", [1, 4])
def test_every_save_has_names_of_its_own(count: int) -> None:
    from dist_lowbit.checkpoint import shard_names

    names = [shard_names(count) for _ in range(100)]
    assert len({name for each in names for name in each}) == 100 * count
    assert shard_names(2, "01234567")[1] == "lowbit-01234567-00002-of-00002.safetensors"
