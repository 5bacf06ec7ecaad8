"""The decoder of torch operations on the device it is given: no tensor of a step is made, or left, anywhere else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import dist_lowbit
from dist_lowbit import optimize_model
from dist_lowbit.core.errors import UsageError
from dist_lowbit.decoder.backbone import FusedBackbone
from dist_lowbit.engine.loop import DecodeLoop, backbone_of
from dist_lowbit.ops import usable_device
from tests.decoder.pretended import There, pretended
from tests.decoder.runs import PROMPT
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
    for given in ({k: v.to(on) for k, v in inputs().items()}, inputs()):  # inputs of the cpu are moved
        logits = there(**given).logits
        assert logits.device == on
        # Sums of some hundred fp32 numbers in two orders, through two layers; int8 keys may round to the next code.
        torch.testing.assert_close(logits.cpu(), here(**inputs()).logits, rtol=2e-2, atol=2e-2)
    loops = [DecodeLoop(backbone_of(model)) for model in (here, there)]
    firsts = [loop.start([PROMPT]) for loop in loops]
    assert len(firsts[1]) == 1
    loops[1].go_on(firsts[0])
    stores = [loop._blocks.store for loop in loops]
    assert {t.device for t in stores[1].tensors()} == {on}


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
    "the compiled decoder": ({"decoder": "native"}, "the compiled decoder runs on the cpu; choose decoder='torch'"),
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
