"""Families that transformers has no code for, from config.json and tensors alone, against forwards in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plain_forwards
import pytest
import torch
from safetensors.torch import save_file

from dist_lowbit import convert
from dist_lowbit.core.errors import UsageError
from dist_lowbit.transformers import AutoModelForCausalLM

IDS = torch.randint(0, 131, (2, 21), generator=torch.Generator().manual_seed(1))


def files(folder: Path, kind: str, **changes: Any) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """Write a tiny random model, as its makers publish it: with the names of code that is not there."""
    config = plain_forwards.MODELS[kind][0] | changes
    tensors = plain_forwards.random_tensors(config)
    code = {"auto_map": {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}}
    (folder / "config.json").write_text(json.dumps(config | code))
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder, config, tensors


# The two forwards differ by the order of fp32 sums: some 20 products of K <= 160 in a row, each with an error of at
# most K eps times the sum of its terms' sizes, which is below 30 here: 20 * 160 * 2^-24 * 30 = 6e-3 at worst.
BOUND = 6e-3


@pytest.mark.parametrize("kind", plain_forwards.MODELS)
def test_logits(kind: str, tmp_path: Path) -> None:
    folder, config, tensors = files(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="fp16", compute="fp32")
    expected = plain_forwards.MODELS[kind][1](tensors, config, IDS)
    with torch.inference_mode():
        whole = model(IDS).logits
        cache = model(IDS[:, :13], use_cache=True).past_key_values
        steps = [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(13, 21)]
    assert float((whole - expected).abs().max()) < BOUND
    assert torch.equal(torch.cat(steps, 1), whole[:, 13:])


def test_generate_and_save(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    folder, _, _ = files(tmp_path / "source", "chatglm3")
    saved = tmp_path / "saved"
    convert(folder, saved, "sym_int8", tp=2)
    outputs = []
    for model in (
        AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="sym_int8"),
        AutoModelForCausalLM.load_low_bit(saved),
    ):
        outputs.append(model.generate(IDS, max_new_tokens=9, do_sample=False, pad_token_id=0))
    assert torch.equal(*outputs)
    assert json.loads((saved / "config.json").read_text())["model_type"] == "chatglm"


def test_a_head_of_unit_rows(tmp_path: Path) -> None:
    """The second generation of baichuan, told by its vocabulary, divides each row of its head by its length."""
    folder, config, _ = files(tmp_path, "baichuan 7b", vocab_size=125696)
    tensors = plain_forwards.random_tensors(config)
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="fp32", compute="fp32")
    head = tensors["lm_head.weight"]
    # Division by a norm of 96 terms: within a few roundings of fp32 numbers of size at most 1.
    torch.testing.assert_close(model.lm_head.weight, head / head.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)


def test_what_is_not_computed_is_refused(tmp_path: Path) -> None:
    folder, _, _ = files(tmp_path, "qwen", seq_length=16)
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="sym_int8")
    with torch.inference_mode():
        model(IDS[:, :16])
        with pytest.raises(UsageError, match="a sequence has 17 tokens; this model is computed here up to 16"):
            model(IDS[:, :17])
    plain = AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="sym_int8", optimize_model=False)
    with pytest.raises(UsageError, match="a qwen model runs on the fused decoder only"):
        plain(IDS)
