"""Stacks of experts, fused qkv and odd ends on disk: every way to a model gives the same bits, at any degree."""

from __future__ import annotations

from typing import Any

import pytest

from dist_lowbit.optimize import convert
from tests.decoder.tiny_families import tiny_model

MODELS = ("qwen2_moe", "falcon 40b", "opt post")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, str]]:
    """Return ordinary files of some tiny models, and low-bit checkpoints of three ranks converted from them."""
    folder = tmp_path_factory.mktemp("families")
    plain, low = {}, {}
    for name in MODELS:
        source, target = folder / name, folder / f"{name} low"
        tiny_model(name).half().save_pretrained(source)
        convert(source, target, low_bit="sym_int4", tp=3)
        plain[name], low[name] = str(source), str(target)
    return plain, low


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_way_to_a_model_gives_the_same_bits(decoder_ranks: Any, directories: Any, tp: int) -> None:
    plain, low = directories
    _, found = decoder_ranks("three_ways", tp, models=plain, converted=low)
    for name in MODELS:
        assert len({way for rank in found for way in rank[name].values()}) == 1, (name, found[0][name])
