"""Shared memory within machines and leaders between them: the tree's bits, and faults named across machines.

The machines are this one, taken for several by what the ranks say of themselves.
"""

from __future__ import annotations

import pytest

from dist_lowbit.comm.hierarchical import composes, layout
from dist_lowbit.comm.peers import Peer
from tests.comm import bodies
from tests.comm.conftest import require
from tests.comm.harness import Farm


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


@pytest.mark.parametrize("outer", ["gloo", pytest.param("ccl", marks=pytest.mark.slow)])
def test_conformance(farm: Farm, outer: str) -> None:
    require("shm")
    require(outer)
    outcome = farm.run("hierarchy", 4, {"per_host": 2, "outer": outer}, timeout=100)
    assert not outcome.errors, next(iter(outcome.errors.values()))
    assert set(outcome.values) == {0, 1, 2, 3}
    assert len({value["fingerprints"] for value in outcome.values.values()}) == 1
    assert all(value.keys() == bodies.CHECKS.keys() for value in outcome.values.values())


@pytest.mark.parametrize("victim", [*(pytest.param(rank, marks=pytest.mark.slow) for rank in (0, 1, 2)), 3])
def test_a_death_is_named_on_every_machine(farm: Farm, victim: int) -> None:
    require("shm")
    args = {"per_host": 2, "outer": "gloo", "victim": victim}
    outcome = farm.run("hierarchy_trouble", 4, args, lost=(victim,), timeout=30)
    for rank in {0, 1, 2, 3} - {victim}:
        seen = outcome.values.get(rank, outcome.errors.get(rank))
        assert seen is not None, outcome.output
        assert seen["seconds"] < 5.0, seen
        # The store of the notes lives in rank 0: after its death the other machine knows its own leader's word alone.
        assert f"rank {victim} (pid " in seen["message"] or victim == 0, seen
