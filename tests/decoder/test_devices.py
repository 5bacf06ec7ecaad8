"""The decoder of torch operations on the device it is given: no tensor of a step is made, or left, anywhere else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import dist_lowbit
from dist_lowbit import optimize_model
from dist_lowbit.comm import SingleGroup
from dist_lowbit.core.errors import UsageError
from dist_lowbit.decoder.backbone import FusedBackbone
from dist_lowbit.engine.loop import DecodeLoop, backbone_of
from dist_lowbit.ops import usable_device
from tests.decoder.exact_program import ExactProgram
from tests.decoder.pretended import There, pretended
from tests.decoder.runs import PROMPT, SHORT, padded_inputs, program_of
from tests.decoder.tiny_families import tiny_model

# What is kept, by family: int8 keys, an embedding that is scaled, frequencies by length, experts, slopes, position
# tables, norms after the sums.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"kv_cache_dtype": "int8"},
    "phi3 longrope": {"kv_cache_dtype": "fp16"},
    "qwen2_moe": {},
    "bloom": {},
    "opt post": {},
}
QUICK = ("llama",)
GPU = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), None)
GPU_MISSING = pytest.mark.skipif(GPU is None, reason="torch finds no CUDA or XPU device here")


def exact(model: Any, text: list[int], chunks: list[int], kv: str) -> ExactProgram:
    """Return what a model on the cpu computes of a text without roundings."""
    with torch.inference_mode(False):
        return ExactProgram(program_of(model, SingleGroup()), torch.tensor(text), chunks, kv)


def check_token(one: ExactProgram, found: list[list[int]]) -> None:
    """Check that two models chose the same token, or two whose logits are nearer than both may err."""
    (first,), (second,) = found
    gap = float((one.logits[-1, first] - one.logits[-1, second]).detach())
    last = len(one.logits) - 1
    assert first == second or abs(gap) <= one.bound(last, first) + one.bound(last, second), found


def inputs() -> dict[str, torch.Tensor]:
    """Return two rows, one of them padded on the left."""
    ids, mask = torch.tensor([PROMPT, PROMPT[::-1]]), torch.ones(2, len(PROMPT), dtype=torch.int64)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def check(name: str, device: str, on: torch.device) -> None:
    """Compare a model on a device with the same on the cpu, whose activations are not rounded either."""
    here: Any = optimize_model(tiny_model(name), "sym_int4", decoder="torch", compute="fp32", **KINDS[name])
    there: Any = optimize_model(tiny_model(name), "sym_int4", device=device, **KINDS[name])
    assert {p.device for p in [*there.parameters(), *there.buffers()]} == {on}
    kv, padded = KINDS[name].get("kv_cache_dtype", "fp32"), padded_inputs(here)
    texts = [exact(here, text, [len(text)], kv) for text in (PROMPT, SHORT)]
    for given in ({k: v.to(on) for k, v in padded.items()}, padded):  # inputs of the cpu are moved
        logits, wanted = there(**given).logits, here(**padded).logits
        assert logits.device == on
        for row, one in enumerate(texts):
            # Each of the two is one computation with the roundings that the bound counts.
            for token in {int(wanted[row, -1].argmax()), int(wanted[row, -1].argmin()), 7}:
                apart = abs(float(logits[row, -1, token].cpu() - wanted[row, -1, token]))
                assert apart <= 2 * one.bound(len(one.logits) - 1, token), (row, token)
    loops = [DecodeLoop(backbone_of(model)) for model in (here, there)]
    firsts = [loop.start([PROMPT]) for loop in loops]
    check_token(texts[0], firsts)
    longer = exact(here, PROMPT + firsts[0], [len(PROMPT), 1], kv)
    check_token(longer, [loop.go_on(firsts[0]) for loop in loops])
    stores = [loop._blocks.store for loop in loops]
    assert {t.device for t in stores[1].tensors()} == {on}
    if kv == "int8":  # a bound on logits is wide here; errors of fp32 move a code of the first layer by one at most
        codes = [store.keys[0].cpu().int() for store in stores]
        assert int((codes[0] - codes[1]).abs().max()) <= 1
        assert float((codes[0] == codes[1]).double().mean()) > 0.99


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in KINDS]
)
def test_a_model_runs_on_a_device_that_mixes_with_no_other(
    name: str, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    with pretended(monkeypatch) as device:
        check(name, "cuda:0", device)


@pytest.mark.parametrize("name", KINDS)
@GPU_MISSING
def test_a_model_runs_on_a_gpu(name: str) -> None:
    assert GPU is not None
    with torch.no_grad():
        check(name, GPU, torch.device(GPU, 0))


@pytest.mark.slow
def test_generate_on_a_device(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    plain: Any = optimize_model(tiny_model("llama"), "sym_int4", decoder="torch", compute="fp32")
    with pretended(monkeypatch) as device:
        model: Any = optimize_model(tiny_model("llama"), "sym_int4", device="cuda:0")
        given = {key: value.to(device) for key, value in inputs().items()}
        for way in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
            found = model.generate(**given, max_new_tokens=6, **way)
            assert isinstance(found, There)
            assert torch.equal(found.cpu(), plain.generate(**inputs(), max_new_tokens=6, **way))
        with pytest.raises(UsageError, match="runs on cuda:0 and cannot be moved to cpu; name the device"):
            model.to("cpu")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the compiled decoder": ({"decoder": "native"}, "the compiled decoder runs on the cpu; take the decoder 'torch'"),
    "no decoder": ({"optimize_llm": False}, "Hugging Face's forward over low-bit Linears runs on the cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_on_a_device_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, text = REFUSED[case]
    with pretended(monkeypatch), pytest.raises(UsageError, match=re.escape(text)):
        optimize_model(tiny_model("llama"), device="cuda:0", **options)
    with pretended(monkeypatch), pytest.raises(UsageError, match="models of known families run alone"):
        optimize_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), device="cuda:0")


def test_a_model_on_the_cpu_is_not_moved() -> None:
    model: Any = optimize_model(tiny_model("llama"))
    assert isinstance(model.model, FusedBackbone)
    assert model.to("cpu") is model
    with pytest.raises(UsageError, match="runs on cpu and cannot be moved to meta; name the device"):
        model.to("meta")


@pytest.mark.skipif(GPU is not None, reason="torch has such a device here")
@pytest.mark.parametrize("device", ["cuda", "xpu:1", "mps", "nonsense"])
def test_a_device_that_torch_lacks_is_one_sentence(device: str) -> None:
    expected = rf"^device is '{device}'[,;].* torch {re.escape(torch.__version__)} has cpu here[^.]*$"
    for call in (
        lambda: usable_device(device),
        lambda: optimize_model(tiny_model("llama"), device=device),
        lambda: dist_lowbit.llm.optimize(tiny_model("llama"), device=device),
    ):
        with pytest.raises(UsageError, match=expected):
            call()
