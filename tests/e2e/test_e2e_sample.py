"""The sample model, quantized and split: the same bits at every degree, the same text, and Hugging Face's tokens."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dist_lowbit.sample
from dist_lowbit import transformers as low_bit
from dist_lowbit.formats import FORMATS, quantize
from dist_lowbit.optimize import convert
from tests.bounds import format_bound, linear_bound, margin_bound
from tests.e2e.exact import Yardstick
from tests.ops.native_kernels import library, threads

SAMPLE = str(dist_lowbit.sample.path())
PROMPTS = ("Once upon a time", "The little dog was sad because", "One day, Lily and her mom went to the")
WHOLE_SEGMENTS = (1, 2, 4)
QUICK = [("sym_int4", "int8"), ("asym_int4", "int8"), ("sym_int8", "int8"), ("zp_int4", "int8"), ("sym_int4", "fp32")]
OTHERS = [(row.name, "int8") for row in FORMATS.values() if row.integer and (row.name, "int8") not in QUICK]
STEPS = 4
SIGMAS = 6.0  # passed by a normal variable once in 5e8 draws
WINDOW = 64  # tokens of each prompt whose next one is predicted
STORIES = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends. One "
    "day, she saw a big red ball under a tree. She ran to the ball and picked it up.",
    "Tim had a small toy car. It was blue and very fast. He liked to race it on the floor every day. One morning the "
    "car was gone. Tim looked under the bed and behind the door, but he could not find it.",
    "There was a big dog named Max. Max liked to run in the garden and dig holes in the ground. One day he found a "
    "shiny bone. He was so happy that he barked and jumped up and down.",
    "Mom and Sara went to the store to buy some apples. Sara wanted to help, so she carried the bag. The bag was very "
    "heavy and it fell. All the apples rolled on the floor and Sara started to cry.",
    "A little bird lived in a tall tree. She was scared to fly because the ground was far away. Her mother said, "
    '"Do not be afraid. You can do it if you try." The little bird opened her wings.',
    "Ben and Mia were playing in the sand. They wanted to build a big castle with a tower. Ben said he would bring "
    "some water. Mia said she would look for shells to put on the walls of the castle.",
    "It was a cold winter day and the snow was white. Anna put on her warm hat and her coat. She went outside to make "
    "a snowman with her dad. They used a carrot for the nose and two stones for the eyes.",
    "The old man had a cat who slept all day. One night the cat heard a noise in the kitchen. It was a tiny mouse who "
    "was looking for cheese. The cat did not chase the mouse. They became good friends.",
    "Jack was very hungry. He went to the kitchen and saw a cake on the table. It looked so sweet and yummy. His mom "
    "told him to wait until after dinner, but Jack did not want to wait any more.",
    "One sunny day, a boy named Sam went to the lake with his grandpa. They sat in a little boat and tried to catch a "
    "fish. Sam felt something pull on his line. He pulled and pulled until a big fish came out.",
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SAMPLE)


@pytest.fixture(scope="module")
def runs(ranks, tokenizer) -> Any:  # type: ignore[no-untyped-def]
    """Return a function from a degree and formats to what all ranks found, and rank 0's folder."""
    prompt = tokenizer(PROMPTS[0], return_tensors="pt").input_ids.tolist()
    forced = tokenizer(", there was a").input_ids[-STEPS:]

    @functools.cache
    def run(tp: int, forms: tuple[tuple[str, str], ...]) -> tuple[Path, list[dict[str, dict[str, str]]]]:
        return ranks("sample", tp, model=SAMPLE, prompt=prompt, forced=forced, forms=forms)

    return run


def check_bits(run: Any, forms: tuple[tuple[str, str], ...], degrees: tuple[int, ...] = WHOLE_SEGMENTS[1:]) -> None:
    """Check that prefill and decode steps give the same bits at every degree and on every rank."""
    _, (first,) = run(1, forms)
    assert len(first["sym_int4 int8" if forms == tuple(QUICK) else f"{forms[0][0]} int8"]) == 1 + STEPS
    for tp in degrees:
        for rank, found in enumerate(run(tp, forms)[1]):
            for form, compute in forms:
                name = f"{form} {compute}"
                if compute == "int8":
                    assert found[name] == first[name], (tp, rank, name)


def test_bits_are_the_same_at_every_degree(runs) -> None:  # type: ignore[no-untyped-def]
    check_bits(runs, tuple(QUICK))


@pytest.mark.slow
def test_bits_are_the_same_on_eight_ranks(runs) -> None:  # type: ignore[no-untyped-def]
    # A group of 64 weights spans two heads of 32: four ranks hold two heads each, and four none.
    check_bits(runs, tuple(QUICK), (8,))


