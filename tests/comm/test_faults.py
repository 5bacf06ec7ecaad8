"""What happens when a rank dies, stops, leaves or makes another call: an error that names it, in time."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dist_lowbit.comm import why_not
from tests.comm.conftest import PAIR, require, require_mpirun
from tests.comm.harness import Farm, Outcome, run_under_mpirun

EACH = pytest.mark.parametrize("backend", ["shm", "ccl", "gloo"])
MOST = pytest.mark.parametrize("backend", ["shm", pytest.param("ccl", marks=pytest.mark.slow), "gloo"])
VICTIM = 1
TIMEOUT = 1.5  # seconds of silence
SCHEDULING = 0.7  # what a loaded machine of two cores may add

# How the victim ends, the text that tells so, and the seconds within which all must know.
FATES = {
    "SIGKILL": ("has died", 1.0),
    "SIGSTOP": ("is stopped", TIMEOUT),
    "close": ("has closed its group", 1.0),
    "raise": ("has ", 1.0),  # died or closed: its finalizers run first
}


# Small and large sums; over gloo all wait in the same place, and oneCCL's fates are quick in the next test.
SUMS = (
    ("shm", 1000),
    ("shm", 300000),
    ("gloo", 1000),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("gloo", 300000), ("ccl", 1000), ("ccl", 300000))),
)


@pytest.mark.parametrize(("backend", "count"), SUMS)
@pytest.mark.parametrize("fate", FATES)
def test_the_rank_at_fault_is_named_in_time(backend: str, fate: str, count: int, farm: Farm) -> None:
    name_the_victim(farm, backend, fate, count, native=False)


@EACH
def test_the_rank_at_fault_is_named_to_compiled_callers(backend: str, farm: Farm) -> None:
    name_the_victim(farm, backend, "SIGKILL", 1000, native=True)


def name_the_victim(farm: Farm, backend: str, fate: str, count: int, native: bool) -> None:
    """Run all-reduces until the victim meets its fate, and look at what the others know of it."""
    require(backend)
    args = {"backend": backend, "victim": VICTIM, "fate": fate, "count": count, "timeout": TIMEOUT, "native": native}
    outcome = farm.run("trouble", 3, args, lost=(VICTIM,), timeout=10)
    text, within = FATES[fate]
    if backend != "shm":
        within += 1.0  # the grace for a message of one who has gone, and for a process to count as ended
    for rank in (0, 2):
        assert rank in outcome.values, outcome.errors or outcome.output
        seen = outcome.values[rank]
        assert text in seen["message"], seen
        assert seen["rank"] == VICTIM, seen
        assert f"rank {VICTIM} (pid " in seen["message"]
        assert seen["moment"] - outcome.note("moment", VICTIM) < within + SCHEDULING, seen
        assert "is lost" in seen["later"]
        assert f"rank {VICTIM} " in seen["later"]


@MOST
def test_a_part_of_a_split_names_ranks_as_the_whole_does(backend: str, farm: Farm) -> None:
    require(backend)
    outcome = farm.run("part_of_a_split", 3, {"backend": backend}, lost=(2,), timeout=20)
    assert 0 in outcome.values, outcome.errors or outcome.output
    seen = outcome.values[0]
    assert "rank 2 (pid " in seen["message"], seen
    assert "rank 0 waited" in seen["message"], seen
    assert "rank 2 (pid " in seen["later"], seen
    assert seen["rank"] == 1, seen  # its place in the part, as all that callers get


@MOST
def test_a_mismatch_is_named_at_once(backend: str, farm: Farm) -> None:
    require(backend)
    outcome = farm.run("mismatch", 3, {"backend": backend}, timeout=40)
    assert not outcome.errors, outcome.errors
    expected = (
        ("all_reduce of 11 fp32", "all_reduce of 10 fp32"),
        ("all_reduce of 11 fp32", "barrier"),
        ("all_reduce of 5 fp16", "all_reduce of 5 bf16"),
        ("broadcast of 20 bytes from rank",),
        ("all_gather of",),
        ("all_reduce of 10 fp32", "all_reduce of 1000000 fp32"),
    )
    for rank, results in outcome.values.items():
        for result, texts in zip(results, expected, strict=True):
            assert result["rank"] is not None, result
            assert result["seconds"] < 2.0, result
            # Whoever hears it from a peer repeats the name, not the details.
            assert "another call" in result["message"] or all(text in result["message"] for text in texts), (
                rank,
                result,
            )


@MOST
def test_a_forgotten_group_does_not_keep_the_process(backend: str, farm: Farm) -> None:
    require(backend)
    outcome = farm.run("forgotten", 2, {"backend": backend, "whole_exit": True}, timeout=15)
    assert outcome.values == {0: backend, 1: backend}, outcome.errors
    assert outcome.late == []
    assert "Exception" not in outcome.output


def test_ctrl_c_ends_a_wait(farm: Farm) -> None:
    require("shm")
    outcome = farm.run("interrupted", 2)
    assert outcome.values[0]["how"].startswith("KeyboardInterrupt"), outcome.values
    assert outcome.values[0]["seconds"] < 0.3 + SCHEDULING
    assert "rank 0" in outcome.values[1]["how"]
    assert "was interrupted" in outcome.values[1]["how"]
    assert outcome.values[1]["seconds"] < 0.8 + 0.1 + SCHEDULING


def test_a_forked_child_leaves_the_group_alone(farm: Farm) -> None:
    require("shm")
    outcome = farm.run("forked", 2)
    assert outcome.values == {0: True, 1: True}, outcome.errors


def test_the_segment_has_no_name_and_no_open_descriptor(farm: Farm) -> None:
    require("shm")
    outcome = farm.run("shared_memory", 2)
    for rank in (0, 1):
        seen = outcome.values[rank]
        assert seen["new"] == []
        assert seen["open"] == []
        assert len(seen["maps"]) == 1
        assert "(deleted)" in seen["maps"][0]


def small_shm() -> tuple[str, ...]:
    """Return a command that runs another where /dev/shm holds 512 KiB."""
    mount = "mount -t tmpfs -o size=512k tmpfs /dev/shm"
    wrapper = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")
    try:
        subprocess.run([*wrapper, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespaces for tests here")
    return wrapper


def check_small_shm(outcome: Outcome, used: str, refused: list[str]) -> None:
    """All ranks took the next best backend and rank 0 said so once; the others are refused by a sentence."""
    for rank in (0, 1):
        assert rank in outcome.values, outcome.errors or outcome.output
        seen = outcome.values[rank]
        assert seen["name"] == used
        for name in refused:
            assert f"{name} on rank 0: /dev/shm has no room" in seen[name], seen
            assert "524288 free" in seen[name]
    assert outcome.output.count(f"{used} is used instead of shm on rank 0: /dev/shm has no room") == 1, outcome.output


@pytest.mark.parametrize("used", ["ccl", pytest.param("gloo", marks=pytest.mark.slow)])
def test_a_small_dev_shm_is_a_sentence(tmp_path: Path, used: str) -> None:
    require("shm")
    require(used)
    farm = Farm(tmp_path, small_shm())
    # Without packages of oneCCL in reach the next one is gloo; here only a compiler is out of reach.
    environ = {} if used == "ccl" else {"XDG_CACHE_HOME": str(tmp_path), "CXX": "no-such-compiler"}
    outcome = farm.run("small_shm", 2, {"refused": ["shm"]}, environ=environ)
    farm.close()
    check_small_shm(outcome, used, ["shm"])


@pytest.mark.slow
def test_a_small_dev_shm_under_mpirun(tmp_path: Path) -> None:
    """MPI would take its shared memory there too, and its ranks be killed by SIGBUS."""
    require_mpirun()
    refused = ["shm", "mpi"] + (["ccl"] if why_not(PAIR)["ccl"] is None else [])
    outcome = run_under_mpirun(tmp_path, "small_shm", 2, {"refused": refused}, wrapper=small_shm())
    check_small_shm(outcome, "gloo", refused)


def test_waiting_costs_no_processor_time(farm: Farm) -> None:
    require("shm")
    outcome = farm.run("idle", 2)
    assert outcome.values[0] < 0.1, outcome.values
