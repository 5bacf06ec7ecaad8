"""Every family: Hugging Face's logits within a derived bound, and bits that nothing but the sequence decides.

Where Hugging Face has no forward (plain_forwards.MODELS), those in plain torch stand in its place.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.cache_utils import DynamicCache

from dist_lowbit.assembly.build import build
from dist_lowbit.assembly.mode import Mode
from dist_lowbit.assembly.target import make_target
from dist_lowbit.comm import SingleGroup
from dist_lowbit.core.errors import PlanError
from dist_lowbit.decoder.torch_decoder import TorchDecoder
from dist_lowbit.models import FAMILIES
from dist_lowbit.optimize import optimize_model
from tests.decoder.bodies import STEPS
from tests.decoder.exact_program import ExactProgram
from tests.decoder.plain_forwards import MODELS, plain_logits
from tests.decoder.runs import (
    EXECUTORS,
    FORCED,
    PROMPT,
    SHORT,
    TEXT,
    Runner,
    padded_inputs,
    program_of,
    run_alone,
    tiny_program,
)
from tests.decoder.tiny_families import TINY, VOCAB, tiny_model

# One of each kind: windows, fused qkv per head and per group, attention and MLP side by side, slopes, experts.
QUICK = ("mistral", "gpt_neox", "falcon 40b", "bloom", "qwen2_moe")
NAMES = (*TINY, *MODELS)
# Frequencies that depend on the length, beyond 16 tokens: there rows are rotated by the length at their own step, and
# in a padded batch of Hugging Face's by the longest row's.
BY_LENGTH = ("llama dynamic", "phi3 longrope")
NEW = 64  # greedy tokens
PADDED = [PROMPT, [0] * (len(PROMPT) - len(SHORT)) + SHORT]
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "phi3")  # tests/e2e runs Hugging Face's forward of these
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
    if name in MODELS:
        return plain_logits(name, torch.tensor([TEXT]))[0], plain_logits(name, torch.tensor([SHORT]))[0]
    model = tiny_model(name)
    with torch.inference_mode():
        padded = model(**padded_inputs(model), use_cache=False).logits
    return by_steps(model, TEXT), padded[1, -len(SHORT) :]


@torch.inference_mode()
def by_steps(model: Any, text: list[int]) -> torch.Tensor:
    """Return a model's logits [T, vocab] of a text: its first tokens in one step, then each in its own."""
    cache = DynamicCache(config=model.config)
    first, *others = torch.tensor([text]).split([len(PROMPT)] + [1] * (len(text) - len(PROMPT)), 1)
    return torch.cat([model(ids, past_key_values=cache, use_cache=True).logits[0] for ids in (first, *others)])


@functools.cache
def exact_bound(name: str, short: bool, row: int, token: int) -> float:
    """Return the bound of a logit of the text or of the short sequence."""
    return exact(name)[short].bound(row, token)


def check_close(folder: Path, name: str, executor: str) -> None:
    found = load_file(folder / f"{name} {executor}.safetensors")
    ends = (0, len(SHORT) - 1)
    # A row of a padded batch is the sequence without its padding, and its neighbour the first tokens of the text.
    for key, short, rows in (("text", False, ROWS), ("beside", False, ROWS[:3]), ("short", True, ends),
                             ("padded", True, ends)):  # fmt: skip
        ours, theirs, one = found[key], hugging_face(name)[short], exact(name)[short].logits.detach()
        for row in rows:
            for token in {int(theirs[row].argmax()), int(theirs[row].argmin()), (7 * row) % VOCAB}:
                bound = exact_bound(name, short, row, token)
                assert bound < 0.1 * float(theirs.std()), "a bound this wide would say little"
                assert abs(float(ours[row, token]) - float(one[row, token])) <= bound, (key, row, token)
                assert abs(float(ours[row, token]) - float(theirs[row, token])) <= 2 * bound, (key, row, token)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", QUICK)
def test_logits_are_hugging_faces(close_runs: Any, name: str, tp: int, executor: str) -> None:
    check_close(close_runs(QUICK, tp), name, executor)


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_every_family_are_hugging_faces(close_runs: Any, name: str, tp: int, executor: str) -> None:
    check_close(close_runs(NAMES, tp), name, executor)


