"""Peak memory of converting is a few tensors, and of loading a rank's own part, whatever the model's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dist_lowbit.formats import quantizer

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20
HIDDEN, INNER, LAYERS, VOCAB = 768, 3072, 8, 2048
LARGEST = HIDDEN * INNER * 2  # bytes of the largest matrix in fp16

COMMON = """
import json, os, sys
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
"""
CONVERT = """
from dist_lowbit import convert
small, model, out = sys.argv[1:]
convert(small, out + "-small")  # what importing and the first call cost is not the model's
before = peak()
convert(model, out, "sym_int4", tp=2)
print(peak() - before)
"""
LOAD = """
import torch
from dist_lowbit.comm import init_group
from dist_lowbit.transformers import AutoModelForCausalLM
small, model, out = sys.argv[1:]
with init_group() as group:
    AutoModelForCausalLM.load_low_bit(small, tensor_parallel=group)
    before = peak()
    loaded = AutoModelForCausalLM.load_low_bit(model, tensor_parallel=group)
    with open(f"{out}-{group.rank}", "w") as file:
        print(peak() - before, file=file)
"""


def write_model(folder: Path, layers: int) -> Path:
    """Write a llama of some layers in fp16, one file per layer, so that nothing here is large either."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCAB, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=12, num_key_value_heads=12, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    index = {name: f"{name.split('.')[2] if '.layers.' in name else 'ends'}.safetensors" for name in shapes}
    for file in sorted(set(index.values())):
        part = {name: torch.randn(shapes[name]).half() * 0.02 for name in shapes if index[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def python(code: str, *words: object, ranks: int = 1) -> str:
    # One allocation arena: what several keep back for later is no memory of ours.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    script = Path(str(words[-1]) + ".py")
    script.write_text(COMMON + code)
    launch = ["-m", "dist_lowbit.launcher", "-n", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, str(script), *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("memory")
    return write_model(folder / "small", 1), write_model(folder / "model", LAYERS)


def size(folder: Path, pattern: str = "*.safetensors") -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


@pytest.mark.slow
def test_converting_holds_a_few_tensors(models: tuple[Path, Path], tmp_path: Path) -> None:
    small, model = models
    grown = int(python(CONVERT, small, model, tmp_path / "out"))
    # One matrix as it is read, once more where its rows are cut, its packed form (under a third of fp16) with the
    # parts of each rank; and an encoder's temporaries on a slice: values, groups, quotients, rounded, clamped, codes as
    # floats, then as bytes and planes: eight fp32 arrays at most. The small model has paid for most of that already.
    bound = 3 * LARGEST + 8 * 4 * quantizer._SLICE
    assert bound < size(model) / 2, "the model is too small for this test to mean anything"
    assert grown < bound, f"{grown / MIB:.1f} MiB, expected at most {bound / MIB:.1f}"


@pytest.mark.slow
def test_loading_holds_the_ranks_part(models: tuple[Path, Path], tmp_path: Path) -> None:
    small, model = models
    for name, source in (("a", small), ("b", model)):
        python("from dist_lowbit import convert\nconvert(sys.argv[1], sys.argv[2], tp=2)", source, tmp_path / name)
    python(LOAD, tmp_path / "a", tmp_path / "b", tmp_path / "grown", ranks=2)
    for rank in range(2):
        grown = int((tmp_path / f"grown-{rank}").read_text())
        (shard,) = (tmp_path / "b").glob(f"lowbit-*-{rank + 1:05}-of-00002.safetensors")
        # The rank's part as it is stored; its half of the embedding, stored in fp16 and held in fp32, once more; one
        # matrix as read beside its prepacked form; and a quarter for what the allocator cannot give back.
        part = shard.stat().st_size + VOCAB * HIDDEN * 2 // 2
        bound = 5 * (part + LARGEST) // 4
        assert grown < bound, f"rank {rank}: {grown / MIB:.1f} MiB, expected at most {bound / MIB:.1f}"


WIDE = """
import dataclasses, torch
from dist_lowbit.assembly.mode import Mode
from dist_lowbit.bench.random_model import make_model
from dist_lowbit.comm import SingleGroup
from dist_lowbit.transformers import AutoModelForCausalLM
what, place, out = sys.argv[1:]
if what == "make":
    make_model(place, "sym_int4", None, SingleGroup(), Mode()).model.save_low_bit(out)
else:
    before = peak()
    loaded = AutoModelForCausalLM.load_low_bit(out)
    loaded.generate(torch.arange(2, 34)[None], max_new_tokens=4, do_sample=False)
    print(peak() - before)
"""


@pytest.mark.slow
def test_a_loaded_model_that_decodes_takes_little_more_than_its_file(tmp_path: Path) -> None:
    """Six layers as wide as those of Llama-2 7B: what is freed between its matrices is given back."""
    config = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 6}
    LlamaConfig(**config, vocab_size=32000, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "shape")
    python(WIDE, "make", tmp_path / "shape", tmp_path / "low")
    grown = int(python(WIDE, "load", tmp_path / "shape", tmp_path / "low"))
    # Beside the weights: the largest matrix in 4 bits as it is read, 128 tokens of fp32 keys and values, activations of
    # 32 rows with their logits, and torch's own first calls, together less than a
    # tenth. glibc by itself keeps a quarter.
    bound = size(tmp_path / "low") + 32000 * 4096 * 17 // 32 + 6 * 128 * 2 * 4096 * 4 + (64 << 20)
    assert grown < bound, f"{grown / MIB:.1f} MiB, expected at most {bound / MIB:.1f}"
