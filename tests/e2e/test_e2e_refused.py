"""Jobs that cannot form: a port that is taken, ranks that were told different numbers, no room in /dev/shm."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_lowbit.comm import BACKENDS
from dist_lowbit.core.rank import RankInfo
from tests.e2e.command_line import ROOT, environment

FORMS = (
    "from dist_lowbit.comm import init_group\nwith init_group() as group:\n    group.barrier()\n    print(group.name)\n"
)
TIMEOUT = 6.0  # seconds, DIST_LOWBIT_TIMEOUT: the ranks' imports must not differ by more
WITHIN = 20.0  # seconds for all of a job, the imports on two busy cores included


def start(*words: str, before: tuple[str, ...] = (), **changes: str) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-m", "dist_lowbit.launcher", "--bind", "none", *words]
    env = environment(DIST_LOWBIT_TIMEOUT=str(TIMEOUT), **changes)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_a_port_that_another_process_takes_is_named(tmp_path: Path) -> None:
    """The launcher of host 0 holds the port; started by hand with RANK set, a rank finds out for itself."""
    (tmp_path / "forms.py").write_text(FORMS)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        held = start("-n", "2", "--master-port", port, str(tmp_path / "forms.py"))
        assert f"--master-port {port} cannot be used: Address already in use" in held.communicate(timeout=60)[1]
        assert held.returncode == 2
        begun = time.monotonic()
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        env = environment(DIST_LOWBIT_TIMEOUT=str(TIMEOUT), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **ranks)
        done = subprocess.run(
            [sys.executable, str(tmp_path / "forms.py")], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "CommError: " in done.stderr
        assert port in done.stderr.splitlines()[-1]
        assert time.monotonic() - begun < TIMEOUT + WITHIN


@pytest.mark.slow
def test_ranks_that_were_told_different_numbers_end_by_name(tmp_path: Path) -> None:
    (tmp_path / "forms.py").write_text(FORMS)
    port = free_port()
    words = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    hosts = [
        start("-n", numbers, *words, "--node-rank", node, str(tmp_path / "forms.py"))
        for node, numbers in (("0", "1,2"), ("1", "1,1"))  # ranks 0 of 3, 1 of 2
    ]
    said = [host.communicate(timeout=TIMEOUT + 60)[1] for host in hosts]
    assert all(host.returncode not in (0, None) for host in hosts)
    assert all("rank 0 was started in a world of 3 and rank 1 in one of 2" in err for err in said), said


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "shm"])
def test_a_full_dev_shm_is_said_and_gone_around(backend: str, tmp_path: Path) -> None:
    wrapper = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    wrapper += ('mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh")
    if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces for tests here")
    (tmp_path / "forms.py").write_text(FORMS)
    job = start("-n", "2", str(tmp_path / "forms.py"), before=wrapper, DIST_LOWBIT_BACKEND=backend)
    out, err = job.communicate(timeout=120)
    assert "/dev/shm has no room" in err
    if backend == "auto":
        used = "ccl" if BACKENDS["ccl"].why_not(RankInfo(0, 2, 0, 2, "127.0.0.1", 1, "test")) is None else "gloo"
        said = [line for line in out.splitlines() if "CCL_" not in line]  # oneCCL's own
        assert (job.returncode, sorted(said)) == (0, [f"[0] {used}", f"[1] {used}"])
        assert err.count(f"{used} is used instead of shm") == 1
    else:
        assert job.returncode not in (0, None)
    assert not [name for name in os.listdir("/dev/shm") if "dist_lowbit" in name and str(job.pid) in name]
