"""The command line in this process, small models, and a checkpoint of the sample model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dist_lowbit.sample
from dist_lowbit.cli.main import main
from dist_lowbit.core.settings import settings

ROOT = Path(__file__).parent.parent.parent
SAMPLE = dist_lowbit.sample.path()
# One line per turn, so that a test can tell what the template wrote from what the user said.
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """Return the one line of an error; fail if there is more than that."""
        assert self.code != 0
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        return self.err


Cli = Callable[..., Done]


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


def environment(**more: str) -> dict[str, str]:
    """Return an environment for a process of its own, in which the tree can be imported."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}


def process(*words: object, limit: float = 100, stdin: str = "", **more: str) -> Done:
    """Run a command line in a process of its own."""
    command = [sys.executable, "-m", "dist_lowbit.cli", *map(str, words)]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=limit, env=environment(**more), check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


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


def edit(path: Path, **values: object) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")