# Families whose Hugging Face forward runs on a part of the heads.
CUT = ("gemma", "gemma2", "glm", "glm4", "phi", "starcoder2", "mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_hugging_faces_forward_runs_over_cut_modules(decoder_ranks: Any, tp: int) -> None:
    folder, _ = decoder_ranks("hugging_face_forward", tp, families=CUT)
    for name in CUT:
        ours, theirs, one = load_file(folder / f"{name}.safetensors")["text"], hugging_face(name)[0], exact(name)[0]
        for row in ROWS:
            token = int(theirs[row].argmax())
            assert abs(float(ours[row, token]) - float(theirs[row, token])) <= 2 * one.bound(row, token), (name, row)


def test_a_cut_model_that_needs_the_decoder_says_so() -> None:
    needs = {name for name, family in FAMILIES.items() if family.own_decoder and family.bare is None}
    assert needs == {TINY[name].model_type for name in TINY} - {TINY[n].model_type for n in CUT} - set(LLAMA_LIKE)
    target = make_target(tiny_model("gpt_neox"), lambda name: 64, 2, lambda name: True)
    unused: Any = None
    with pytest.raises(PlanError, match="forward of gpt_neox cannot run on a part of the heads"):
        build(unused, target, unused, unused, unused, frozenset(), Mode(decoder="off"))


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_greedy_tokens_are_hugging_faces(decoder_ranks: Any, tp: int) -> None:
    texts = {name: greedy_text(name) for name in NAMES}
    _, found = decoder_ranks(
        "greedy_texts", tp, texts={n: t for n, (t, _) in texts.items()}, executors=tuple(EXECUTORS)
    )
    compared = 0
    for name in NAMES:
        text, theirs = texts[name]
        for executor in EXECUTORS:
            ours = found[0][f"{name} {executor}"]
            for row in range(len(PROMPT) - 1, len(text) - 1):
                best, other = text[row + 1], ours[row]
                compared += best == other
                if best != other:  # only where their logits are nearer than both may err
                    gap = float(theirs[row, best] - theirs[row, other])
                    one = long_exact(name, tuple(text))
                    assert gap <= 2 * (one.bound(row, best) + one.bound(row, other)), (name, executor, row)
    assert compared > 0.9 * NEW * len(NAMES) * len(EXECUTORS)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_generate_runs_on_the_decoder_in_every_family(decoder_ranks: Any, tp: int) -> None:
    # Padded rows of BY_LENGTH rotate by their own length here, by the longest row's in Hugging Face's forward.
    batches = {name: [PROMPT] if name in BY_LENGTH else PADDED for name in NAMES}
    _, found = decoder_ranks("generated", tp, families=batches)
    compared = 0
    for name in NAMES:
        assert all(one[name] == found[0][name] for one in found), name
        compared += sum(agreed(name, *rows) for rows in zip(found[0][name], generated(name), strict=True))
    assert compared > 0.9 * 8 * sum(map(len, batches.values()))


@functools.cache
def generated(name: str) -> list[list[int]]:
    """Return what Hugging Face's model generates from the rows of a batch, with their padding."""
    ids = torch.tensor([PROMPT] if name in BY_LENGTH else PADDED)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    if name not in MODELS:
        return tiny_model(name).generate(ids, attention_mask=(ids != 0).long(), **options).tolist()
    return [[0] * row.count(0) + continued(name, row[row.count(0) :], 8)[0] for row in ids.tolist()]


def continued(name: str, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Return a prompt and its greedy tokens by a forward in plain torch, and the logits of all but the last."""
    text = list(prompt)
    for _ in range(count):
        logits = plain_logits(name, torch.tensor([text]))[0]
        text.append(int(logits[-1].argmax()))
    return text, logits


def agreed(name: str, ours: list[int], theirs: list[int]) -> int:
    """Return how many new tokens are the same before two texts part, which they may where both logits are as good."""
    for at in range(len(PROMPT), len(ours)):
        if ours[at] != theirs[at]:
            text = tuple(ours[next(i for i, token in enumerate(ours) if token) : at])  # without the padding
            one = long_exact(name, text)
            # Each forward may be wrong by the bound of each token's logit.
            gap = float((one.logits[-1, theirs[at]] - one.logits[-1, ours[at]]).detach())
            assert abs(gap) <= one.bound(len(text) - 1, ours[at]) + one.bound(len(text) - 1, theirs[at]), (name, at)
            return at - len(PROMPT)
    return len(ours) - len(PROMPT)


@functools.cache
def greedy_text(name: str) -> tuple[list[int], torch.Tensor]:
    """Return the prompt and its greedy tokens by Hugging Face's model, and its logits of all but the last."""
    if name in MODELS:
        return continued(name, PROMPT, NEW)
    model, text, parts = tiny_model(name), list(PROMPT), []
    cache, ids = DynamicCache(config=model.config), torch.tensor([PROMPT])
    with torch.inference_mode():
        for _ in range(NEW):
            parts.append(model(ids, past_key_values=cache, use_cache=True).logits[0])
            text.append(int(parts[-1][-1].argmax()))
            ids = torch.tensor([text[-1:]])
    return text, torch.cat(parts)


@functools.cache
def long_exact(name: str, text: tuple[int, ...]) -> ExactProgram:
    """Return the exact program of a long text."""
    _, program = tiny_program(name, "fp16", "fp32", SingleGroup())
    first = min(len(PROMPT), len(text))
    return ExactProgram(program, torch.tensor(text), [first] + [1] * (len(text) - first))


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
    (alone,) = bit_runs(families, 1)
    # Texts beyond the limit of BY_LENGTH are run in the same steps each time.
    for key in (key for key in alone if key in (f"{name} {executor}", f"{name} {executor} long")):
        assert len(set(alone[key].values())) == 1, alone[key]
        for tp in degrees:
            for rank, found in enumerate(bit_runs(families, tp)):
                assert found[key] == alone[key], (tp, rank, key)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", QUICK)
def test_integer_formats_give_the_same_bits(bit_runs: Any, name: str, executor: str) -> None:
    check_bits(bit_runs, QUICK, name, (2,), executor)


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", NAMES)
def test_integer_formats_give_the_same_bits_in_every_family(bit_runs: Any, name: str, executor: str) -> None:
    check_bits(bit_runs, NAMES, name, (2, 4), executor)


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", QUICK)
def test_eight_ranks_of_six_heads_give_the_bits_of_one(bit_runs: Any, name: str, executor: str) -> None:
    check_bits(bit_runs, QUICK, name, (8,), executor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2_moe", {"modules_to_not_convert": ["lm_head", "gate_proj"]}),
        ("mistral", {"modules_to_not_convert": ["o_proj"], "compute": "fp32"}),
        ("gemma2", {"torch_dtype": torch.bfloat16}),
        ("opt post", {"torch_dtype": "float16"}),
    ],
)
def test_executors_agree_whatever_is_kept_or_cast(name: str, options: dict[str, Any]) -> None:
    with torch.inference_mode():
        program = program_of(optimize_model(tiny_model(name), "sym_int8", **options), SingleGroup())
        for kv in ("fp32", "bf16", "int8"):
            first, *others = (run_alone(program, executor, TEXT, STEPS, kv) for executor in EXECUTORS)
            assert all(torch.equal(first, other) for other in others), kv
