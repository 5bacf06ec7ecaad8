"""A rank that fails ends the job, at once and by name; a launcher that is killed leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from dist_lowbit.launcher.cause import blame, lost_a_peer
from dist_lowbit.launcher.process import End
from tests.launcher.conftest import READY, Launch, gone, until

HOST = socket.gethostname()
SLEEP = READY + "time.sleep(60)\n"
# Takes SIGTERM and goes on: only SIGKILL ends it.
STUBBORN = "signal.signal(signal.SIGTERM, lambda *_: None)\n" + READY + "while True: time.sleep(60)\n"


def test_a_killed_rank_is_named_and_ends_all(launch: Launch) -> None:
    process = launch.start("-n", "3", launch.script(SLEEP))
    pids = launch.pids(3)
    begin = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    _, err = process.communicate(timeout=5)
    assert time.monotonic() - begin < 2
    assert process.returncode == 128 + signal.SIGKILL
    assert f"rank 1 (pid {pids[1]} on host {HOST}) was killed by signal 9 (SIGKILL)" in err
    assert all(map(gone, pids))


def test_stubborn_ranks_are_killed_after_the_grace(launch: Launch) -> None:
    process = launch.start("-n", "2", "--grace", "1", launch.script(STUBBORN))
    pids = launch.pids(2)
    begin = time.monotonic()
    os.kill(pids[0], signal.SIGKILL)
    process.communicate(timeout=10)
    assert 1 <= time.monotonic() - begin < 3
    assert process.returncode == 137
    assert all(map(gone, pids))


@pytest.mark.slow
def test_a_stopped_rank_is_ended_too(launch: Launch) -> None:
    process = launch.start("-n", "2", "--grace", "0.2", launch.script(STUBBORN))
    pids = launch.pids(2)
    os.kill(pids[0], signal.SIGSTOP)
    os.kill(pids[1], signal.SIGKILL)
    process.communicate(timeout=5)
    assert all(map(gone, pids))


def test_a_rank_that_raises_shows_its_traceback(launch: Launch) -> None:
    script = launch.script("""
        def inner():
            raise ValueError("bad luck")
        if rank == 1:
            inner()
        time.sleep(60)
    """)
    done = launch("-n", "2", script)
    assert done.returncode == 1
    report = done.stderr[done.stderr.index("dist-lowbit run:") :]
    assert "rank 1 (pid " in report
    assert "ended with exit code 1" in report
    assert "in inner" in report
    assert "\n  ValueError: bad luck\n" in report


def test_a_crash_shows_where(launch: Launch) -> None:
    done = launch("-n", "2", launch.script("if rank == 1: os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(60)"))
    assert done.returncode == 128 + signal.SIGSEGV
    assert "rank 1" in done.stderr
    assert "SIGSEGV" in done.stderr
    assert "Fatal Python error: Segmentation fault" in done.stderr


@pytest.mark.parametrize("code", [42, pytest.param(3, marks=pytest.mark.slow)])
def test_the_exit_code_is_the_ranks(launch: Launch, code: int) -> None:
    done = launch("-n", "2", launch.script(f"sys.exit({code}) if rank else time.sleep(60)"))
    assert done.returncode == code
    assert "rank 1 (pid " in done.stderr
    assert f"ended with exit code {code}" in done.stderr


def test_only_the_last_lines_are_repeated(launch: Launch) -> None:
    script = launch.script("for i in range(100): print('line', i, file=sys.stderr)\nsys.exit(5)")
    report = launch("-n", "1", script).stderr.partition("dist-lowbit run:")[2]
    assert report.splitlines()[1:] == [f"  line {i}" for i in range(80, 100)]


KILL, ABORT = End(True, signal.SIGKILL), End(True, signal.SIGABRT)
CAUSES = [
    ([End(False, 1), KILL], 1),
    ([End(False, 7), ABORT], 0),
    ([ABORT, End(False, 7)], 0),
    ([End(False, 3), End(False, 4)], 1),
    ([End(False, 3), ABORT, KILL], 2),
    ([End(False, 3), End(False, 3)], 0),
    ([End(False, 1), End(False, 2)], 0),
    ([End(True, signal.SIGSEGV), KILL], 0),
]


@pytest.mark.parametrize(("ends", "cause"), CAUSES)
def test_the_cause_is_told_from_its_consequences(ends: list[End], cause: int) -> None:
    assert blame(ends, [lost_a_peer(end, []) for end in ends]) == cause


@pytest.mark.parametrize(
    ("end", "last_words", "lost"),
    [
        (End(False, 3), [], True),
        (End(False, 1), ["Traceback (most recent call last):", "pkg.CommError: rank 1 is gone"], True),
        (End(False, 1), ["pkg.CommError: rank 1 is gone", "ValueError: something else"], False),
        (End(True, signal.SIGKILL), ["pkg.CommError: rank 1 is gone"], False),
        (End(False, 1), [], False),
    ],
)
def test_a_lost_peer_is_told_by_code_or_last_words(end: End, last_words: list[str], lost: bool) -> None:
    assert lost_a_peer(end, last_words) is lost


@pytest.mark.slow
def test_a_slow_cause_is_waited_for(launch: Launch) -> None:
    # Rank 0 ends at once with the error about rank 1, which takes longer than the usual window to end.
    script = launch.script(
        "class CommError(Exception): pass\n"
        "if rank == 0: raise CommError('rank 1 is gone')\n"
        "time.sleep(0.7)\nsys.exit(9)"
    )
    done = launch("-n", "2", script)
    assert done.returncode == 9
    assert "rank 1 (pid " in done.stderr.partition("dist-lowbit run:")[2]


@pytest.mark.parametrize("switch", [[], ["--no-prefix"]])
def test_what_all_ranks_say_at_their_end_is_printed_once(launch: Launch, switch: list[str]) -> None:
    # Rank 1 finds it and tells the others, who put its name in front, as dist_lowbit's ranks do.
    script = launch.script("sys.exit('error: ' + 'rank 1: ' * (rank != 1) + 'the file is short')")
    done = launch("-n", "3", "--bind", "none", *switch, script)
    assert done.returncode == 1
    assert done.stderr.count("the file is short") == 1
    assert "[0,1,2] error: the file is short\n" in done.stderr
    assert done.stderr.count("\n") == 2  # and the launcher's own sentence


def test_what_all_ranks_say_is_printed_once_though_they_end_late(launch: Launch) -> None:
    script = launch.script("print('error: no model', file=sys.stderr); time.sleep(0.8 + rank / 20); sys.exit(1)")
    done = launch("-n", "2", "--bind", "none", script)
    assert done.returncode == 1
    assert done.stderr.count("no model") == 1
    assert "[0,1] error: no model\n" in done.stderr


@pytest.mark.slow
def test_a_line_that_looks_like_an_end_is_passed_on_in_time(launch: Launch) -> None:
    process = launch.start("-n", "1", launch.script("print('error: not yet', file=sys.stderr); time.sleep(60)"))
    assert process.stderr.readline() == "[0] error: not yet\n"
    process.terminate()
    process.communicate(timeout=10)


def test_a_stopped_rank_that_the_others_gave_up_is_named_first(launch: Launch) -> None:
    script = launch.script(
        READY + "class CommError(Exception): pass\n"
        "while rank == 0 and not os.path.exists('go'): time.sleep(0.01)\n"
        "if rank == 0: raise CommError('rank 1 was silent')\n"
        "time.sleep(60)"
    )
    process = launch.start("-n", "2", "--bind", "none", script)
    pids = launch.pids(2)
    os.kill(pids[1], signal.SIGSTOP)
    (launch.folder / "go").touch()
    _, err = process.communicate(timeout=10)
    assert process.returncode == 1
    said = err.partition("dist-lowbit run: ")[2]
    assert said.startswith(
        f"rank 1 (pid {pids[1]} on host {HOST}) was stopped by a signal and held up the others: rank 0 "
    )


TOGETHER = {
    "a kill outweighs an exit": ("os._exit(1)", "os.kill(os.getpid(), 9)", 1, 137),
    "a lost peer is not the cause": ("os._exit(3)", "os._exit(4)", 1, 4),
    "the earlier of two exits": ("time.sleep(0.05); os._exit(1)", "os._exit(2)", 1, 2),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_the_cause_is_blamed(launch: Launch, name: str) -> None:
    first, second, blamed, code = TOGETHER[name]
    meet = """
