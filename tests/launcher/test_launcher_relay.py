"""Under another launcher each rank's output is whole lines behind its rank, and its end stays its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from dist_lowbit.launcher.process import TRAMPOLINE
from dist_lowbit.launcher.runners import RUNNERS
from tests.launcher.conftest import Launch, gone, until


def start(code: str, lines: str = "all", **env: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", TRAMPOLINE, "--lines", lines, "--", sys.executable, "-u", "-c", code]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, env={**os.environ, **env})


PIECES = """
import sys, time
for piece in ("Once", " upon", " a\\nti"):
    sys.stdout.write(piece)
    sys.stdout.flush()
    time.sleep(0.02)
sys.stderr.write("no end")
sys.exit(7)
"""


def test_pieces_become_lines() -> None:
    process = start(PIECES, PMI_RANK="3")
    assert process.communicate(timeout=20) == (b"[3] Once upon a\n[3] ti\n", b"[3] no end\n")
    assert process.returncode == 7


@pytest.mark.parametrize(("rank", "seen"), [("0", b"Once upon a\nti"), ("1", b"[1] Once upon a\n[1] ti\n")])
def test_rank_0_may_stream(rank: str, seen: bytes) -> None:
    assert start(PIECES, "others", RANK=rank).communicate(timeout=20)[0] == seen


def test_a_signal_is_passed_on_and_its_death_repeated() -> None:
    process = start("import time; print('up'); time.sleep(60)", RANK="1")
    assert process.stdout is not None
    assert process.stdout.readline() == b"[1] up\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_a_killed_relay_leaves_no_rank() -> None:
    process = start("import os, time; print(os.getpid()); time.sleep(60)", RANK="1")
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[1])
    process.kill()
    process.communicate(timeout=10)
    until(lambda: gone(pid), 5)


def test_what_a_rank_leaves_behind_is_not_waited_for() -> None:
    begun = time.monotonic()
    process = start("import subprocess; subprocess.Popen(['sleep', '30']); print('done')", RANK="1")
    assert process.stdout is not None
    assert process.stdout.readline() == b"[1] done\n"
    assert process.wait(10) == 0
    assert time.monotonic() - begun < 10
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("style", ["mpirun"])
def test_streamed_pieces_of_several_ranks_are_whole_lines(launch: Launch, style: str) -> None:
    why_not = RUNNERS[style]().why_not()
    if why_not is not None:
        pytest.skip(f"--style {style} cannot be used: {why_not}")
    path = launch.folder / "streams.py"
    path.write_text(
        "import sys, time\n"
        "for i in range(40):\n"
        "    sys.stdout.write('tok' + '\\n' * (i % 10 == 9))\n"
        "    sys.stdout.flush()\n"
        "    time.sleep(0.005)\n"
    )
    done = launch("-n", "2", "--bind", "none", "--style", style, str(path))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] " + "tok" * 10] * 4 + ["[1] " + "tok" * 10] * 4
