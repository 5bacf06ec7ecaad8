"""Every family at every degree: tiny models with idle ranks, shared KV heads and odd sizes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.bodies import PROMPT
from tests.e2e.exact import Yardstick
from tests.e2e.tiny import FAMILIES, VOCAB

DEGREES = (1, 2, pytest.param(3, marks=pytest.mark.slow), 4)  # at 4 some ranks are idle, at 3 parts are uneven
WHOLE_SEGMENTS = (1, 2, 4)  # degrees at which integer formats give the same bits
FORMS = (("sym_int4", "int8"), ("fp16", "fp32"))


@pytest.fixture(scope="module")
def runs(ranks, tiny) -> Any:  # type: ignore[no-untyped-def]
    """Return a function from a degree to what all ranks found, and rank 0's folder."""
    models = {family: tiny[family] for family in FAMILIES}

    @functools.cache
    def run(tp: int) -> tuple[Path, list[dict[str, dict[str, str]]]]:
        return ranks("families", tp, models=models, forms=FORMS, ways=("live", "files", "saved"))

    return run


@pytest.mark.parametrize("tp", DEGREES)
def test_all_ranks_hold_the_same_bits(runs, tp: int) -> None:  # type: ignore[no-untyped-def]
    _, found = runs(tp)
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("tp", DEGREES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_three_ways_to_a_model_give_the_same_logits(runs, family: str, tp: int) -> None:  # type: ignore[no-untyped-def]
    _, found = runs(tp)
    for form, _ in FORMS:
        live = found[0][f"{family} {form} live"]
        for way in ("files", "saved"):
            other = found[0][f"{family} {form} {way}"]
            assert {stage: live[stage] for stage in other} == other, way


@pytest.mark.parametrize("family", FAMILIES)
def test_integer_formats_give_the_same_bits_at_every_degree(runs, family: str) -> None:  # type: ignore[no-untyped-def]
    first = runs(1)[1][0][f"{family} sym_int4 live"]
    assert {"prefill", "decode 3", "padded", "padded greedy"} <= first.keys()
    for tp in WHOLE_SEGMENTS[1:]:
        assert runs(tp)[1][0][f"{family} sym_int4 live"] == first, tp


@functools.cache
def margins(model: str) -> tuple[int, dict[int, tuple[float, float]]]:
    """Return the exact model's likeliest last token, its lead over others, and bounds on errors of that lead."""
    # fp16 holds the weights as they are and fp32 the activations, so only roundings are between the two.
    yardstick = Yardstick(model, torch.tensor(PROMPT), "fp16", "fp32")
    last = yardstick.logits[-1]
    best = int(last.argmax())
    others = [int(i) for i in last.argsort()[:: VOCAB // 8] if int(i) != best]
    return best, {other: yardstick.margin(best, other) for other in others}


@pytest.mark.parametrize("tp", DEGREES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_hugging_faces(runs, tiny, family: str, tp: int) -> None:  # type: ignore[no-untyped-def]
    best, bounds = margins(tiny[family])
    folder, _ = runs(tp)
    found = load_file(folder / f"{family}-fp16.safetensors")["prefill"][0, -1].double()
    for other, (margin, bound) in bounds.items():
        assert bound < 0.15  # else this would say little: the logits spread by 1.5
        assert abs(float(found[best] - found[other]) - margin) <= bound, other
