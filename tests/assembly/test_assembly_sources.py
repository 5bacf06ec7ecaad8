"""Every way from a model to a low-bit one gives the same model: what kind of files, which class, which door."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import dist_lowbit.sample
import dist_lowbit.transformers as ours
from dist_lowbit import convert, load_low_bit, low_memory_init, optimize_model
from dist_lowbit.checkpoint import CheckpointReader, is_checkpoint
from dist_lowbit.core.errors import UsageError
from dist_lowbit.formats.table import ALIASES, USER_FORMATS
from dist_lowbit.parallel import LowBitLinear

ROOT = Path(__file__).parent.parent.parent
SAMPLE = str(dist_lowbit.sample.path())
IDS = torch.arange(3, 11).reshape(2, 4)


def llama(**more: object) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=64, **more))


def gpt2(**more: object) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2, **more))


def neox() -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=60, max_position_embeddings=32, **sizes))


def t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **sizes))


BERT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def bert() -> PreTrainedModel:
    return BertModel(BertConfig(**BERT))


def classifier() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**BERT, num_labels=3))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "gpt2, tied": lambda: gpt2(tie_word_embeddings=True),
    "gpt2": lambda: gpt2(tie_word_embeddings=False),
    "gpt_neox, a family of none": neox,
    "t5": t5,
    "bert": bert,
    "bert classifier": classifier,
}
DOORS = {  # by model_type and head, the Auto class whose from_pretrained a user would call
    "t5": "AutoModelForSeq2SeqLM",
    "bert": "AutoModel",
    "bert classifier": "AutoModelForSequenceClassification",
}


def seeded(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def run(model: nn.Module) -> torch.Tensor:
    """Return the first output of a model on the same input."""
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        output = model(**inputs)[0]
    assert isinstance(output, torch.Tensor)
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """Return a function that gives a model's directory, and the output of that model after optimize_model."""
    folder = tmp_path_factory.mktemp("models")
    known: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(name: str) -> tuple[Path, torch.Tensor]:
        if name not in known:
            model = seeded(name)
            model.save_pretrained(folder / name)
            known[name] = folder / name, run(optimize_model(model, low_bit="sym_int8"))
        return known[name]

    return make


Made = Callable[[str], tuple[Path, torch.Tensor]]


@pytest.mark.parametrize("name", MODELS)
def test_every_door_gives_the_same_bits(name: str, made: Made, tmp_path: Path) -> None:
    source, expected = made(name)
    door = DOORS.get(name, "AutoModelForCausalLM")
    model = getattr(ours, door).from_pretrained(source, load_in_low_bit="sym_int8")
    assert torch.equal(run(model), expected)
    model.save_low_bit(tmp_path / "saved")
    convert(source, tmp_path / "converted", "sym_int8", tp=2)
    for directory in (tmp_path / "saved", tmp_path / "converted"):
        for entry in (getattr(ours, door), getattr(transformers, door)):
            loaded = entry.from_pretrained(directory)
            assert torch.equal(run(loaded), expected), (directory.name, entry.__module__)
        with low_memory_init():
            empty = getattr(transformers, door).from_pretrained(directory, torch_dtype="auto")
        assert all(parameter.is_meta for parameter in empty.parameters())
        assert torch.equal(run(load_low_bit(empty, directory)), expected)
        assert torch.equal(run(load_low_bit(seeded(name), directory)), expected)


@pytest.mark.parametrize("name", ["llama, tied", "gpt2, tied"])
def test_tied_weights_are_two_from_here_on(name: str, made: Made, tmp_path: Path) -> None:
    source, _ = made(name)
    convert(source, tmp_path, "sym_int4")
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    with CheckpointReader(tmp_path) as reader:
        formats = {weight: info.format for weight, info in reader.weights.items()}
    embedding = next(iter(name for name in formats if "embed_tokens" in name or "wte" in name), None)
    assert formats["lm_head.weight"] == "sym_int4"
    assert embedding is None or formats[embedding] == "fp32"


