"""init_inference and BenchmarkWrapper on one rank; several ranks and DeepSpeed itself are in tests/examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import dist_lowbit.sample
from dist_lowbit import BenchmarkWrapper, init_inference, low_memory_init, optimize_model
from dist_lowbit.assembly.inference import checkpoint_path, read_tensor_parallel
from dist_lowbit.comm import SingleGroup
from dist_lowbit.core.errors import UsageError

SAMPLE = str(dist_lowbit.sample.path())


def test_every_way_to_a_split_model_gives_the_same(story, prompt: torch.Tensor, tmp_path: Path) -> None:
    expected = optimize_model(story())(prompt).logits
    engine = init_inference(story(), low_bit="sym_int4", dtype="float32", save_mp_checkpoint_path=tmp_path / "saved")
    assert torch.equal(engine(prompt).logits, expected)
    assert engine.generate(prompt, max_new_tokens=2, do_sample=False).shape == (1, prompt.shape[1] + 2)
    files = tmp_path / "checkpoints.json"
    files.write_text(json.dumps({"type": "Llama", "checkpoints": ["model.safetensors"], "base_dir": SAMPLE}))
    for low_bit, checkpoint in (("sym_int4", files), (None, tmp_path / "saved")):
        with low_memory_init():
            empty = LlamaForCausalLM.from_pretrained(SAMPLE)
        config = {"tensor_parallel": {"tp_size": 1}, "low_bit": low_bit, "checkpoint": checkpoint}
        assert torch.equal(init_inference(empty, config).module(prompt).logits, expected)


def test_without_a_format_weights_keep_their_dtype(story, prompt: torch.Tensor) -> None:
    model = init_inference(story(), mp_size=1, replace_method="auto", max_out_tokens=64).module
    assert {model.lm_head.format, model.model.layers[0].mlp.up_proj.format} == {"fp16"}


TENSOR_PARALLEL = [
    (None, "auto"),
    ({"tp_size": 4}, 4),
    ({"tp_size": 4, "enabled": False}, 1),
    (2, 2),
]


@pytest.mark.parametrize(("given", "asked"), TENSOR_PARALLEL)
def test_tensor_parallel_is_read(given: object, asked: object) -> None:
    assert read_tensor_parallel(given) == asked
    group = SingleGroup()
    assert read_tensor_parallel({"tp_group": group}) is group


def test_a_description_of_files_is_their_folder(tmp_path: Path) -> None:
    assert checkpoint_path("org/model", None) == "org/model"
    assert checkpoint_path({"checkpoints": ["a/x.bin", "a/y.bin"]}, "/base") == "/base/a"
    assert checkpoint_path({"checkpoints": ["x"], "base_dir": "/own"}, "/base") == "/own"
    for bad, words in (
        ({"checkpoints": []}, "no list of files"),
        ({"checkpoints": ["a/x", "b/y"]}, "lie in 2 folders"),
        (str(tmp_path / "none.json"), "cannot be read"),
    ):
        with pytest.raises(UsageError, match=words):
            checkpoint_path(bad, None)


REFUSED = [
    ({"replace_with_kernel_inject": True}, "runs no injected kernels; replace_with_kernel_inject must be False"),
    ({"quant": {}}, "init_inference has no argument 'quant'"),
    ({"tensor_parallel": {"size": 2}}, "tensor_parallel has no entry 'size'"),
    ({"tensor_parallel": {"tp_group": object()}}, "tp_group is a object; expected a Group"),
    ({"mp_size": 3}, "tensor_parallel is 3, but this job has 1 rank"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_it_cannot_do_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        init_inference(torch.nn.Linear(64, 64), **options)


def test_an_empty_model_needs_a_checkpoint() -> None:
    with pytest.raises(UsageError, match="name them by checkpoint="):
        init_inference(torch.nn.Linear(64, 64, device="meta"), low_bit="sym_int4")


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_tokens_are_timed(story, prompt: torch.Tensor, beams: int) -> None:
    said: list[str] = []
    model = BenchmarkWrapper(optimize_model(story()), out=said.append)
    output = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams)
    assert output.shape[1] == prompt.shape[1] + 5
    assert model.first_cost > 0
    assert len(model.rest_costs) == 4
    assert model.rest_cost_mean == pytest.approx(sum(model.rest_costs) / 4)
    assert said[0].startswith("First token cost ")
    assert model.config.model_type == "llama"
    assert torch.equal(model(prompt).logits, model.model(prompt).logits)


def test_what_cannot_generate_is_refused() -> None:
    with pytest.raises(UsageError, match="Linear has no generate"):
        BenchmarkWrapper(torch.nn.Linear(1, 1))
