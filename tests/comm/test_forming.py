"""How a group forms: choice of the backend, neighbours in the process, ranks that do not fit together."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from dist_lowbit.comm import BACKENDS, init_group, segment, subgroup_info, why_not
from dist_lowbit.core.errors import CommError, UsageError
from dist_lowbit.core.rank import RankInfo
from tests.comm.conftest import PAIR, require
from tests.comm.harness import Farm

ALONE = RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "none")


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_world_of_one_needs_nobody(backend: str) -> None:
    with init_group(backend, ALONE) as group:
        assert (group.name, group.rank, group.size) == ("single", 0, 1)


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(UsageError, match="'nccl2' is no backend; expected auto, single, shm, hierarchical, ccl, mpi"):
        init_group("nccl2", PAIR)


def test_why_not_is_a_sentence() -> None:
    reasons = why_not(PAIR)
    assert list(reasons) == list(BACKENDS)
    assert reasons["single"] == "a world of 2 ranks is more than one"
    spread = why_not(RankInfo(0, 4, 0, 2, "hostA", 1, "test"))["shm"]
    assert spread == "only 2 of the 4 ranks are on this host"
    assert "up to 16 ranks" in str(why_not(RankInfo(0, 17, 0, 17, "127.0.0.1", 1, "test"))["shm"])


def test_a_subgroup_has_places_of_its_own() -> None:
    info = subgroup_info(RankInfo(3, 4, 3, 4, "127.0.0.1", 1, "test"), [1, 3])
    assert (info.rank, info.world_size) == (1, 2)
    with pytest.raises(UsageError, match="rank 0 asks for a group of ranks"):
        subgroup_info(PAIR, [1])


def test_a_segment_larger_than_the_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommError, match=r"has no room .* bytes needed, \d+ free\); enlarge it"):
        segment.create(1 << 60, str(tmp_path))
    assert segment.no_room(4096, str(tmp_path)) is None
    assert "there is no" in str(segment.no_room(1, str(tmp_path / "absent")))
    with pytest.raises(CommError, match="cannot open rank 0's shared segment"):
        segment.join({"pid": 0x7FFFFFFF, "descriptor": 3, "inode": 1, "device": 1})


@pytest.mark.parametrize("first", ["ours", "torch"])
@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_beside_torch_distributed(backend: str, first: str, farm: Farm) -> None:
    require(backend)
    outcome = farm.run("beside_torch", 2, {"backend": backend, "first": first}, timeout=40)
    assert outcome.values == {0: [4.0, 4.0], 1: [4.0, 4.0]}, outcome.errors


def test_groups_form_again_at_the_same_address(farm: Farm) -> None:
    outcome = farm.run("rejoin", 3, timeout=40)
    assert outcome.values == {0: 7, 1: 7, 2: 7}, outcome.errors


# What each rank asks for or believes, and what the ranks must hear.
DISAGREEMENTS = {
    "backends": (["gloo", "auto"], {}, "UsageError: the ranks ask for different backends"),
    "unusable": (["single", "single"], {}, "single on rank 0: a world of 2 ranks is more than one"),
    "switched_off": (["shm", "shm"], {"DIST_LOWBIT_LIBRARY": "none"}, "switched off by DIST_LOWBIT_LIBRARY=none"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_ranks_that_disagree_are_told(case: str, farm: Farm) -> None:
    backends, environ, text = DISAGREEMENTS[case]
    outcome = farm.run("disagree", 2, {"backends": backends}, environ=environ, timeout=20)
    assert set(outcome.values) == {0, 1}, outcome.errors
    assert all(text in value for value in outcome.values.values()), outcome.values


# The (rank, size, seconds until it comes) of each, and the two that the sentence compares.
SIZES = {
    "the host of the meeting first": (
        [(0, 3, 0), (1, 2, 0.5)],
        "rank 0 was started in a world of 3 and rank 1 in one of 2;",
    ),
    "the host of the meeting last": (
        [(0, 3, 0.5), (1, 2, 0)],
        "rank 0 was started in a world of 3 and rank 1 in one of 2;",
    ),
    "ranks that one side has not": (
        [(0, 4, 0), (1, 4, 0), (4, 6, 0.5), (5, 6, 0.5)],
        r"rank [01] was started in a world of 4 and rank [45] in one of 6;",
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_ranks_of_different_worlds_are_told_at_once(case: str, farm: Farm) -> None:
    places, text = SIZES[case]
    outcome = farm.run("told_sizes", len(places), {"places": places, "timeout": 40}, timeout=50)
    assert set(outcome.values) == set(range(len(places))), outcome.errors
    for seen in outcome.values.values():
        assert re.match(text, seen["message"]), seen
        assert seen["seconds"] < 10.0, outcome.values  # and not its timeout of 40, also on a busy machine


def test_an_absent_rank_is_named(farm: Farm) -> None:
    outcome = farm.run("absent", 3, timeout=20)
    assert "rank 2 of 3 did not come to 127.0.0.1:" in outcome.values[0], outcome.values
    assert outcome.values[1] != "no error"


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_a_rank_that_dies_while_the_group_forms_is_named(backend: str, farm: Farm) -> None:
    require(backend)
    start = time.monotonic()
    outcome = farm.run("dies_forming", 3, {"backend": backend}, lost=(1,), timeout=20)
    for rank in (0, 2):
        assert "rank 1 " in outcome.values[rank], outcome.values
        assert "has died" in outcome.values[rank]
    assert time.monotonic() - start < 8.0
