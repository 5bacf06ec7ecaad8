"""Jobs that go well: environment, binding, output, arguments."""

from __future__ import annotations

import ast
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_lowbit.launcher.process import TRAMPOLINE
from tests.launcher.conftest import LIMIT, READY, ROOT, Launch

TWO_CPUS = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs 2 CPUs")


def facts(launch: Launch, count: int) -> list[dict[str, object]]:
    return [ast.literal_eval((launch.folder / f"facts{rank}").read_text()) for rank in range(count)]


FACTS = """
with open(f"facts{rank}", "w") as f:
    f.write(repr(dict(env=dict(os.environ), cpus=sorted(os.sched_getaffinity(0)), argv=sys.argv, stdin=sys.stdin.read(),
                      ppid=os.getppid(), session=os.getsid(0) == os.getpid())))
"""


def test_environment(launch: Launch) -> None:
    assert launch("-n", "2", "--env", "A=b=c", launch.script(FACTS), env={"PMI_RANK": "9"}).returncode == 0
    first, second = (f["env"] for f in facts(launch, 2))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    for rank, env in enumerate((first, second)):
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
        assert env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] == env["LOCAL_SIZE"] == "2"
        assert (env["MASTER_ADDR"], env["A"], env["PYTHONUNBUFFERED"]) == ("127.0.0.1", "b=c", "1")
        assert int(env["OMP_NUM_THREADS"]) >= 1
        assert "PMI_RANK" not in env
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["DIST_LOWBIT_LAUNCH_ID"] == second["DIST_LOWBIT_LAUNCH_ID"]
    launch("-n", "1", launch.script(FACTS))
    again = facts(launch, 1)[0]["env"]
    assert isinstance(again, dict)
    assert again["DIST_LOWBIT_LAUNCH_ID"] != first["DIST_LOWBIT_LAUNCH_ID"]


def test_threads_of_the_user_are_kept(launch: Launch) -> None:
    launch("-n", "1", launch.script(FACTS), env={"OMP_NUM_THREADS": "3"})
    assert facts(launch, 1)[0]["env"]["OMP_NUM_THREADS"] == "3"  # type: ignore[index]


@TWO_CPUS
def test_ranks_are_bound_to_their_own_cores(launch: Launch) -> None:
    launch("-n", "2", "--bind", "core", launch.script(FACTS))
    first, second = (set(f["cpus"]) for f in facts(launch, 2))  # type: ignore[call-overload]
    assert first
    assert second
    assert not first & second
    assert first | second <= os.sched_getaffinity(0)


@TWO_CPUS
def test_a_taskset_is_respected(launch: Launch) -> None:
    cpu = max(os.sched_getaffinity(0))
    script = launch.script(FACTS)
    taskset = ["taskset", "-c", str(cpu)]
    assert launch("-n", "1", "--bind", "core", script, before=taskset).returncode == 0
    assert facts(launch, 1)[0]["cpus"] == [cpu]
    assert launch("-n", "2", script, before=taskset).returncode == 0  # auto: more ranks than cores are not bound
    assert [f["cpus"] for f in facts(launch, 2)] == [[cpu], [cpu]]
    refused = launch("-n", "2", "--bind", "core", script, before=taskset)
    assert refused.returncode == 2
    assert "1 physical core can be used here" in refused.stderr


