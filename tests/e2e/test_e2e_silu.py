"""The activation between gate and down: the same bits for an element wherever it stands and whoever computes it."""

from __future__ import annotations

import pytest
import torch

import dist_lowbit.sample
from dist_lowbit import transformers as low_bit
from dist_lowbit.decoder import FixedSilu
from tests.bounds import U

TORCHS = ("SiLU", "SiLUActivation")


def test_pieces_and_threads_change_no_bit() -> None:
    x = torch.randn(1, 97, 349) * 4  # 33853 elements: torch deals them out to its threads, at ends that 16 divides not
    silu = FixedSilu()
    whole = silu(x)
    assert torch.equal(torch.cat([silu(piece) for piece in x.split(7, dim=-1)], -1), whole)
    assert torch.equal(silu(x.transpose(1, 2)).transpose(1, 2), whole)
    before = torch.get_num_threads()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again = silu(x)
        torch.set_num_threads(before)
        assert torch.equal(again, whole)


def test_it_is_silu() -> None:
    # exp_poly errs by 2 u; 1 + t, the quotient and the product by u each, so silu by 5 u of itself.
    x = torch.linspace(-80, 80, 100001)
    exact = x.double() * x.double().sigmoid()
    assert bool(((FixedSilu()(x).double() - exact).abs() <= 5 * U * exact.abs() * (1 + 2**-20)).all())


@pytest.mark.parametrize("optimize", [True, False])
def test_models_of_known_families_use_it(optimize: bool) -> None:
    model = low_bit.AutoModelForCausalLM.from_pretrained(
        dist_lowbit.sample.path(), load_in_low_bit="sym_int4", optimize_model=optimize
    )
    kinds = [type(module).__name__ for module in model.modules()]
    assert (kinds.count("FixedSilu") > 0) == optimize
    assert any(kind in TORCHS for kind in kinds) != optimize