@pytest.mark.parametrize("kind", ["sharded", "bin", "sharded bin", "half", "bfloat16"])
def test_every_kind_of_source(kind: str, made: Made, tmp_path: Path) -> None:
    source, _ = made("llama")
    model = LlamaForCausalLM.from_pretrained(source)
    if kind in ("half", "bfloat16"):
        model = model.to(getattr(torch, kind))
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="40KB" if kind == "sharded" else "1GB")
    if "bin" in kind:
        (folder / "model.safetensors").unlink()
        state = model.state_dict()
        names = sorted(state)
        parts = [names] if kind == "bin" else [names[:9], names[9:]]
        files = [f"pytorch_model-{i}.bin" for i in range(len(parts))] if len(parts) > 1 else ["pytorch_model.bin"]
        for file, part in zip(files, parts, strict=True):
            torch.save({name: state[name] for name in part}, folder / file)
        if len(parts) > 1:
            index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert (folder / "model.safetensors.index.json").exists() == (kind == "sharded")
    plain = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    expected = run(optimize_model(plain, low_bit="asym_int4"))
    convert(folder, tmp_path / "out", "asym_int4", tp=3)
    assert torch.equal(run(ours.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
    loaded = ours.AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="asym_int4")
    assert torch.equal(run(loaded), expected)


QUICK = ("sym_int4", "sym_int8", "nf4")  # the others take a second each


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in USER_FORMATS]
)
def test_every_format_by_name_on_the_sample_model(name: str, prompt: torch.Tensor) -> None:
    model = ours.AutoModelForCausalLM.from_pretrained(SAMPLE, load_in_low_bit=name)
    assert isinstance(model.lm_head, LowBitLinear)
    assert model.lm_head.format == ALIASES.get(name, name)
    logits = model(prompt).logits
    plain = LlamaForCausalLM.from_pretrained(SAMPLE, torch_dtype="auto")
    assert torch.equal(optimize_model(plain, low_bit=name)(prompt).logits, logits)


def test_load_in_4bit_is_sym_int4(prompt: torch.Tensor) -> None:
    model = ours.AutoModelForCausalLM.from_pretrained(SAMPLE, load_in_4bit=True, optimize_model=False)
    assert model.lm_head.format == "sym_int4"
    with pytest.raises(UsageError, match="load_in_4bit means sym_int4, but load_in_low_bit is 'nf4'; give one"):
        ours.AutoModelForCausalLM.from_pretrained(SAMPLE, load_in_4bit=True, load_in_low_bit="nf4")


def test_without_a_format_the_answer_is_hugging_faces_own(prompt: torch.Tensor) -> None:
    model = ours.AutoModelForCausalLM.from_pretrained(SAMPLE)
    assert type(model.lm_head) is nn.Linear


def test_low_memory_init_nests_and_is_restored(tmp_path: Path) -> None:
    before = PreTrainedModel.__dict__["from_pretrained"]
    bert().save_pretrained(tmp_path)
    with low_memory_init():
        with low_memory_init():
            assert next(BertModel.from_pretrained(tmp_path).parameters()).is_meta
        assert next(AutoModel.from_pretrained(tmp_path).parameters()).is_meta
    assert PreTrainedModel.__dict__["from_pretrained"] is before
    assert not next(BertModel.from_pretrained(tmp_path).parameters()).is_meta
    with pytest.raises(ZeroDivisionError), low_memory_init(), low_memory_init():
        _ = 1 / 0
    assert PreTrainedModel.__dict__["from_pretrained"] is before


def test_low_memory_init_refuses_what_is_no_model(tmp_path: Path) -> None:
    with low_memory_init():
        with pytest.raises(UsageError, match=r"holds no config\.json, so it is no model directory"):
            BertModel.from_pretrained(tmp_path)
        with pytest.raises(UsageError, match="does not exist; expected a model directory or a hub id"):
            BertModel.from_pretrained(tmp_path / "none")


