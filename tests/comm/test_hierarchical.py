"""Shared memory within machines and leaders between them: the tree's bits, and faults named across machines.

The machines are this one, taken for several by what the ranks say of themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_lowbit.comm.hierarchical import composes, layout
from dist_lowbit.comm.peers import Peer
from tests.comm import bodies
from tests.comm.conftest import require, require_mpirun
from tests.comm.harness import Farm, Outcome, run_under_mpirun


def peers(hosts: str) -> list[Peer]:
    return [Peer(rank, host, host, 100 + rank, 1) for rank, host in enumerate(hosts)]


LAYOUTS = {
    "aabb": [[0, 1], [2, 3]],
    "aaaabbbb": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "aabbccdd": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "aaaa": "all ranks are on one machine",
    "abab": "not numbered one after another",
    "abc": "one rank on each machine",
    "aaab": "the machines have 3, 1 ranks",
    "aaabbb": [[0, 1, 2], [3, 4, 5]],
    "aabbcc": "the machines have 2, 2, 2 ranks",
}


@pytest.mark.parametrize("hosts", LAYOUTS)
def test_layout(hosts: str) -> None:
    expected, found = LAYOUTS[hosts], layout(peers(hosts))
    assert found == expected if isinstance(expected, list) else expected in str(found)


def test_powers_of_two_compose() -> None:
    for hosts in (2, 4, 8):
        for ranks in (2, 4, 8):
            assert composes(hosts, ranks), (hosts, ranks)


def on_machines(farm: Farm, folder: Path, size: int, args: dict[str, Any], body: str = "hierarchy") -> Outcome:
    """Run a body on ranks of pretended machines; over MPI its launcher starts them."""
    require("shm")
    if args.get("mpirun"):
        require_mpirun()
        outcome = run_under_mpirun(folder, body, size, args, timeout=110)
    else:
        require(args["outer"])
        outcome = farm.run(body, size, args, timeout=110)
    assert not outcome.errors, next(iter(outcome.errors.values()))
    assert set(outcome.values) == set(range(size)), outcome.output
    return outcome


SLOW = pytest.mark.slow
# The backend between the machines, and whether MPI's launcher starts the ranks: all of them must start MPI then.
BETWEEN = (
    ("gloo", False),
    pytest.param("ccl", False, marks=SLOW),
    pytest.param("ccl", True, marks=SLOW),
    pytest.param("mpi", True, marks=SLOW),
)
OUTER = pytest.mark.parametrize(("outer", "mpirun"), BETWEEN)


@OUTER
def test_conformance(farm: Farm, tmp_path: Path, outer: str, mpirun: bool) -> None:
    outcome = on_machines(farm, tmp_path, 4, {"per_host": 2, "outer": outer, "mpirun": mpirun})
    assert [outcome.values[rank]["between"] for rank in range(4)] == [outer, None, outer, None]
    assert {value["fingerprints"] for value in outcome.values.values()} == {bodies.fingerprints_of(4)}
    assert all(value.keys() == {"between", *bodies.CHECKS} for value in outcome.values.values())


@pytest.mark.slow
@OUTER
def test_a_thousand_random_operations(farm: Farm, tmp_path: Path, outer: str, mpirun: bool) -> None:
    """Each with the tree's bits, as the other backends have in test_conformance.py; the sums within their bound."""
    on_machines(farm, tmp_path, 4, {"per_host": 2, "outer": outer, "operations": 1000, "mpirun": mpirun})


@pytest.mark.slow
@pytest.mark.parametrize(("machines", "per_host"), [(2, 3), (2, 4), (4, 2)])
def test_random_operations_on_other_machines(farm: Farm, tmp_path: Path, machines: int, per_host: int) -> None:
    on_machines(farm, tmp_path, machines * per_host, {"per_host": per_host, "outer": "gloo", "operations": 100})


@pytest.mark.slow
@pytest.mark.parametrize(("size", "per_host"), [(2, 1), (3, 1), (3, 2), (4, 1), (6, 2)])
def test_machines_that_do_not_compose_take_a_flat_backend(farm: Farm, tmp_path: Path, size: int, per_host: int) -> None:
    """One rank on each, uneven ones, three of two: the tree's bits all the same."""
    args = {"per_host": per_host, "outer": "gloo"}
    outcome = on_machines(farm, tmp_path, size, args, "flat")
    assert len(names := set(outcome.values.values())) == 1
    assert names <= {"ccl", "gloo"}


@pytest.mark.parametrize("victim", [*(pytest.param(rank, marks=pytest.mark.slow) for rank in (0, 1, 2)), 3])
def test_a_death_is_named_on_every_machine(farm: Farm, victim: int) -> None:
    require("shm")
    args = {"per_host": 2, "outer": "gloo", "victim": victim}
    outcome = farm.run("hierarchy_trouble", 4, args, lost=(victim,), timeout=30)
    for rank in {0, 1, 2, 3} - {victim}:
        seen = outcome.values.get(rank, outcome.errors.get(rank))
        assert seen is not None, outcome.output
        assert seen["seconds"] < 5.0, seen
        # The store of the notes lives in rank 0: after its death rank 3 has its own leader's word alone, which is that
        # rank 2 has left; the leader has seen the connection to rank 0 close.
        named = (0, 2) if (victim, rank) == (0, 3) else (victim,)
        assert seen["rank"] in named, seen
        assert f"rank {seen['rank']} (pid " in seen["message"], seen
