"""Several hosts and several instances: lists are read, commands are right, and what can be started here is."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dist_lowbit.launcher.__main__ import main
from dist_lowbit.launcher.errors import LaunchError
from dist_lowbit.launcher.hosts import Host, master_of, parse_hostfile, parse_hosts
from dist_lowbit.launcher.options import split, without
from dist_lowbit.launcher.runners import RUNNERS
from dist_lowbit.launcher.runners.mpirun import MpirunRunner
from tests.launcher.conftest import LIMIT, READY, ROOT, Launch, gone, until

AB = [Host("a", 2), Host("b", 3)]
HOSTFILES = [
    ("a slots=2\nb slots=3\n", AB),  # DeepSpeed
    ("# the machines\na slots=2 max_slots=4\n\nb slots=3 # the new one\n", AB),  # Open MPI
    ("a\tslots=2\r\n  b \t slots = 3 max-slots=9", AB),
    ("a:2\nb:3 binding=user:0,1,2\n", AB),  # Hydra
    ("b:1\na\na\nb\nb", [Host("b", 3), Host("a", 2)]),  # -n 1 each; repeated hosts add up
    ("[fe80::1]:2\n10.0.0.1:1", [Host("fe80::1", 2), Host("10.0.0.1", 1)]),
]


@pytest.mark.parametrize(("text", "hosts"), HOSTFILES)
def test_hostfile(text: str, hosts: list[Host]) -> None:
    assert list(parse_hostfile(text, "file", 1)) == hosts


@pytest.mark.parametrize(
    ("text", "each", "hosts"),
    [("a:2,b:3", None, AB), ("a:2, b", 3, AB), ("n1.cluster", 1, [Host("n1.cluster", 1)])],
)
def test_hosts(text: str, each: int | None, hosts: list[Host]) -> None:
    assert list(parse_hosts(text, each)) == hosts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:2,b", "does not say how many ranks b gets; write b:2, or give -n"),
        ("a:0", "gives a 0 ranks; expected 1 to 1024"),
        ("a;b", "'a;b' in --hosts a;b is no host"),
        ("-oProxyCommand=x:1", "is no host"),  # ssh would take it for an option
        (",", "the list of hosts is empty"),
    ],
)
def test_bad_hosts(text: str, words: str) -> None:
    with pytest.raises(LaunchError) as caught:
        parse_hosts(text, None)
    assert words in str(caught.value)


@pytest.mark.parametrize("line", ["b 3", "b slots=two", "b slots=-2", "b slots=1 slots=2", "b c slots=2", "b slots="])
def test_a_bad_line_of_a_hostfile_is_named(line: str) -> None:
    with pytest.raises(LaunchError, match=f"line 2 of file is '{line}'; expected host slots=2 or host:2"):
        parse_hostfile(f"a:1\n{line}\n", "file", None)


def test_two_numbers_of_ranks_are_refused() -> None:
    with pytest.raises(LaunchError, match="line 1 of file is 'a:2 slots=3', which says both 2 ranks and 3; keep one"):
        parse_hostfile("a:2 slots=3", "file", None)


def test_the_master_is_an_address_that_all_reach() -> None:
    own = frozenset({"localhost", "127.0.0.1", "me"})
    assert master_of((Host("localhost", 1), Host("me", 1)), own) == "127.0.0.1"
    assert master_of((Host("x", 1), Host("localhost", 1)), own) == "x"
    assert master_of((Host("localhost", 1), Host("x", 1)), own) == os.uname().nodename


def test_options_can_be_taken_out() -> None:
    own, _ = split(["-n2", "--hosts=a:2", "--bind", "core", "--dry-run", "-x", "A", "-m", "mod", "-n", "3"])
    assert without(own, ("-n", "--hosts", "-x", "--dry-run")) == ["--bind", "core", "-m", "mod"]


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main([*words, "--dry-run", "-m", "mod", "x y"]) == 0
    return capsys.readouterr().out.splitlines()


def test_another_host_is_started_by_ssh(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CCL_LOG_LEVEL": "info", "HF_TOKEN": "secret", "TOKENS": "a b"}.items():
        monkeypatch.setenv(name, value)
    lines = dry_run(capsys, "--hosts", "localhost:2,far:1", "-x", "TOKENS", "--env", "C=d", "--master-port", "29411")
    assert [line for line in lines if line.startswith("# host ")] == ["# host localhost", "# host far"]
    # Under this host's launcher stands what it starts, each rank with its place and variables.
    near, *ranks, far = (shlex.split(line) for line in lines if not line.startswith("#"))
    assert [word for words in ranks for word in words if word.startswith("RANK=")] == ["RANK=0", "RANK=1"]
    assert [line.partition(": ")[0] for line in lines if line.startswith("# rank ")] == ["# rank 0", "# rank 1"]
    assert far[0] == "ssh"
    assert far[-2] == "far"
    shell = shlex.split(far[-1])
    assert shell[:4] == ["cd", os.getcwd(), "&&", "exec"]
    assert "CCL_LOG_LEVEL=info" in shell
    assert "secret" not in far[-1]
    for node, words in enumerate((near, shell)):
        own = words[words.index("-n") :]
        assert own[own.index("--node-rank") + 1] == str(node)
        assert own[:4] == ["-n", "2,1", "--nnodes", "2"]
        assert own[-7:] == ["--env", "TOKENS=a b", "--env", "C=d", "-m", "mod", "x y"]
        assert own[own.index("--master-addr") + 1] == os.uname().nodename
        assert own[own.index("--master-port") + 1] == "29411"


def test_mpiruns_plan_has_the_ranks_of_all_hosts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNNERS, "mpirun", lambda: MpirunRunner("/bin/mpirun", "intel"))
    lines = dry_run(capsys, "--style", "mpirun", "--hosts", "a:1,b:2", "--bind", "none")
    assert lines[0].startswith("# style mpirun, 3 ranks on 2 hosts, each taken to be like this one, bind none, ")
    assert [text.partition(",")[0] for text in lines if text.startswith("# rank ")] == [
        "# rank 0: host a", "# rank 1: host b", "# rank 2: host b"]  # fmt: skip


NNODES = ["--nnodes", "2", "--master-addr", "10.0.0.1", "--master-port", "29411"]


def test_the_same_command_on_each_host(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(capsys, "-n", "1,2", "--node-rank", "1", "--bind", "none", *NNODES)
    assert lines[0].startswith("# style local, 3 ranks (2 on host 1 of 2), bind none, ")
    for rank, text in enumerate(lines[-2:], 1):
        words = set(shlex.split(text))
        assert {f"RANK={rank}", f"LOCAL_RANK={rank - 1}", "WORLD_SIZE=3", "LOCAL_WORLD_SIZE=2"} < words
        assert {"MASTER_ADDR=10.0.0.1", "MASTER_PORT=29411"} < words


def test_instances_are_worlds_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    topology = os.path.join(os.path.dirname(__file__), "golden", "two_sockets_ht.lscpu")
    lines = dry_run(capsys, "-n", "2", "--instances", "3", "--topology", topology, "--bind", "core")
    assert lines[2].startswith("# rank 0 of instance 0: ")
    assert [text.partition("CPUs ")[2].partition(",")[0] for text in lines[2:8]] == [
        "0-8", "9-17", "18-27", "28-36", "37-45", "46-55"]  # fmt: skip
    found = [dict(word.split("=", 1) for word in shlex.split(text) if "=" in word) for text in lines[8:]]
    assert [env["RANK"] for env in found] == ["0", "1"] * 3
    assert {env["WORLD_SIZE"] for env in found} == {"2"}
    for name in ("MASTER_PORT", "DIST_LOWBIT_LAUNCH_ID"):
        values = [env[name] for env in found]
        assert values[::2] == values[1::2]
        assert len(set(values)) == 3


REFUSED = {
    "two lists": (["--hosts", "a:1", "--hostfile", "f"], "--hosts and --hostfile exclude each other"),
    "list and rank": (["--hosts", "a:1", "--node-rank", "1"], "--hosts and --node-rank exclude each other"),
    "no hostfile": (["--hostfile", "none"], "--hostfile none cannot be read"),
    "no node rank": (["-n", "1", *NNODES], "--nnodes needs --node-rank"),
    "no address": (["-n", "1", "--nnodes", "2", "--node-rank", "0"], "--nnodes needs --master-addr and --master-port"),
    "no port": (["-n", "1", *NNODES[:4], "--node-rank", "0"], "--nnodes needs --master-addr and --master-port"),
    "rank too high": (["-n", "1", *NNODES, "--node-rank", "2"], "--node-rank 2 is out of range: expected 0 to 1"),
    "counts": (["-n", "1,2,3", *NNODES, "--node-rank", "0"], "-n 1,2,3 names 3 hosts, but --nnodes says 2"),
    "instances elsewhere": (["-n", "1", "--instances", "2", "--style", "torchrun"], "--instances goes with one host"),
    "instances and port": (["-n", "1", "--instances", "2", "--bind", "none", "--master-port", "29411"],
        "--instances and --master-port exclude each other"),
    "not set": (["-n", "1", "-x", "NO_SUCH_NAME"], "-x NO_SUCH_NAME is refused: it is not set here"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    options, words = REFUSED[name]
    assert main([*options, "-m", "mod"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def ssh_to_nowhere(launch: Launch) -> str:
    """Return a program that takes ssh's arguments and runs the line here, out of reach of its signals, as sshd does."""
    path = launch.folder / "ssh"
    path.write_text('#!/bin/sh\necho "$1" >> hosts\nexec 3<&0\nshift\nsetsid sh -c "$*" <&3 &\nwait $!\n')
    path.chmod(0o755)
    return str(path)


