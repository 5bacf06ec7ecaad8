"""Models that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

import dist_lowbit.sample

SAMPLE = str(dist_lowbit.sample.path())


@pytest.fixture
def story() -> Callable[[], PreTrainedModel]:
    """Return a function that loads the sample model anew, the ordinary way."""
    return lambda: LlamaForCausalLM.from_pretrained(SAMPLE, torch_dtype="auto")


@pytest.fixture(scope="session")
def prompt() -> torch.Tensor:
    """Return a short prompt for the sample model, ids [1, S]."""
    ids: torch.Tensor = AutoTokenizer.from_pretrained(SAMPLE)("Once upon a time", return_tensors="pt").input_ids
    return ids
