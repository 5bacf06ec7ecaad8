"""The oneCCL shim: built once whoever asks, refused in a sentence, and the environment that oneCCL is given."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dist_lowbit.comm.ccl import environment
from dist_lowbit.core.rank import RankInfo
from dist_lowbit.kernels import ccl
from dist_lowbit.kernels.ccl import build
from tests.comm.conftest import require
from tests.comm.harness import ROOT, Farm

PAIR = RankInfo(1, 2, 1, 2, "127.0.0.1", 1, "test")
OFI = {"CCL_ATL_TRANSPORT": "ofi", "CCL_PROCESS_LAUNCHER": "none", "FI_PROVIDER": "tcp"}
OFI |= {"CCL_ATL_OFI_MAX_RETRY_COUNT": "10"}
ALWAYS = {"CCL_LOG_LEVEL": "error", "CCL_WORKER_OFFLOAD": "0"}

ENVIRONMENTS = {
    "nothing": ({}, ALWAYS | OFI | {"CCL_LOCAL_RANK": "1", "CCL_LOCAL_SIZE": "2"}),
    "intel mpi": ({"PMI_RANK": "1", "I_MPI_MPIRUN": "mpirun"}, ALWAYS),
    "mpich": ({"PMI_RANK": "1"}, ALWAYS | OFI | {"CCL_LOCAL_RANK": "1", "CCL_LOCAL_SIZE": "2"}),
    "the user's own": ({"CCL_ATL_TRANSPORT": "mpi", "CCL_LOG_LEVEL": "info"}, {"CCL_WORKER_OFFLOAD": "0"}),
    "another provider": (
        {"FI_PROVIDER": "verbs"},
        ALWAYS | OFI | {"FI_PROVIDER": "verbs", "CCL_LOCAL_RANK": "1", "CCL_LOCAL_SIZE": "2"},
    ),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment(case: str) -> None:
    environ, expected = ENVIRONMENTS[case]
    assert environ | environment(PAIR, environ) == environ | expected


@pytest.mark.parametrize(("size", "mpi4py", "over"), [(2, False, True), (4, False, False), (4, True, True)])
def test_mpi_is_used_where_all_ranks_start_it(size: int, mpi4py: bool, over: bool) -> None:
    """A group of two of `size` ranks, such as the leaders of two machines: mpi4py has started MPI on the others."""
    environ = {"PMI_RANK": "1", "PMI_SIZE": str(size), "I_MPI_MPIRUN": "mpirun"}
    assert ("CCL_ATL_TRANSPORT" not in environment(PAIR, environ, None, mpi4py)) == over


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PARTS", {"no-such-package": "libnothing.so"})
    assert ccl.built() is None
    assert "the package no-such-package is not installed (pip install --no-deps oneccl-devel" in str(ccl.why_not())
    with pytest.raises(ccl.ShimMissing, match="no-such-package"):
        ccl.ensure()


def test_no_compiler_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require("ccl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in str(ccl.why_not())
    with pytest.raises(ccl.ShimMissing, match="no C"):
        ccl.ensure()


def test_a_failed_build_is_a_sentence_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require("ccl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "SOURCE", tmp_path / "broken.cpp")
    build.SOURCE.write_text("#error on purpose\n")
    with pytest.raises(ccl.ShimMissing, match=r"cannot build the oneCCL shim: .*on purpose"):
        ccl.ensure()
    assert [path.name for path in (tmp_path / "dist_lowbit").iterdir()] == ["ccl.lock"]


def test_many_processes_build_once(tmp_path: Path) -> None:
    require("ccl")
    log = tmp_path / "compilations"
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho x >> {log}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler)}
    command = [sys.executable, "-m", "dist_lowbit.kernels.ccl"]
    processes = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0] for process in processes}
    assert len(paths) == 1
    path = Path(paths.pop().strip())
    assert path.is_file()
    assert path.name.startswith("ccl-")
    assert log.read_text() == "x\n"


@pytest.mark.parametrize("calls", ["plain", pytest.param("layered", marks=pytest.mark.slow)])
def test_torch_distributed_over_ccl(farm: Farm, calls: str) -> None:
    """Every call; at last rank 2 dies, and rank 0, which waits for a message of it, hears so."""
    require("ccl")
    outcome = farm.run("torch_ccl", 3, {"calls": calls}, timeout=60)
    assert outcome.values.keys() == {0, 1}, outcome.errors or outcome.output
    assert outcome.values[1] == "done"
    assert outcome.note("done", 2)
    assert outcome.values[0].startswith("2: rank 2 (pid "), outcome.values
    assert "has died or closed its group; rank 0 waited for it in a message" in outcome.values[0]


@pytest.mark.parametrize(("version", "used"), [("2.13.1+cpu", True), ("2.12.0", False), (None, False)])
def test_bindings_are_used_where_they_are_for_this_torch(
    monkeypatch: pytest.MonkeyPatch, version: str | None, used: bool
) -> None:
    from dist_lowbit.comm import torch_ccl

    def installed(name: str) -> str:
        if version is None or name != "oneccl_bindings_for_pytorch":
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    assert torch_ccl.bindings_version() == (version if used else None)


# What pip would leave behind for the bindings, and what they do at import: register a backend of their own.
BINDINGS = """
import torch.distributed as dist
dist.Backend.register_backend("ccl", lambda store, rank, size, timeout: None, devices=["cpu"])
"""
REGISTERS = """
import sys
import torch.distributed as dist
from dist_lowbit.comm import torch_ccl
function = dist.Backend._plugins["CCL"].creator_fn
print(function is torch_ccl._create, "oneccl_bindings_for_pytorch" in sys.modules, torch_ccl.register())
"""


@pytest.mark.parametrize(
    ("matching", "said"), [(True, "False True"), pytest.param(False, "True False", marks=pytest.mark.slow)]
)
def test_register_imports_bindings_of_this_torch_and_no_others(matching: bool, said: str, tmp_path: Path) -> None:
    """The bindings themselves do not install beside this torch: a package of their name stands on the path instead."""
    version = torch.__version__.partition("+")[0] if matching else "1.13.0"
    described = tmp_path / f"oneccl_bindings_for_pytorch-{version}.dist-info"
    described.mkdir()
    name = "oneccl_bindings_for_pytorch"
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / f"{name}.py").write_text(BINDINGS)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", REGISTERS],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{said} registered before\n"
    assert ("is for another torch than" in done.stderr) is not matching