def test_ranks_of_two_hosts_end_together(launch: Launch) -> None:
    ssh = ssh_to_nowhere(launch)
    script = launch.script(READY + "time.sleep(60)\n")
    process = launch.start("--hosts", "localhost:1,far:2", "--bind", "none", "--ssh", ssh, script)
    pids = launch.pids(3)
    assert (launch.folder / "hosts").read_text() == "far\n"
    begun = time.monotonic()
    os.kill(pids[2], signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - begun < 5
    assert process.returncode == 128 + signal.SIGKILL
    assert f"rank 2 (pid {pids[2]} on host " in err
    assert "dist-lowbit run: host far (pid " in err
    assert all(map(gone, pids))


@pytest.mark.parametrize("package", ["launcher", "dist_lowbit.launcher"])
def test_no_folder_shadows_the_standard_library_of_a_hosts_launcher(launch: Launch, package: str) -> None:
    """An editable install maps the package to a folder of the clone, and what lies around it is anybody's."""
    clone = launch.folder / "around" / "clone"
    shutil.copytree(ROOT / "launcher", clone / "launcher", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (launch.folder, clone.parent, clone):
        for name in ("secrets", "socket", "argparse"):
            (folder / f"{name}.py").write_text("raise RuntimeError('shadowed')\n")
    program = f"""
import importlib.machinery, importlib.util, sys, types
if "." in {package!r}:
    parent = sys.modules["dist_lowbit"] = types.ModuleType("dist_lowbit")
    parent.__path__ = []
where = {str(clone / "launcher")!r}
spec = importlib.util.spec_from_file_location({package!r}, where + "/__init__.py", submodule_search_locations=[where])
sys.modules[{package!r}] = importlib.util.module_from_spec(spec)
main = importlib.import_module({package!r} + ".__main__").main
sys.exit(main(["--hosts", "localhost:2", "--bind", "none", "--", "/bin/sh", "-c", "echo $RANK"]))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=launch.folder, capture_output=True, text=True, timeout=LIMIT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["[0] 0", "[1] 1"]


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank_on_any_host(launch: Launch) -> None:
    script = launch.script(READY + "time.sleep(60)\n")
    process = launch.start("--hosts", "localhost:1,far:1", "--bind", "none", "--ssh", ssh_to_nowhere(launch), script)
    pids = launch.pids(2)
    process.kill()
    process.wait()
    until(lambda: all(map(gone, pids)), 5)


def test_instances_here(launch: Launch) -> None:
    done = launch("-n", "1", "--instances", "2", "--bind", "none", launch.script("print(rank, sys.stdin.read())"))
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["[0.0] 0 ", "[1.0] 0 "]
