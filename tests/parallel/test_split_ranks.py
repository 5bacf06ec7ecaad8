"""Split Linears on real ranks, against the whole ones: the sums and the gathers of a backend included."""

from __future__ import annotations

import pytest

from dist_lowbit.formats import FORMATS
from tests.comm.harness import Farm

QUICK = ("sym_int4", "asym_int4", "sym_int8", "zp_int4", "nf4", "bf16")


def check(farm: Farm, tp: int, formats: tuple[str, ...], backend: str) -> None:
    outcome = farm.run(
        "linears", tp, {"formats": formats, "backend": backend}, timeout=100, environ={"OMP_NUM_THREADS": "1"}
    )
    assert not outcome.errors, "\n".join(outcome.errors.values())
    assert [outcome.values[rank]["wrong"] for rank in range(tp)] == [[]] * tp
    assert backend in ("auto", outcome.values[0]["backend"])


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_ranks_give_the_whole_linear(model_farm: Farm, tp: int) -> None:
    check(model_farm, tp, QUICK, "auto")


def test_gloo_gives_the_whole_linear(model_farm: Farm) -> None:
    check(model_farm, 3, ("sym_int4",), "gloo")


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_ranks_give_the_whole_linear_in_every_other_format(model_farm: Farm, tp: int) -> None:
    check(model_farm, tp, tuple(name for name in FORMATS if name not in QUICK), "auto")
