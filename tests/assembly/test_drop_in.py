"""The calls that users of the ancestors write, with imports and model names changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import dist_lowbit.sample
from dist_lowbit import optimize_model
from dist_lowbit import transformers as ours
from dist_lowbit.optimize import load_low_bit, low_memory_init
from dist_lowbit.parallel import LowBitLinear

SAMPLE = str(dist_lowbit.sample.path())


def test_optimize_in_one_line(prompt: torch.Tensor) -> None:
    model = LlamaForCausalLM.from_pretrained(SAMPLE, torch_dtype="auto", low_cpu_mem_usage=True)
    model = optimize_model(model)
    swapped = [module for module in model.modules() if isinstance(module, LowBitLinear)]
    assert len(swapped) == 6 * 7 + 1
    assert {module.format for module in swapped} == {"sym_int4"}
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, prompt.shape[1] + 4)


def test_another_precision(story) -> None:
    model = optimize_model(story(), low_bit="sym_int8")
    assert model.lm_head.format == "sym_int8"


@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
def test_save_then_load_into_a_low_memory_model(cls: type, story, prompt: torch.Tensor, tmp_path: Path) -> None:
    model = optimize_model(story())
    before = model(prompt).logits  # saving works after the model has run
    saved_dir = str(tmp_path / "llama-4-bit")
    model.save_low_bit(saved_dir)
    with low_memory_init():  # Fast and low cost by loading model on meta device
        loaded = cls.from_pretrained(saved_dir, torch_dtype="auto", trust_remote_code=True)
    assert all(parameter.is_meta for parameter in loaded.parameters())
    loaded = load_low_bit(loaded, saved_dir)
    assert torch.equal(loaded(prompt).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loaded_model_has_the_dtype_of_the_saved_one(
    dtype: torch.dtype, story, prompt: torch.Tensor, tmp_path: Path
) -> None:
    model = optimize_model(story(), torch_dtype=dtype)
    assert model.dtype == model.config.dtype == dtype
    model.save_low_bit(tmp_path)
    with low_memory_init():
        empty = AutoModelForCausalLM.from_pretrained(tmp_path)
    doors = {
        "low_memory_init": load_low_bit(empty, tmp_path),
        "ordinary": load_low_bit(story(), tmp_path, torch_dtype="auto"),
        "our Auto class": ours.AutoModelForCausalLM.load_low_bit(tmp_path),
        "Hugging Face": AutoModelForCausalLM.from_pretrained(tmp_path),
    }
    for door, loaded in doors.items():
        assert loaded.dtype == loaded.config.dtype == dtype, door
        assert torch.equal(loaded(prompt).logits, model(prompt).logits), door
    other = load_low_bit(story(), tmp_path, torch_dtype=torch.float32)
    assert other.dtype == other.config.dtype == torch.float32


def test_load_into_a_model_loaded_the_ordinary_way(story, prompt: torch.Tensor, tmp_path: Path) -> None:
    model = optimize_model(story(), low_bit="asym_int4")
    model.save_low_bit(tmp_path)
    assert torch.equal(load_low_bit(story(), tmp_path)(prompt).logits, model(prompt).logits)


def test_hugging_face_loads_our_directory(story, prompt: torch.Tensor, tmp_path: Path) -> None:
    model = optimize_model(story())
    model.save_low_bit(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    loaded.save_low_bit(tmp_path / "again")
    assert (tmp_path / "again" / "lowbit.json").is_file()


def test_whisper_transcribes_saves_and_loads(tmp_path: Path) -> None:
    whisper = pytest.importorskip("whisper", reason="openai-whisper is not installed")
    dims = whisper.model.ModelDimensions(
        n_mels=80, n_audio_ctx=1500, n_audio_state=64, n_audio_head=2, n_audio_layer=1,
        n_vocab=51865, n_text_ctx=448, n_text_state=64, n_text_head=2, n_text_layer=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = whisper.model.Whisper(dims)
    for parameter in model.parameters():  # some stand uninitialised until weights are loaded
        torch.nn.init.normal_(parameter, std=0.02)
    model = optimize_model(model)  # With only one line code change
    audio = torch.randn(16000) * 0.1
    result = model.transcribe(audio, language="English", temperature=0.0, sample_len=4)
    assert isinstance(result["text"], str)
    model.save_low_bit(tmp_path)
    fresh = whisper.model.Whisper(dims)
    loaded = load_low_bit(fresh, tmp_path)
    mel, tokens = torch.randn(1, 80, 3000), torch.tensor([[50258, 50259]])
    assert torch.equal(loaded(mel, tokens), model(mel, tokens))


OTHER_WAY_ROUND = """
{first}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path!r})
print(type(model.lm_head).__name__)
"""


def plain_transformers(first: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Load a directory of ours in a fresh process that begins with the line `first`."""
    code = OTHER_WAY_ROUND.format(first=first, path=str(path))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    ["import dist_lowbit", "import transformers, dist_lowbit", "from dist_lowbit import init_group"],
)
def test_plain_transformers_knows_us_in_any_order(first: str, story, tmp_path: Path) -> None:
    optimize_model(story()).save_low_bit(tmp_path)
    done = plain_transformers(first, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "LowBitLinear"


@pytest.mark.slow
def test_transformers_alone_stops_instead_of_running_on_random_weights(story, tmp_path: Path) -> None:
    optimize_model(story()).save_low_bit(tmp_path)
    done = plain_transformers("", tmp_path)
    assert done.returncode != 0
    assert "mismatch" in done.stderr


ALONE_THEN_WITH_US = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("mismatch" in str(error), "dist_lowbit" in sys.modules)
import dist_lowbit
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).lm_head).__name__)
"""


def test_transformers_stops_alone_and_knows_us_once_we_are_imported(story, tmp_path: Path) -> None:
    optimize_model(story()).save_low_bit(tmp_path)
    done = subprocess.run([sys.executable, "-c", ALONE_THEN_WITH_US, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False", "LowBitLinear"]
