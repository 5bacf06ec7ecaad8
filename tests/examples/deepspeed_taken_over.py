"""Run by test_examples under deepspeed: models of several shapes, split by DeepSpeed and then quantized."""

from __future__ import annotations

import copy
import sys
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from dist_lowbit import init_inference, llm, load_low_bit, optimize_model
from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.rank import current

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "with biases": Qwen2Config(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
}


def make(config: Any) -> nn.Module:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # biases begin as zeros
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    return model


def refused(model: nn.Module) -> bool:
    try:
        optimize_model(model)
    except UsageError:
        return True
    return False


def split(model: nn.Module) -> Any:
    """Return DeepSpeed's engine of a model, which it splits in place."""
    return deepspeed.init_inference(
        model,
        tensor_parallel={"tp_size": current().world_size},
        dtype=torch.float32,
        replace_with_kernel_inject=False,
    )


def told_of_the_engine(engine: nn.Module) -> bool:
    try:
        llm.optimize(engine)
    except UsageError as error:
        return "give optimize engine.module" in str(error)
    return False


def main() -> None:
    size = current().world_size
    ids = torch.arange(7, 19)[None]
    for name, config in CONFIGS.items():
        model = make(config)
        # What the same ranks make of the model without DeepSpeed: cut alike, so equal in every bit.
        ours = init_inference(copy.deepcopy(model), tensor_parallel={"tp_size": size}, low_bit="sym_int4")
        other = split(copy.deepcopy(model))
        told = told_of_the_engine(other)
        asked = llm.optimize(other.module, quantization_config="sym_int4", inplace=name != "llama")
        taken = optimize_model(split(model).module, low_bit="sym_int4")
        place = f"{sys.argv[1]}/{name}"
        taken.save_low_bit(place)
        loaded = load_low_bit(make(config), place, group=ours.group)
        with torch.inference_mode():
            expected, got, again, same = (m(ids).logits for m in (ours, taken, loaded, asked))
        print(
            f"equal: {torch.equal(expected, got)}, saved equal: {torch.equal(got, again)}, refused: {refused(taken)}, "
            f"llm equal: {torch.equal(expected, same)}, told: {told}",
            flush=True,
        )


if __name__ == "__main__":
    main()
