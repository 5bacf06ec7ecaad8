"""Every family: Hugging Face's logits within a derived bound, and bits that nothing but the sequence decides."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.cache_utils import DynamicCache

from dist_lowbit.comm import SingleGroup
from dist_lowbit.decoder.torch_decoder import TorchDecoder
from tests.decoder.bodies import STEPS
from tests.decoder.exact_program import ExactProgram
from tests.decoder.runs import EXECUTORS, FORCED, PROMPT, SHORT, TEXT, Runner, tiny_program
from tests.decoder.tiny_families import TINY, VOCAB, tiny_model

# One of each kind: windows, fused qkv per head and per group, attention and MLP side by side, slopes, experts.
QUICK = ("mistral", "gpt_neox", "falcon 40b", "bloom", "qwen2_moe")
SLOW = tuple(name for name in TINY if name not in QUICK)
# Frequencies that depend on the length: a chunked prefill rotates its first chunks by those of shorter texts.
BY_LENGTH = ("llama dynamic", "phi3 longrope")
ROWS = (0, 7, 11, 12, 15)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def close_runs(decoder_ranks) -> Any:  # type: ignore[no-untyped-def]
    """Return a function from families and a degree to rank 0's folder of logits."""

    @functools.cache
    def run(families: tuple[str, ...], tp: int) -> Path:
        return decoder_ranks("close_to_exact", tp, families=families, executors=tuple(EXECUTORS))[0]

    return run


@pytest.fixture(scope="module")
def bit_runs(decoder_ranks) -> Any:  # type: ignore[no-untyped-def]
    """Return a function from families and a degree to the digests that every rank found."""

    @functools.cache
    def run(families: tuple[str, ...], tp: int) -> list[dict[str, dict[str, str]]]:
        return decoder_ranks("same_bits", tp, families=families, executors=tuple(EXECUTORS))[1]

    return run


@functools.cache
def exact(name: str) -> tuple[ExactProgram, ExactProgram]:
    """Return the exact program of the text and of the short sequence."""
    _, program = tiny_program(name, "fp16", "fp32", SingleGroup())
    return (
        ExactProgram(program, torch.tensor(TEXT), STEPS),
        ExactProgram(program, torch.tensor(SHORT), [len(SHORT)]),
    )


@functools.cache
def hugging_face(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Hugging Face's fp32 logits of the text, by steps with a cache, and of the short row of a padded batch."""
    model = tiny_model(name)
    parts, at = [], 0
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        for count in STEPS:
            ids = torch.tensor([TEXT[at : at + count]])
            parts.append(model(ids, past_key_values=cache, use_cache=True).logits[0])
            at += count
        ids = torch.tensor([PROMPT, [0] * (len(PROMPT) - len(SHORT)) + SHORT])
        mask = torch.tensor([[1] * len(PROMPT), [0] * (len(PROMPT) - len(SHORT)) + [1] * len(SHORT)])
        more = {}
        if "position_ids" in inspect.signature(model.forward).parameters:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(ids, attention_mask=mask, use_cache=False, **more).logits
    return torch.cat(parts), padded[1, -len(SHORT) :]


def check_close(folder: Path, name: str, executor: str) -> None:
    found = load_file(folder / f"{name} {executor}.safetensors")
    for key, ours, one, rows in zip(
        ("text", "short"), (found["text"], found["short"]), exact(name), (ROWS, (0, len(SHORT) - 1)), strict=True
    ):
        theirs = hugging_face(name)[key == "short"]
        for row in rows:
            for token in {int(theirs[row].argmax()), int(theirs[row].argmin()), (7 * row) % VOCAB}:
                bound = one.bound(row, token)
                assert bound < 0.1 * float(theirs.std()), "a bound this wide would say little"
                assert abs(float(ours[row, token]) - float(one.logits.detach()[row, token])) <= bound, (key, row, token)
                assert abs(float(ours[row, token]) - float(theirs[row, token])) <= 2 * bound, (key, row, token)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", QUICK)
def test_logits_are_hugging_faces(close_runs: Any, name: str, tp: int, executor: str) -> None:
    check_close(close_runs(QUICK, tp), name, executor)


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TINY)
def test_logits_of_every_family_are_hugging_faces(close_runs: Any, name: str, tp: int, executor: str) -> None:
    check_close(close_runs(tuple(TINY), tp), name, executor)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, "gemma2", "phi"])
def test_plain_torch_steps_are_hugging_faces(name: str) -> None:
    # What runs on other devices than the cpu, run here.
    _, program = tiny_program(name, "fp16", "fp32", SingleGroup())
    runner = Runner(program, "torch", 1)
    runner.executor = TorchDecoder(program, plain=True)
    with torch.inference_mode():
        parts = [runner.step([(0, TEXT[: len(PROMPT)])])[0], *(runner.step([(0, [token])])[0] for token in FORCED)]
    ours, theirs, one = torch.cat(parts), hugging_face(name)[0], exact(name)[0]
    for row in ROWS:
        token = int(theirs[row].argmax())
        assert abs(float(ours[row, token]) - float(theirs[row, token])) <= 2 * one.bound(row, token), (row, token)


def check_bits(bit_runs: Any, families: tuple[str, ...], name: str, degrees: tuple[int, ...], executor: str) -> None:
    first = bit_runs(families, 1)[0][f"{name} {executor}"]
    if name not in BY_LENGTH:
        assert len(set(first.values())) == 1, first
    for tp in degrees:
        for rank, found in enumerate(bit_runs(families, tp)):
            assert found[f"{name} {executor}"] == first, (tp, rank)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", QUICK)
def test_integer_formats_give_the_same_bits(bit_runs: Any, name: str, executor: str) -> None:
    check_bits(bit_runs, QUICK, name, (2,), executor)


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", TINY)
def test_integer_formats_give_the_same_bits_in_every_family(bit_runs: Any, name: str, executor: str) -> None:
    check_bits(bit_runs, tuple(TINY), name, (2, 4), executor)
