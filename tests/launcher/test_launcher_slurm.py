"""Inside a Slurm allocation one srun starts the ranks: its command, from what Slurm says in the environment."""

from __future__ import annotations

import os
import shlex

import pytest
from test_launcher_styles import END, job
from test_launcher_topology import GOLDEN

from dist_lowbit.launcher.__main__ import main
from dist_lowbit.launcher.job import Job
from dist_lowbit.launcher.runners.foreign import TRAMPOLINE
from dist_lowbit.launcher.runners.slurm import Allocation, SlurmRunner, allocation, expand_nodes
from tests.launcher.conftest import Launch

NODELISTS = [
    ("n1", ["n1"]),
    ("n[1-3]", ["n1", "n2", "n3"]),
    ("cn[008-010,12],login1", ["cn008", "cn009", "cn010", "cn12", "login1"]),
    ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
    ("a-1.cluster,b[7]-ib", ["a-1.cluster", "b7-ib"]),
]


@pytest.mark.parametrize(("text", "names"), NODELISTS)
def test_the_nodes_of_an_allocation(text: str, names: list[str]) -> None:
    assert list(expand_nodes(text)) == names


ALLOCATION = Allocation("4711", ("n1", "n2"), 56)
SRUN = [
    (job(counts=(2, 2)), "--nodes 2 --ntasks 4 --ntasks-per-node 2", "--cpus-per-task 28", ""),
    (job(), "--nodes 1 --ntasks 2 --ntasks-per-node 2", "--cpus-per-task 28", ""),
    (job("two_sockets_ht.lscpu", "numa", counts=(2, 2)), "--nodes 2 --ntasks 4 --ntasks-per-node 2",
     "--cpus-per-task 28", "--cpus '0-27;28-55' --nodes '0;1' "),
]  # fmt: skip


@pytest.mark.parametrize(("of", "shape", "cpus", "bound"), SRUN)
def test_srun(of: Job, shape: str, cpus: str, bound: str) -> None:
    (command,) = SlurmRunner("/bin/srun", ALLOCATION).command(of)
    assert shlex.join(command.argv) == (
        f"/bin/srun {shape} --distribution block --cpu-bind none --kill-on-bad-exit=1 --unbuffered {cpus} --export ALL "
        f"/py -I -S {TRAMPOLINE} {bound}--lines all -- {END}"
    )
    assert command.env["MASTER_PORT"] == "29400"


def test_an_allocation_is_read_from_the_environment() -> None:
    environ = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "56"}
    assert allocation(environ) == ALLOCATION
    assert ALLOCATION.port() in range(20000, 32000)
    assert allocation({"SLURM_JOB_ID": "4711"}) is None


def test_slurm_starts_every_node_of_the_allocation(monkeypatch: pytest.MonkeyPatch, launch: Launch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    srun = launch.folder / "srun"
    srun.write_text("#!/bin/sh\nexit 1\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{launch.folder}:{os.environ['PATH']}")
    for name, value in {"ID": "4711", "NODELIST": "n[1-3]"}.items():
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    script = launch.script("pass")
    words = ["--style", "slurm", "--dry-run", "--topology", str(GOLDEN / "two_sockets_ht.lscpu")]
    assert main(["-n", "auto", *words, script]) == 0
    out = capsys.readouterr().out
    assert "--nodes 3 --ntasks 6 --ntasks-per-node 2 " in out
    assert f"MASTER_ADDR=n1 MASTER_PORT={20000 + 4711}" in out
    assert main(["-n", "1", "--nnodes", "2", *words, script]) == 0
    assert "--nodes 2 --ntasks 2 --ntasks-per-node 1 " in capsys.readouterr().out
    assert main(["-n", "1", "--nnodes", "4", *words, script]) == 2
