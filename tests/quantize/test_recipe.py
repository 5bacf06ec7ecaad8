"""Recipes: which module gets which format; patterns, validation, JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dist_lowbit.core.errors import CheckpointError, FormatError, UsageError
from dist_lowbit.formats import FORMATS, lookup, quantize
from dist_lowbit.quantize import ALGORITHMS, Recipe, rtn
from dist_lowbit.quantize.recipe import matches

Q = "model.layers.11.self_attn.q_proj"
MATCHES = [
    # pattern, name, matched
    ("q_proj", Q, True),
    ("layers.1", Q, True),  # substrings as the ancestors: also layer 11
    ("layers.1.", Q, False),
    ("lm_head", Q, False),
    ("Q_PROJ", Q, False),
    (Q, Q, True),
    ("q_proj*", Q, False),  # a glob is for the full name
    ("*q_proj", Q, True),
    ("model.layers.1?.*", Q, True),
    ("model.layers.?.*", Q, False),
    ("model.layers.[01]*.q_proj", Q, True),
    ("*.[!q]_proj", Q, False),
    ("model.layers.11", Q, True),
    ("*Q_PROJ", Q, False),  # case counts on every system
]


@pytest.mark.parametrize(("pattern", "name", "matched"), MATCHES)
def test_patterns(pattern: str, name: str, matched: bool) -> None:
    assert matches(pattern, name) is matched
    recipe = Recipe("sym_int4", modules_to_not_convert=("no such module", pattern))
    assert recipe.keeps(name) is matched
    assert recipe.format_for(name) is (None if matched else FORMATS["sym_int4"])


def test_without_patterns_every_module_is_converted() -> None:
    assert Recipe("nf4").format_for("lm_head") is FORMATS["nf4"]
    assert Recipe("nf4", None, []).format_for("") is FORMATS["nf4"]  # type: ignore[arg-type]
    assert Recipe("nf4", None, None).modules_to_not_convert == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "group", "stored"),
    [("sym_int4", None, 64), ("nf3", 128, 128), ("sym_int8", -1, -1), ("bf16", None, -1), ("fp16", 64, -1)],
)
def test_the_group_size_is_the_one_in_force(name: str, group: int | None, stored: int) -> None:
    recipe = Recipe(name, group)
    assert recipe.group_size == stored
    assert quantize(torch.zeros(2, 128), name, recipe.group_size).group_size == stored


def test_an_alias_becomes_the_row_s_name() -> None:
    assert Recipe("fp8").format == "fp8_e5m2"
    assert Recipe("fp8") == Recipe("fp8_e5m2")
    assert hash(Recipe("fp8")) == hash(Recipe("fp8_e5m2"))


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe("sym_int4").format = "nf4"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("int4",), FormatError, r"unknown low_bit 'int4'; expected one of sym_int4"),
        ((None,), FormatError, r"unknown low_bit None"),
        (("sym_int4", 48), FormatError, r"group_size is 48; expected a multiple of 32"),
        (("sym_int4", "64"), FormatError, r"group_size is '64'; expected"),
        (("sym_int4", None, "lm_head"), UsageError, r"modules_to_not_convert expects a list .*, found 'lm_head'"),
        (("sym_int4", None, 3), UsageError, r"expects a list of names or globs, found 3"),
        (("sym_int4", None, ["lm_head", ""]), UsageError, r"none of them empty; found ''"),
        (("sym_int4", None, [7]), UsageError, r"none of them empty; found 7"),
    ],
)
def test_bad_recipes_are_sentences(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe(*arguments)  # type: ignore[arg-type]


def test_unused_patterns_are_found() -> None:
    recipe = Recipe("sym_int4", None, ("lm_head", "*.router", "lm_haed"))
    assert recipe.unused(name for name in (Q, "lm_head")) == ("*.router", "lm_haed")


@pytest.mark.parametrize("name", FORMATS)
def test_json_and_back(name: str) -> None:
    recipe = Recipe(name, -1, ("lm_head", "*.router"))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


GOOD = {"format": "sym_int4", "group_size": 64, "modules_to_not_convert": []}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "the recipe holds list; expected an object with format, group_size, modules_to_not_convert"),
        ({}, "expected an object with"),
        ({**GOOD, "seed": 1}, "seed; expected an object with"),
        ({**GOOD, "format": "q5"}, "the recipe cannot be read: unknown low_bit 'q5'"),
        ({**GOOD, "format": ["nf4"]}, "the recipe cannot be read: unknown low_bit"),
        ({**GOOD, "group_size": 64.0}, r"the recipe cannot be read: group_size is 64\.0"),
        ({**GOOD, "modules_to_not_convert": "lm_head"}, "the recipe cannot be read: modules_to_not_convert"),
    ],
)
def test_damaged_json_is_a_checkpoint_error(value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Recipe.from_json(value)


@pytest.mark.parametrize("name", [*FORMATS, "fp8"])
def test_rtn_is_rounding_to_nearest(name: str) -> None:
    w = torch.randn(6, 100)
    recipe = Recipe(name)
    packed = ALGORITHMS["rtn"](w, lookup(name), recipe.group_size, "layer")
    assert packed.equal(quantize(w, name))
    assert rtn(w, name).equal(packed)


def test_rtn_names_the_module() -> None:
    with pytest.raises(FormatError, match=r"model\.lm_head holds nan"):
        rtn(torch.full((1, 1), float("nan")), "sym_int4", 64, "model.lm_head")