open(f"here{rank}", "w").close()
while not all(os.path.exists(f"here{r}") for r in range(2)):
    time.sleep(0.001)
"""
    done = launch("-n", "2", launch.script(f"{meet}\nif rank == 0:\n    {first}\nelse:\n    {second}\n"))
    assert done.returncode == code, done.stderr
    assert f"dist-lowbit run: rank {blamed} " in done.stderr
    assert f"; at the same time rank {1 - blamed} " in done.stderr


def test_what_a_rank_started_ends_with_the_job(launch: Launch) -> None:
    script = launch.script("""
        import subprocess
        child = subprocess.Popen(["sleep", "60"])
        with open("child.new", "w") as f:
            f.write(str(child.pid))
        os.rename("child.new", "child")
        sys.exit(0)
    """)
    assert launch("-n", "1", script).returncode == 0
    assert gone(int(launch.wait_for("child")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_forwarded(launch: Launch, number: int) -> None:
    script = launch.script(f"""
        def got(number, frame):
            open(f"got{{rank}}", "w").write(str(number))
            sys.exit(9)
        signal.signal({int(number)}, got)
        {READY.replace(chr(10), chr(10) + "        ")}
        time.sleep(60)
    """)
    process = launch.start("-n", "2", script)
    launch.pids(2)
    process.send_signal(number)
    _, err = process.communicate(timeout=5)
    assert [launch.wait_for(f"got{rank}") for rank in range(2)] == [str(int(number))] * 2
    assert process.returncode == 128 + number
    assert f"interrupted by {signal.Signals(number).name}" in err


def test_a_server_that_ends_well_on_sigterm_ends_the_job_well(launch: Launch) -> None:
    script = launch.script("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))" + READY + "time.sleep(60)")
    process = launch.start("-n", "2", script)
    launch.pids(2)
    process.terminate()
    _, err = process.communicate(timeout=5)
    assert (process.returncode, err) == (0, "")


def test_the_second_interrupt_kills(launch: Launch) -> None:
    script = launch.script("signal.signal(signal.SIGINT, lambda *_: open(f'got{rank}', 'w').write('1'))\n" + STUBBORN)
    process = launch.start("-n", "2", "--grace", "60", script)
    pids = launch.pids(2)
    process.send_signal(signal.SIGINT)
    assert [launch.wait_for(f"got{rank}") for rank in range(2)] == ["1", "1"]
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130
    assert all(map(gone, pids))


def test_an_ignored_hangup_stays_ignored(launch: Launch) -> None:
    process = launch.start("-n", "1", launch.script(SLEEP), before=["nohup"])
    (pid,) = launch.pids(1)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    assert not gone(pid)
    process.terminate()
    process.communicate(timeout=5)


def test_a_killed_launcher_leaves_no_rank(launch: Launch) -> None:
    process = launch.start("-n", "2", launch.script(STUBBORN))
    pids = launch.pids(2)
    process.kill()
    process.wait()
    until(lambda: all(map(gone, pids)), 2)


def test_a_killed_launcher_leaves_nothing_that_a_rank_started(launch: Launch) -> None:
    script = launch.folder / "wrapper"
    script.write_text("#!/bin/sh\nsleep 60 &\necho $! > new$RANK\nmv new$RANK child$RANK\nwait\n")
    script.chmod(0o755)
    process = launch.start("-n", "2", str(script))
    children = [int(launch.wait_for(f"child{rank}")) for rank in range(2)]
    process.kill()
    process.wait()
    until(lambda: all(map(gone, children)), 2)


def test_suspended_and_continued(launch: Launch) -> None:
    process = launch.start("-n", "1", launch.script(SLEEP))
    (pid,) = launch.pids(1)

    def state(of: int) -> str:
        with open(f"/proc/{of}/stat") as f:
            return f.read().rpartition(") ")[2][0]

    process.send_signal(signal.SIGTSTP)
    until(lambda: state(process.pid) == state(pid) == "T")
    process.send_signal(signal.SIGCONT)
    until(lambda: state(process.pid) == state(pid) == "S")
    os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=5)
    assert process.returncode == 137