def test_memory_is_bound_or_it_is_said_why_not() -> None:
    command = [sys.executable, "-I", "-S", TRAMPOLINE, "--nodes", "0", "--", "cat", "/proc/self/numa_maps"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    # A container may forbid the call, a kernel may know no NUMA nodes: then one sentence says so.
    refused = "memory is not bound to NUMA node [0]: " in done.stderr
    assert refused or (lines and all(line.split()[1] == "bind:0" for line in lines))


def test_the_trampoline_picks_the_set_of_the_local_rank() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    sets = f"{cpus[-1]};{cpus[0]}"
    for local_rank, cpu in enumerate((cpus[-1], cpus[0])):
        code = "import os; print(os.sched_getaffinity(0))"
        command = [sys.executable, "-I", "-S", TRAMPOLINE, "--cpus", sets, "--", sys.executable, "-c", code]
        env = {**os.environ, "LOCAL_RANK": str(local_rank)}
        assert subprocess.run(command, capture_output=True, text=True, env=env).stdout == f"{{{cpu}}}\n"
    for env, words in (
        ({}, "cannot bind: none of LOCAL_RANK"),
        ({"LOCAL_RANK": "2"}, "local rank 2 has none of the 2"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 2
        assert words in done.stderr


def test_rank_0_reads_stdin_and_the_others_nothing(launch: Launch) -> None:
    (launch.folder / "in").write_text("hello")
    with open(launch.folder / "in") as stdin:
        launch("-n", "2", launch.script(FACTS), stdin=stdin)
    assert [f["stdin"] for f in facts(launch, 2)] == ["hello", ""]


def test_arguments_reach_the_script_untouched(launch: Launch) -> None:
    script = launch.script(FACTS)
    for extra in ([], ["--"]):
        launch("-n", "1", *extra, script, "-n", "3", "--", "--bind", "x y", "")
        assert facts(launch, 1)[0]["argv"] == [script, "-n", "3", "--", "--bind", "x y", ""]


def test_module(launch: Launch) -> None:
    launch.script(FACTS, "mod.py")
    assert launch("-n", "1", "-m", "mod", "-n", "7").returncode == 0
    assert facts(launch, 1)[0]["argv"][1:] == ["-n", "7"]  # type: ignore[index]


def test_programs(launch: Launch) -> None:
    script = launch.folder / "script"
    script.write_text("#!/bin/sh\necho $RANK of $WORLD_SIZE $1\n")
    script.chmod(0o755)
    for args in ([str(script), "x"], ["sh", str(script), "x"], ["--no-python", "--", str(script), "x"]):
        done = launch("-n", "2", *args)
        assert sorted(done.stdout.splitlines()) == ["[0] 0 of 2 x", "[1] 1 of 2 x"]


def test_lines_are_prefixed_whole(launch: Launch) -> None:
    script = launch.script("""
        for i in range(200):
            print("some", "words", i)
            print("other words", i, file=sys.stderr)
        print("no end", end="")
    """)
    done = launch("-n", "2", script)
    for text, what in ((done.stdout, "some words"), (done.stderr, "other words")):
        for rank in range(2):
            own = [line for line in text.splitlines() if line.startswith(f"[{rank}] {what}")]
            assert own == [f"[{rank}] {what} {i}" for i in range(200)]
    assert sorted(line for line in done.stdout.splitlines() if "no end" in line) == ["[0] no end", "[1] no end"]
    assert len(done.stdout.splitlines()) == 402


def test_without_prefix_rank_0_streams_partial_lines(launch: Launch) -> None:
    script = launch.script("""
        print("tok", end="" if rank == 0 else "\\n")
        while not os.path.exists("go"):
            time.sleep(0.01)
        print("en")
    """)
    process = launch.start("-n", "2", "--no-prefix", script)
    seen = ""
    while "tok" not in seen.replace("[1] tok\n", ""):
        seen += os.read(process.stdout.fileno(), 100).decode()
    (launch.folder / "go").touch()
    seen += process.communicate(timeout=20)[0]
    assert seen.replace("[1] tok\n", "").replace("[1] en\n", "") == "token\n"
    assert "[1] tok\n" in seen


def test_without_prefix_rank_0_has_the_terminal(launch: Launch) -> None:
    leader, follower = pty.openpty()
    script = launch.script("""
        if rank == 0:
            name = input("name? ")
            print(os.isatty(0), os.isatty(1), os.isatty(2), name)
    """)
    process = launch.start("-n", "2", "--no-prefix", script, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    seen = b""
    while b"name? " not in seen:
        seen += os.read(leader, 100)
    os.write(leader, b"you\n")
    assert process.wait(20) == 0
    while b"True True True you" not in seen:
        seen += os.read(leader, 100)
    os.close(leader)


def test_logs(launch: Launch) -> None:
    script = launch.script("print('out', rank); print('err', rank, file=sys.stderr)")
    done = launch("-n", "2", "--log-dir", "logs/deep", "--no-prefix", script)
    assert sorted(p.name for p in (launch.folder / "logs/deep").iterdir()) == [
        "rank0.err", "rank0.out", "rank1.err", "rank1.out"]  # fmt: skip
    assert (launch.folder / "logs/deep/rank1.out").read_text() == "out 1\n"
    assert (launch.folder / "logs/deep/rank0.err").read_text() == "err 0\n"
    assert sorted(done.stdout.splitlines()) == ["[1] out 1", "out 0"]


def test_much_output_for_a_slow_reader_is_complete(launch: Launch) -> None:
    script = launch.script("sys.stdout.write(('x' * 99 + '\\n') * 40000)")  # 4 MB a rank, 1 MiB is the high water
    process = launch.start("-n", "2", script)
    time.sleep(0.3)  # the reader is slow
    out, _ = process.communicate(timeout=25)
    assert process.returncode == 0
    assert out.splitlines().count("[0] " + "x" * 99) == out.splitlines().count("[1] " + "x" * 99) == 40000


def test_a_reader_that_leaves_before_a_dry_run_is_no_traceback(launch: Launch) -> None:
    read, write = os.pipe()
    os.close(read)
    done = launch("--dry-run", "-n", "2", launch.script(""), stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_reader_that_leaves_ends_the_job(launch: Launch) -> None:
    script = launch.script("while True: print('y'); time.sleep(0.001)")
    process = launch.start("-n", "2", script)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(10) == 141  # 128 + SIGPIPE


def test_rank_0_can_listen_on_the_port_and_nobody_else_gets_it(launch: Launch) -> None:
    script = launch.script(
        READY
        + """
port = int(os.environ["MASTER_PORT"])
import socket
exclusive = socket.socket()
try:
    exclusive.bind(("", port))
    sys.exit("the port was free for anybody")
except OSError:
    pass
listener = socket.socket(socket.AF_INET6)  # as torch's store does: dual stack, with SO_REUSEADDR
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("::", port))
listener.listen()
socket.create_connection(("127.0.0.1", port)).close()
print("listening")
"""
    )
    done = launch("-n", "1", script)
    assert (done.returncode, done.stdout) == (0, "[0] listening\n"), done.stderr
    port = free_port()
    for _ in range(2):  # the second time connections of the first may linger
        done = launch("-n", "1", "--master-port", str(port), script)
        assert (done.returncode, done.stdout) == (0, "[0] listening\n"), done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def test_a_rank_that_ends_well_does_not_end_the_job(launch: Launch) -> None:
    done = launch("-n", "2", launch.script("time.sleep(0.5 * rank); print('done', rank)"))
    assert (done.returncode, done.stdout) == (0, "[0] done 0\n[1] done 1\n")


def test_it_starts_from_a_checkout_and_without_the_library(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    (tmp_path / "hello.py").write_text("print('hello')")
    code = """
import sys
import time
from launcher.__main__ import main
code = main(["-n", "1", sys.argv[1]])
heavy = {"torch", "numpy", "dist_lowbit"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "hello.py")], cwd=root, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0] hello\n", "")
    assert subprocess.run([sys.executable, "-m", "launcher", "--help"], cwd=root, stdout=-3).returncode == 0


def test_a_backend_that_cannot_be_prepared_is_one_sentence(launch: Launch) -> None:
    start = ROOT / "launcher" / "start.py"
    # No shim in the cache, and a compiler that makes none.
    environ = {"DIST_LOWBIT_BACKEND": "ccl", "CXX": "/bin/false", "XDG_CACHE_HOME": str(launch.folder)}
    done = subprocess.run(
        [sys.executable, "-P", str(start), "-n", "1", "--bind", "none", "--", "/bin/true"],
        env=os.environ | environ, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "`python -m dist_lowbit.kernels.ccl`, so nothing was started: " in done.stderr
    assert done.stderr.count("\n") == 1
