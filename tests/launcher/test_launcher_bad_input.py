"""A request that cannot be honoured is one sentence and exit code 2, and starts nothing."""

from __future__ import annotations

import socket

import pytest

from dist_lowbit.launcher.__main__ import main
from tests.launcher.conftest import Launch

BAD = {
    "no -n": (["ok.py"], "the following arguments are required: -n"),
    "-n 0": (["-n", "0", "ok.py"], "-n 0 does not fit: a job has at least 1 rank"),
    "-n negative": (["-n", "-2", "ok.py"], "-n -2 does not fit"),
    "-n no number": (["-n", "two", "ok.py"], "-n two is no whole number"),
    "-n missing": (["-n"], "expected one argument"),
    "-n huge": (["-n", "100000", "ok.py"], "-n 100000 does not fit"),
    "-n over cores": (["-n", "1000", "--bind", "core", "ok.py"], "-n 1000 does not fit"),
    "-n over nodes": (
        ["-n", "9", "--bind", "numa", "--dry-run", "--topology", "snc4.txt", "ok.py"], "8 NUMA nodes can be used here"),
    "bind": (["-n", "1", "--bind", "l3", "ok.py"], "invalid choice: 'l3'"),
    "instances over cores": (["-n", "2", "--instances", "99", "ok.py"], "--instances 99 makes 198 ranks: -n 198"),
    "instances of hosts": (["--hosts", "a:2", "--instances", "2", "ok.py"], "--hosts and --instances exclude"),
    "ssh": (["--hosts", "a:2", "--ssh", "ssh 'x", "ok.py"], "--ssh ssh 'x is no command (No closing quotation)"),
    "ssh empty": (["--hosts", "a:2", "--ssh", "", "ok.py"], "--ssh is empty; expected a command"),
    "no hostfile": (["--hostfile", "none", "ok.py"], "--hostfile none cannot be read"),
    "hostfile": (["--hostfile", "ok.py", "ok.py"], "line 1 of ok.py is"),
    "auto of hosts": (["-n", "auto", "--hosts", "a,b", "ok.py"], "-n auto is for one host, or --nnodes of one kind"),
    "auto word": (["-n", "autos", "ok.py"], "-n autos is no whole number"),
    "style": (["-n", "1", "--style", "ssh", "ok.py"], "invalid choice: 'ssh'"),
    "unknown option": (["-n", "1", "--binds", "core", "ok.py"], "--binds"),
    "nothing to run": (["-n", "1"], "nothing to run"),
    "nothing after --": (["-n", "1", "--"], "nothing to run"),
    "no such script": (["-n", "1", "missing.py"], "missing.py does not exist here and is no program on PATH"),
    "not executable": (["-n", "1", "notes.txt"], "notes.txt is neither a .py file nor executable"),
    "a directory": (["-n", "1", "folder"], "folder is a directory without __main__.py"),
    "-m with --no-python": (["-n", "1", "--no-python", "-m", "x"], "exclude each other"),
    "env form": (["-n", "1", "--env", "A", "ok.py"], "--env 'A' is not of the form NAME=VALUE"),
    "env contract": (["-n", "1", "--env", "RANK=3", "ok.py"], "--env RANK is refused"),
    "env port": (["-n", "1", "--env", "MASTER_PORT=3", "ok.py"], "use --master-port"),
    "port": (["-n", "1", "--master-port", "70000", "ok.py"], "--master-port 70000 is out of range"),
    "grace": (["-n", "1", "--grace", "soon", "ok.py"], "--grace soon is no number of seconds"),
    "grace nan": (["-n", "1", "--grace", "nan", "ok.py"], "--grace nan is no number of seconds"),
    "log-dir": (["-n", "1", "--log-dir", "ok.py/logs", "ok.py"], "--log-dir ok.py/logs cannot be made"),
    "topology without dry-run": (["-n", "1", "--topology", "snc4.txt", "ok.py"], "it needs --dry-run"),
    "no topology": (["-n", "1", "--dry-run", "--topology", "none", "ok.py"], "--topology none cannot be read"),
    "topology": (["-n", "1", "--dry-run", "--topology", "ok.py", "ok.py"], "is no line of `lscpu -p"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_request(
    launch: Launch, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from test_launcher_topology import GOLDEN

    monkeypatch.chdir(launch.folder)
    (launch.folder / "ok.py").write_text("open('started', 'w')")
    (launch.folder / "notes.txt").write_text("notes")
    (launch.folder / "folder").mkdir()
    (launch.folder / "snc4.txt").write_text((GOLDEN / "two_sockets_snc4_ht.lscpu").read_text())
    arguments, words = BAD[name]
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("dist-lowbit run: ")
    assert words in err
    assert err.count("\n") == 1
    assert not (launch.folder / "started").exists()


def test_a_port_that_is_taken(launch: Launch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = launch("-n", "1", "--master-port", port, launch.script("print('started')"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--master-port {port} cannot be used: Address already in use" in done.stderr


def test_a_program_that_cannot_be_executed(launch: Launch) -> None:
    program = launch.folder / "broken"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    done = launch("-n", "1", str(program))
    assert done.returncode == 127
    assert "cannot run" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "--bind" in capsys.readouterr().out
