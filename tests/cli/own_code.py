"""A model that brings its own Python code, and a hub cache, written by tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIGURATION = """
from transformers import PretrainedConfig

class TwoLayersConfig(PretrainedConfig):
    model_type = "two_layers"

    def __init__(self, width=64, vocab_size=32, **kwargs):
        self.width, self.vocab_size = width, vocab_size
        super().__init__(**kwargs)
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_two_layers import TwoLayersConfig

class TwoLayers(PreTrainedModel):
    config_class = TwoLayersConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.first = nn.Linear(config.width, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.head(torch.relu(self.first(self.embed(input_ids)))))
"""
CONFIG = """{
  "architectures": ["TwoLayers"], "model_type": "two_layers", "width": 64, "vocab_size": 32,
  "auto_map": {
    "AutoConfig": "configuration_two_layers.TwoLayersConfig",
    "AutoModelForCausalLM": "modeling_two_layers.TwoLayers"
  }
}"""


def write_own_code(folder: Path) -> Path:
    """Write a model directory whose code leaves a file `ran` beside its configuration whenever it runs."""
    folder.mkdir(parents=True)
    mark = f"\nfrom pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n"
    (folder / "configuration_two_layers.py").write_text(CONFIGURATION + mark)
    (folder / "modeling_two_layers.py").write_text(MODELING)
    (folder / "config.json").write_text(CONFIG)
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (32, 64), "first.weight": (64, 64), "first.bias": (64,), "head.weight": (32, 64)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def cache_as(hub: Path, name: str, folder: Path, revision: str = "main") -> str:
    """Put a model directory into a hub cache as huggingface_hub lays it out; return its commit."""
    root = hub / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
    snapshot = root / "snapshots" / commit
    for part in (root / "blobs", root / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for path in folder.iterdir():
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return commit
