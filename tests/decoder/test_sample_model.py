"""The sample model on the fused decoder and on Hugging Face's forward: the same greedy text."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import dist_lowbit.sample
from dist_lowbit.transformers import AutoModelForCausalLM
from tests.e2e.exact import Yardstick

SAMPLE = str(dist_lowbit.sample.path())


OTHERS = [pytest.param(*case, marks=pytest.mark.slow) for case in (("fp16", "int8"), ("sym_int8", "fp32"))]


@pytest.mark.parametrize(("form", "compute"), [("sym_int4", "fp32"), *OTHERS])
def test_greedy_text_is_that_of_hugging_faces_forward(form: str, compute: str) -> None:
    """Sixty tokens, wherever the two likeliest lie further apart than the two forwards do."""
    ids = AutoTokenizer.from_pretrained(SAMPLE)("Once upon a time there was a", return_tensors="pt").input_ids
    fused, plain = (
        AutoModelForCausalLM.from_pretrained(SAMPLE, load_in_low_bit=form, compute=compute, optimize_model=on)
        for on in (True, False)
    )
    texts = [model.generate(ids, max_new_tokens=60, do_sample=False) for model in (fused, plain)]
    with torch.inference_mode():
        logits = [model(texts[0]).logits for model in (fused, plain)]
    apart = float((logits[0] - logits[1]).abs().max())
    first, second = logits[1].topk(2, dim=-1).values.unbind(-1)
    # What both are computations of, exactly.
    exact = Yardstick(SAMPLE, texts[0], form, "fp32", dequantized=True)
    best, *others = exact.logits[-1].argsort(descending=True)[[0, 1, 40, 2047]].tolist()
    for other in others:
        margin, bound = exact.margin(best, other)
        for found in logits:
            assert abs(float(found[0, -1, best].double() - found[0, -1, other].double()) - margin) <= bound
    # Then what parts them is far below what separates words.
    assert float((first - second)[:, ids.shape[1] - 1 : -1].min()) > 2 * apart
    assert torch.equal(*texts)