@pytest.mark.slow
def test_bits_of_all_other_integer_formats_are_the_same_at_every_degree(runs) -> None:  # type: ignore[no-untyped-def]
    check_bits(runs, tuple(OTHERS))


@pytest.mark.parametrize("form", QUICK, ids="-".join)
def test_three_ranks_are_within_the_bound(runs, tokenizer, form: tuple[str, str]) -> None:  # type: ignore[no-untyped-def]
    folder, found = runs(3, tuple(QUICK))
    assert all(one == found[0] for one in found)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    logits = load_file(folder / f"{form[0]}-{form[1]}.safetensors")["prefill"][0, -1].double()
    yardstick = Yardstick(SAMPLE, ids, *form, dequantized=True)
    best, *others = yardstick.logits[-1].argsort(descending=True)[[0, 1, 40, 2047]].tolist()
    for other in others:
        margin, bound = yardstick.margin(best, other)
        error = abs(float(logits[best] - logits[other]) - margin)
        assert error <= bound
        if form[1] == "int8":  # where that bound is wide: all roundings of all activations at their worst at once
            assert error <= SIGMAS * yardstick.spread(best, other)


def test_threads_do_not_change_a_bit(tokenizer) -> None:  # type: ignore[no-untyped-def]
    # 333 tokens: 3 and 5 divide nothing.
    model = low_bit.AutoModelForCausalLM.from_pretrained(SAMPLE, load_in_low_bit="sym_int4")
    ids = torch.arange(3, 336)[None]
    found = []
    for count in (1, 2, 3, 5):
        with threads(count), torch.inference_mode():
            assert library().dlb_threads_count() == count
            found.append(model(ids).logits)
    assert all(torch.equal(one, found[0]) for one in found)


def test_text_is_the_same_at_every_degree(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    convert(SAMPLE, tmp_path, "sym_int4", tp=2)
    texts = {}
    for tp in WHOLE_SEGMENTS:
        _, found = ranks("greedy", tp, checkpoint=str(tmp_path), prompts=PROMPTS[:2], tokens=32)
        assert all(one == found[0] for one in found)
        texts[tp] = found[0]
    assert texts[1] == texts[2] == texts[4]
    assert all(len(one["tokens"]) == 32 for one in texts[1][::2])  # the greedy ones: a story does not end so soon


def stories() -> list[str]:
    """Return ten texts of the kind that the model was trained on."""
    data = os.environ.get("DIST_LOWBIT_TEST_DATA")
    if not data:
        return list(STORIES)
    text = (Path(data) / "text" / "storyteller-heldout.txt").read_text(encoding="utf-8")
    return [story.strip() for story in text.split("<|endoftext|>")[:10]]


@pytest.fixture(scope="module")
def teacher(tokenizer) -> tuple[Any, torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Return the fp32 model, ten windows of ids [10, 64], and its logits on them."""
    windows = []
    for story in stories():
        ids = tokenizer(story).input_ids
        while len(ids) < WINDOW:  # written sentences are short: go on with the same story
            ids += tokenizer(" " + story, add_special_tokens=False).input_ids
        windows.append(ids[:WINDOW])
    model = AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32).eval().requires_grad_(False)
    batch = torch.tensor(windows)
    with torch.no_grad():
        return model, batch, model(batch).logits


@pytest.mark.parametrize(("form", "least"), [("bf16", 0.995), ("sym_int8", 0.98)])
def test_top_tokens_agree_with_the_teachers(teacher, form: str, least: float) -> None:  # type: ignore[no-untyped-def]
    model, batch, logits = teacher
    low = low_bit.AutoModelForCausalLM.from_pretrained(SAMPLE, load_in_low_bit=form)
    with torch.inference_mode():
        found = low(batch).logits
    want, have = logits.argmax(-1), found.argmax(-1)
    agreement = float((want == have).double().mean())
    assert agreement >= least

    weights = {
        name: (module.weight.detach(), quantize(module.weight.detach(), form))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }

    def local(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return format_bound(x, weights[name][0], form) + linear_bound(x, weights[name][1])

    for row, at in (want != have).nonzero().tolist():
        better, worse = int(want[row, at]), int(have[row, at])
        ids = batch[row : row + 1]
        margin = float(logits[row, at, better] - logits[row, at, worse])
        assert margin <= margin_bound(model, ids, at, better, worse, local), (row, at)
        # That bound takes all roundings at their worst. The usual one: the weights as they were rounded, and noise of
        # the activations' rounding.
        rounded = Yardstick(SAMPLE, ids, form, "int8", dequantized=True)
        lead = float(rounded.logits[at, better] - rounded.logits[at, worse])
        assert lead <= SIGMAS * rounded.spread(better, worse, at), (row, at)
