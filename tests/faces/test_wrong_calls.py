"""Calls that a user gets wrong: one sentence that says what to write instead, whichever face is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_lowbit
import dist_lowbit.sample
from dist_lowbit.core.errors import UsageError
from dist_lowbit.optimize import convert, load_low_bit, optimize_model
from dist_lowbit.transformers import AutoModelForCausalLM

SAMPLE = str(dist_lowbit.sample.path())
# Called with arguments that their types forbid.
AUTO: Any = AutoModelForCausalLM
INTO: Any = load_low_bit
OPTIMIZE: Any = optimize_model


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8)).eval()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules_to_not_convert", ["lm_head"]),
        ("group_size", 64),
        ("compute", "fp32"),
        ("decoder", "torch"),
        ("kv_cache_dtype", "int8"),
        ("device", "cpu"),
    ],
)
def test_what_needs_a_format_says_so(name: str, value: Any) -> None:
    with pytest.raises(
        UsageError, match=f"was given {name}, which needs a low-bit format, .* or leave {name} out"
    ) as e:
        AUTO.from_pretrained(SAMPLE, **{name: value})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("more", [{}, {"load_in_4bit": True}])
@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("optimize_llm", "optimize_model"),
        ("quantization_group_size", "group_size"),
        ("load_in_8bit", "load_in_low_bit='sym_int8'"),
    ],
)
def test_other_names_are_told(name: str, instead: str, more: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"has no argument '{name}'; write {instead} instead"):
        AUTO.from_pretrained(SAMPLE, **{name: True}, **more)
    with pytest.raises(UsageError, match=f"has no argument '{name}'; write {instead} instead"):
        AUTO.load_low_bit(SAMPLE, **{name: True})


def test_what_is_so_anyway_is_no_reason_to_refuse() -> None:
    model = AUTO.from_pretrained(
        SAMPLE, optimize_model=False, modules_to_not_convert=[], cpu_embedding=True, compute=None, dtype="float32"
    )
    assert isinstance(model.lm_head, nn.Linear)


GROUPS: dict[str, Callable[[], Any]] = {
    "optimize": lambda: dist_lowbit.llm.optimize(mlp(), group=3),
    "optimize_model": lambda: OPTIMIZE(mlp(), group=3),
    "load_low_bit": lambda: INTO(mlp(), Path(SAMPLE), group=3),
}


@pytest.mark.parametrize("case", GROUPS)
def test_a_group_that_is_none(case: str) -> None:
    with pytest.raises(UsageError, match=r"group is 3; expected a Group, which init_group\(\) returns"):
        GROUPS[case]()


OF_MODULE = r"the model is a str; make one under low_memory_init\(\), or call .*AutoModelForCausalLM.load_low_bit\(dir"
PATHS: dict[str, tuple[Callable[[], Any], str]] = {
    "a directory alone": (lambda: INTO(SAMPLE), OF_MODULE),
    "the wrong way round": (lambda: INTO(SAMPLE, mlp()), OF_MODULE),
    "a model alone": (
        lambda: INTO(mlp()),
        "takes a model and the directory to load into it, and was given a None",
    ),
    "a model as directory": (lambda: INTO(mlp(), mlp()), "was given a Sequential for the dir"),
    "an Auto class, a model": (
        lambda: AUTO.load_low_bit(mlp()),
        r"load_low_bit takes a directory or hub id, and was given a Seq",
    ),
    "from a model": (
        lambda: AUTO.from_pretrained(mlp()),
        "from_pretrained takes a directory or hub id",
    ),
    "an ordinary model": (
        lambda: AUTO.load_low_bit(SAMPLE),
        r"no low-bit checkpoint .* or load it by from_pretrained\(load_in_4bit",
    ),
    "saving nowhere": (lambda: OPTIMIZE(mlp()).save_low_bit(None), "save_low_bit takes a directory to write"),
    "saving to no name": (
        lambda: OPTIMIZE(mlp()).save_low_bit(""),
        "save_low_bit takes a directory to write, and was given an empty string for the directory",
    ),
    "converting to no name": (
        lambda: convert(SAMPLE, ""),
        "convert takes a directory to write, and was given an empty",
    ),
    "4 bit as a text": (
        lambda: AUTO.from_pretrained(SAMPLE, load_in_4bit="no"),
        "load_in_4bit is 'no'; expected True or False",
    ),
    "steps as a text": (
        lambda: AUTO.load_low_bit(SAMPLE, optimize_model="yes"),
        "optimize_model is 'yes'; expected True or False",
    ),
}


@pytest.mark.parametrize("case", PATHS)
def test_arguments_of_the_wrong_kind(case: str) -> None:
    call, text = PATHS[case]
    with pytest.raises(UsageError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
