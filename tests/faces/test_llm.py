"""dist_lowbit.llm.optimize: the ancestor's signature, and a sentence for what cannot be honoured."""

from __future__ import annotations

import inspect
import logging
import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dist_lowbit
from dist_lowbit import optimize_model
from dist_lowbit.core.errors import UsageError
from dist_lowbit.parallel import LowBitLinear

IDS = torch.arange(7)[None]


def tiny() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).eval()


def test_the_arguments_are_the_ancestors() -> None:
    expected = (
        "model optimizer dtype inplace device quantization_config qconfig_summary_file low_precision_checkpoint "
        "sample_inputs deployment_mode cache_weight_for_large_batch"
    )
    names = list(inspect.signature(dist_lowbit.llm.optimize).parameters)
    assert " ".join(names[:11]) == expected
    assert dist_lowbit.optimize_transformers is dist_lowbit.llm.optimize


def test_a_copy_is_optimized_unless_in_place() -> None:
    model = tiny()
    assert isinstance(model, LlamaForCausalLM)
    other = dist_lowbit.llm.optimize(model, quantization_config="sym_int8")
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(other.lm_head, LowBitLinear)
    assert dist_lowbit.llm.optimize(model, inplace=True, deployment_mode=False) is model
    assert isinstance(model.lm_head, LowBitLinear)
    assert model.lm_head.format == "fp32"


CONFIGS = {
    "a name": ("asym_int4", "asym_int4", 64),
    "a mapping": ({"low_bit": "sym_int8", "group_size": 32}, "sym_int8", 32),
    "none, bfloat16": (None, "bf16", -1),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_quantization_config(case: str) -> None:
    config, form, group_size = CONFIGS[case]
    dtype = torch.bfloat16 if config is None else torch.float32
    model = dist_lowbit.llm.optimize(tiny(), dtype=dtype, inplace=True, quantization_config=config)
    head = model.lm_head
    assert isinstance(head, LowBitLinear)
    assert head.format == form
    if config is not None:
        assert head.group_size == group_size
    with torch.inference_mode():
        assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize(("dtype", "form"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_a_dtype_is_that_of_weights_and_cache(dtype: torch.dtype, form: str) -> None:
    model = dist_lowbit.llm.optimize(tiny(), dtype=dtype, inplace=True)
    with torch.inference_mode():
        output = model(IDS, use_cache=True)
        # The same as casting the weights by name, in the same mode.
        named = optimize_model(tiny(), form, torch_dtype=dtype)(IDS)
    assert {m.format for m in model.modules() if isinstance(m, LowBitLinear)} == {form}
    assert output.logits.dtype == named.logits.dtype
    assert torch.equal(output.logits, named.logits)
    store = output.past_key_values.layers[0].batch.blocks.store
    assert {tensor.dtype for tensor in store.tensors()} == {dtype}


def test_what_needs_nothing_here_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A sample to trace, a second layout for large batches and the default device: the same bits."""
    plain = dist_lowbit.llm.optimize(tiny(), quantization_config="sym_int4")
    with caplog.at_level(logging.INFO, "dist_lowbit"):
        model = dist_lowbit.llm.optimize(
            tiny(),
            device="cpu",
            quantization_config="sym_int4",
            sample_inputs={"input_ids": IDS},
            cache_weight_for_large_batch=True,
        )
    assert len([r for r in caplog.records if "cache_weight_for_large_batch" in r.getMessage()]) == 1
    assert {value.device.type for value in [*model.parameters(), *model.buffers()]} == {"cpu"}
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


BAD = {
    "an optimizer": ({"optimizer": object()}, "an optimizer was given"),
    "a summary": ({"qconfig_summary_file": "x.json"}, "qconfig_summary_file"),
    "a checkpoint": ({"low_precision_checkpoint": {}}, "low_precision_checkpoint is not read here"),
    "a device": ({"device": "xpu"}, "device is 'xpu'"),
    "a dtype": ({"dtype": torch.int8}, "expected float32, float16, bfloat16"),
    "a strange config": ({"quantization_config": 4}, "quantization_config is int; expected a format's name"),
    "a strange key": ({"quantization_config": {"low_bit": "sym_int4", "bits": 4}}, "quantization_config has 'bits'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_honoured(case: str) -> None:
    arguments, text = BAD[case]
    with pytest.raises(UsageError, match=re.escape(text)):
        dist_lowbit.llm.optimize(tiny(), **arguments)


def test_training_mode_is_refused() -> None:
    with pytest.raises(UsageError, match=r"call model.eval\(\)"):
        dist_lowbit.llm.optimize(tiny().train())
