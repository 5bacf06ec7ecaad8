"""The intended errors: one family, exit codes, and fit to cross a process boundary."""

from __future__ import annotations

import inspect
import pickle

import pytest

from dist_lowbit.core import errors
from dist_lowbit.core.errors import CommError, DistLowbitError, UsageError

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_is_one_of_ours_and_documented(kind: type[DistLowbitError]) -> None:
    assert issubclass(kind, DistLowbitError)
    assert inspect.getdoc(kind)
    assert kind("a sentence").args == ("a sentence",)
    assert str(kind("a sentence")) == "a sentence"
    assert kind.exit_code == (3 if kind is CommError else 2)


def test_there_are_the_six_kinds() -> None:
    names = {"UsageError", "FormatError", "KernelError", "PlanError", "CheckpointError", "CommError"}
    assert names <= {kind.__name__ for kind in ALL}


def test_an_argument_is_an_option_on_the_command_line() -> None:
    error = UsageError("top_k is -1; expected 0 or more, or no top_k", argument="top_k")
    assert str(error) == "top_k is -1; expected 0 or more, or no top_k"
    assert error.with_option() == "--top-k is -1; expected 0 or more, or no top_k"
    assert UsageError("top_k is -1").with_option() == "top_k is -1"


def test_a_comm_error_names_the_rank_where_it_is_known() -> None:
    assert CommError("rank 3 died", rank=3).rank == 3
    assert CommError("silence").rank is None
    again = pickle.loads(pickle.dumps(CommError("rank 3 died", 3)))  # noqa: S301 (our own bytes, as multiprocessing does)
    assert (str(again), again.rank) == ("rank 3 died", 3)
