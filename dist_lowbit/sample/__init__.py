"""The sample model that ships with the package: storyteller, a very small Llama that tells children's stories."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def path() -> Path:
    """Return the folder of the sample model, a Hugging Face directory (safetensors fp16, tokenizer, model card).

    Costs nothing: no file is opened. The folder belongs to the installed package and may be read-only.
    """
    return Path(str(files(__name__).joinpath("storyteller")))
