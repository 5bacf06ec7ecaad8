"""Families that transformers has no code for, from config.json and tensors alone, against forwards in plain torch.

test_families.py has them among all others: at every degree, by both executors, greedy, padded and bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dist_lowbit import convert
from dist_lowbit.comm import SingleGroup
from dist_lowbit.core.errors import UsageError
from dist_lowbit.transformers import AutoModelForCausalLM
from tests.bounds import U
from tests.decoder import plain_forwards
from tests.decoder.exact_program import ExactProgram
from tests.decoder.runs import program_of

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(0, 131, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", plain_forwards.MODELS)
def test_logits(kind: str, tmp_path: Path) -> None:
    plain_forwards.write_files(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, load_in_low_bit="fp16", compute="fp32")
    expected = plain_forwards.plain_logits(kind, IDS)
    with torch.inference_mode():
        whole = model(IDS).logits
        cache = model(IDS[:, :13], use_cache=True).past_key_values
        steps = [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(13, 21)]
    assert torch.equal(torch.cat(steps, 1), whole[:, 13:])
    exact = ExactProgram(program_of(model, SingleGroup()), IDS[1], [IDS.shape[1]])
    for at in (0, 20):
        for token in (int(expected[1, at].argmax()), 7):
            bound = exact.bound(at, token)
            assert bound < 0.1 * float(expected.std()), "a bound this wide would say little"
            # Both forwards are fp32 computations of the same.
            assert abs(float(whole[1, at, token] - expected[1, at, token])) <= 2 * bound, (at, token)


def test_generate_and_save(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    plain_forwards.write_files(folder, "chatglm3")
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


@pytest.mark.slow  # the vocabulary that tells the generation is a large one
def test_a_head_of_unit_rows(tmp_path: Path) -> None:
    """The second generation of baichuan, told by its vocabulary, divides each row of its head by its length."""
    _, tensors = plain_forwards.write_files(tmp_path, "baichuan 7b", vocab_size=125696)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, load_in_low_bit="fp32", compute="fp32")
    head = tensors["lm_head.weight"].double()
    expected = head / head.norm(dim=1, keepdim=True)
    # K squares and additions, halved by the root; the root and the division.
    error = (head.shape[1] / 2 + 3) * U * expected.abs()
    assert bool(((model.lm_head.weight.double() - expected).abs() <= error).all())


def test_what_is_not_computed_is_refused(tmp_path: Path) -> None:
    plain_forwards.write_files(tmp_path, "qwen", seq_length=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, load_in_low_bit="sym_int8")
    with torch.inference_mode():
        model(IDS[:, :16])
        with pytest.raises(UsageError, match="a sequence has 17 tokens; this model is computed here up to 16"):
            model(IDS[:, :17])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, load_in_low_bit="sym_int8", optimize_model=False)
    with pytest.raises(UsageError, match="a qwen model runs on the fused decoder only"):
        plain(IDS)