def test_low_memory_init_takes_what_from_pretrained_takes(tmp_path: Path) -> None:
    convert(SAMPLE, tmp_path)
    with low_memory_init():
        model = AutoModelForCausalLM.from_pretrained(
            str(tmp_path), torch_dtype="auto", low_cpu_mem_usage=True, use_cache=True, attn_implementation="eager"
        )
        config = LlamaConfig.from_pretrained(tmp_path)
        other = LlamaForCausalLM.from_pretrained(tmp_path, config=config)
    assert model.config._attn_implementation == "eager"
    assert other.config.vocab_size == 2048
    load_low_bit(model, tmp_path)


def test_save_pretrained_saves_a_checkpoint_of_ours(made: Made, tmp_path: Path) -> None:
    source, expected = made("llama")
    model = ours.AutoModelForCausalLM.from_pretrained(source, load_in_low_bit="sym_int8")
    model.save_pretrained(tmp_path / "a", safe_serialization=True)
    assert is_checkpoint(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(str(tmp_path / "b"))
    again = ours.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(run(again), expected)
    for unknown in ({"max_shard_size": "1GB"}, {"push_to_hub": True}, {"safe_serialization": False}):
        with pytest.raises(UsageError, match=f"takes a directory only; {next(iter(unknown))} has no effect"):
            model.save_pretrained(tmp_path / "c", **unknown)
    assert not (tmp_path / "c").exists()


def test_unknown_arguments_are_refused(made: Made, tmp_path: Path) -> None:
    source, _ = made("llama")
    cls = ours.AutoModelForCausalLM
    all_of_them = (
        "load_in_4bit, load_in_low_bit, tensor_parallel, optimize_model, modules_to_not_convert, cpu_embedding, "
        "revision, trust_remote_code, dtype, device_map, low_cpu_mem_usage, use_cache, torch_dtype, compute, decoder, "
        "kv_cache_dtype, device, group_size"
    )
    with pytest.raises(UsageError, match=f"no argument 'pipeline_parallel_stages'; its arguments are {all_of_them}$"):
        cls.from_pretrained(source, load_in_4bit=True, pipeline_parallel_stages=2)
    with pytest.raises(UsageError, match=r"device is 'xpu', and torch .* has "):
        cls.from_pretrained(source, load_in_4bit=True, device_map="xpu")
    convert(source, tmp_path)
    with pytest.raises(UsageError, match="is a low-bit checkpoint already; drop load_in_low_bit"):
        cls.from_pretrained(tmp_path, load_in_4bit=True)
    with pytest.raises(UsageError, match="holds an ordinary model, no low-bit checkpoint"):
        cls.load_low_bit(source)
    with pytest.raises(UsageError, match="tensor_parallel is 2, but this job has 1 rank"):
        cls.from_pretrained(source, load_in_4bit=True, tensor_parallel=2)
    with pytest.raises(UsageError, match="expected auto, a number of ranks, or a Group"):
        cls.from_pretrained(source, load_in_4bit=True, tensor_parallel="all")
    with pytest.raises(UsageError, match="device_map is"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")


PURE = """
import sys, torch
from dist_lowbit.core.native import native
from dist_lowbit.transformers import AutoModelForCausalLM
assert native() is None
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(3, 11).reshape(2, 4)).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_a_saved_directory_runs_in_pure_torch_with_the_same_bits(made: Made, tmp_path: Path) -> None:
    source, expected = made("llama")
    convert(source, tmp_path / "saved", "sym_int8", tp=2)
    subprocess.run(
        [sys.executable, "-c", PURE, str(tmp_path / "saved"), str(tmp_path / "logits")],
        env={**os.environ, "DIST_LOWBIT_LIBRARY": "none", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert torch.equal(torch.load(tmp_path / "logits"), expected)
