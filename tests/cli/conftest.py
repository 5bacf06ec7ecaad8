"""The command line in this process, a small model, and a checkpoint of the sample model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dist_lowbit.cli.main import main
from dist_lowbit.core.settings import settings
from tests.cli.command_line import SAMPLE, Cli, Done

# One line per turn, so that a test can tell what the template wrote from what the user said.
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Return a function that runs a command line in this process, which no launcher started."""
    for name in [name for name in os.environ if name.startswith(("PMI_", "OMPI_", "SLURM_"))]:
        monkeypatch.delenv(name)
    settings.cache_clear()

    def run(*words: object) -> Done:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    yield run
    settings.cache_clear()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model as sym_int4, in two rank files, with a chat template."""
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    assert main(["convert", str(SAMPLE), str(folder), "--tp", "2"]) == 0
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two small layers with random weights and no tokenizer, as an ordinary model directory."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder
