"""Rank discovery: a row for each launcher, and the sentences for halves and contradictions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.rank import PORTS, discover, job_key, start_time

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-17@1",
    "PMIX_RANK": "1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PALS = {"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4", "PALS_APID": "abc", "PMI_SIZE": "8"}
PALS_ONE_NODE = {"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4", "PALS_APID": "abc"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
TORCHRUN = {**RANKS, **MASTER, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
TORCHRUN |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}

# environment -> rank, world_size, local_rank, local_size, master_addr, master_port (None: derived), source
TABLE = {
    "nothing": ({}, (0, 1, 0, 1, "127.0.0.1", 0, "none")),
    "torchrun": (TORCHRUN, (1, 2, 1, 2, "10.0.0.1", 29500, "torchrun")),
    "deepspeed": ({**RANKS, **MASTER, "LOCAL_SIZE": "2"}, (1, 2, 1, 2, "10.0.0.1", 29500, "environment")),
    "ours": (
        {**RANKS, "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"},
        (1, 2, 1, 2, "127.0.0.1", 1234, "environment"),
    ),
    "by hand": ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1, 2, "127.0.0.1", None, "environment")),
    "open mpi": (OPEN_MPI, (1, 2, 1, 2, "127.0.0.1", None, "openmpi")),
    "intel mpi": (HYDRA, (1, 2, 1, 2, "127.0.0.1", None, "pmi")),
    "intel mpi, two hosts": (
        {**HYDRA, "PMI_SIZE": "4", "PMI_RANK": "3", **MASTER},
        (3, 4, 1, 2, "10.0.0.1", 29500, "pmi"),
    ),
    "mpirun and deepspeed's copies": ({**HYDRA, **RANKS, **MASTER}, (1, 2, 1, 0, "10.0.0.1", 29500, "environment")),
    "pals": ({**PALS, **MASTER}, (5, 8, 1, 4, "10.0.0.1", 29500, "pals")),
    "pals, one node": (PALS_ONE_NODE, (1, 4, 1, 4, "127.0.0.1", None, "pals")),
    "slurm": ({**SLURM, **MASTER}, (4, 5, 0, 1, "10.0.0.1", 29500, "slurm")),
    "slurm, one task": ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0, 1, "127.0.0.1", 0, "none")),
    "slurm, batch script": (
        {name: value for name, value in SLURM.items() if "STEP" not in name},
        (0, 1, 0, 1, "127.0.0.1", 0, "none"),
    ),
    "torchrun in srun": ({**SLURM, **TORCHRUN}, (1, 2, 1, 2, "10.0.0.1", 29500, "torchrun")),
    "torchrun in mpirun": (
        {**TORCHRUN, **HYDRA, "PMI_SIZE": "7", "PMI_RANK": "6"},
        (1, 2, 1, 2, "10.0.0.1", 29500, "torchrun"),
    ),
    "mpirun -n 1": (
        {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
        (0, 1, 0, 1, "127.0.0.1", 0, "pmi"),
    ),
    "a world size of one alone": ({"WORLD_SIZE": "1"}, (0, 1, 0, 1, "127.0.0.1", 0, "none")),
}

REFUSED = {
    "two launchers": ({**HYDRA, "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "says both rank 0 of 4"),
    "two MPIs": ({**HYDRA, **OPEN_MPI, "PMI_SIZE": "3"}, "remove the variables that another launcher left"),
    "no size": ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
    "no rank": ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and no RANK is set"),
    "no number": ({**RANKS, "RANK": "one"}, "RANK is 'one'; expected a whole number"),
    "negative": ({**RANKS, "LOCAL_RANK": "-1"}, "LOCAL_RANK is -1"),
    "rank beyond": ({**RANKS, "RANK": "2"}, "rank 2 of 2"),
    "local rank beyond": ({**HYDRA, "MPI_LOCALRANKID": "2"}, "local rank 2 of 2"),
    "local size beyond": ({**HYDRA, "MPI_LOCALNRANKS": "3"}, "local rank 1 of 3 in a world of 2"),
    "several hosts, no master": ({**HYDRA, "PMI_SIZE": "4"}, "MASTER_ADDR is not set"),
    "several hosts, no local rank": ({"RANK": "0", "WORLD_SIZE": "2", **MASTER}, "set LOCAL_RANK and LOCAL_WORLD_SIZE"),
    "bad port": ({**RANKS, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
    "bad slurm list": ({**SLURM, **MASTER, "SLURM_STEP_TASKS_PER_NODE": "2x3"}, "SLURM_STEP_TASKS_PER_NODE is '2x3'"),
}


@pytest.mark.parametrize("case", TABLE)
def test_launchers(case: str) -> None:
    environ, expected = TABLE[case]
    info = discover(environ, "job")
    port = info.master_port
    got = (info.rank, info.world_size, info.local_rank, info.local_size, info.master_addr, port, info.source)
    if expected[5] is None:
        assert port in PORTS
        expected = (*expected[:5], port, expected[6])
    assert got == expected


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    environ, text = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        discover(environ)
    assert text in str(caught.value)


def test_torchruns_agent_hosts_the_store() -> None:
    info = discover(TORCHRUN)
    assert (info.hosted, info.attempt) == (True, 2)
    assert discover(HYDRA).hosted is False


def test_the_derived_port_is_the_jobs() -> None:
    other_rank = {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "PMIX_RANK": "0"}
    other_job = {**OPEN_MPI, "PMIX_NAMESPACE": "prterun-host-18@1"}
    port = discover(OPEN_MPI).master_port
    assert discover(other_rank).master_port == port
    assert discover(other_job).master_port != port
    assert discover(HYDRA, "4711:99").master_port != discover(HYDRA, "4712:99").master_port


def test_the_job_key_is_the_starter_that_ranks_share() -> None:
    """Two ranks in shells of their own under one launcher get its key."""
    code = "import os; from dist_lowbit.core.rank import job_key; print(job_key(os.getpid()))"
    shell = f'{sys.executable} -c "{code}"; true'  # the `true` keeps the shell between launcher and rank
    script = (
        "import os, subprocess, sys\n"
        "open('/proc/self/comm', 'w').write('hydra_pmi_proxy')\n"
        f"out = [subprocess.run(['sh', '-c', {shell!r}], capture_output=True, text=True).stdout for _ in range(2)]\n"
        "print(os.getpid(), *out)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    pid, first, second = done.stdout.split()
    assert first == second
    assert first.split(":")[0] == pid
    assert job_key(os.getpid()).split(":")[1].isdecimal()
    assert start_time(os.getpid()) > start_time(1) or os.getpid() == 1
