"""Quantize every Linear of any PyTorch model in one line, save it, and load it again.

python examples/optimize_any_module.py
"""

import tempfile

import torch
from torch import nn

from dist_lowbit import load_low_bit, optimize_model


def build() -> nn.Module:
    layer = nn.TransformerEncoderLayer(d_model=256, nhead=4, dim_feedforward=1024, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=4).eval()


def main() -> None:
    model = build()
    x = torch.randn(1, 16, 256)
    with torch.no_grad():
        before = model(x)
        model = optimize_model(model, low_bit="sym_int8")  # the one line
        after = model(x)
    print(f"cosine similarity {torch.cosine_similarity(before.flatten(), after.flatten(), dim=0):.4f}")

    with tempfile.TemporaryDirectory() as directory:
        model.save_low_bit(directory)
        loaded = load_low_bit(build(), directory)
        with torch.no_grad():
            print("loaded equals saved:", torch.equal(loaded(x), after))


if __name__ == "__main__":
    main()
