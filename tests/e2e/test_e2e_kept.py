"""Modules kept in high precision, embeddings and unknown families, on two ranks as on one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

HEAD, GLOB, STRANGER = range(3)
DEGREES = (1, 2, 4)


@pytest.fixture(scope="module")
def runs(ranks, tiny) -> Any:  # type: ignore[no-untyped-def]
    """Return a function from a degree to each rank's findings on the three models, and rank 0's folder."""
    models = [
        {"model": tiny["llama"], "keep": ["lm_head"]},
        {"model": tiny["phi3"], "keep": ["model.layers.1.*", "down"]},
        {"model": tiny["gpt2"], "keep": ["h.0.attn"]},
    ]

    @functools.cache
    def run(tp: int) -> tuple[Path, list[list[dict[str, Any]]]]:
        return ranks("kept", tp, models=models)

    return run


@pytest.mark.parametrize("tp", DEGREES)
def test_kept_modules_keep_their_dtype(runs, tp: int) -> None:  # type: ignore[no-untyped-def]
    for rank in runs(tp)[1]:
        for found, kept in ((rank[HEAD], ("lm_head",)), (rank[GLOB], ("model.layers.1.", "down"))):
            for name in found["linears"]:
                # A kept Linear is in the format of its own dtype, which the decoder reads and several ranks cut.
                want = "fp16" if any(part in name for part in kept) else "sym_int4"
                assert found["formats"].get(name) == want, name
            assert found["embedding"] == ["torch.float16"]


@pytest.mark.parametrize("tp", DEGREES)
def test_ranks_and_copies_agree(runs, tp: int) -> None:  # type: ignore[no-untyped-def]
    _, found = runs(tp)
    assert all([one["logits"] for one in rank] == [one["logits"] for one in found[0]] for rank in found)
    assert all(one["copies agree"] for rank in found for one in rank)


def test_a_kept_head_is_the_product_of_the_same_bits(runs) -> None:  # type: ignore[no-untyped-def]
    (first,) = runs(1)[1]
    for tp in DEGREES:
        for rank in runs(tp)[1]:
            assert rank[HEAD]["head"]
            assert rank[HEAD]["hidden"] == first[HEAD]["hidden"]


@pytest.mark.parametrize("tp", DEGREES[1:])
def test_an_unknown_family_is_whole_on_every_rank_and_says_so(runs, tp: int) -> None:  # type: ignore[no-untyped-def]
    (first,) = runs(1)[1]
    folder, found = runs(tp)
    for rank in found:
        assert rank[STRANGER]["logits"] == first[STRANGER]["logits"]
        assert rank[STRANGER]["formats"] == first[STRANGER]["formats"]
        assert "transformer.h.0.attn.c_attn" not in rank[STRANGER]["formats"]
    said = (folder / "output").read_text()
    assert f"gpt2 is no known family: each of the {tp} ranks holds the whole model" in said
