"""The families that are known: to add one, add an entry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .bare import BARE
from .family import Family, lookup
from .gpt_like import GPT_LIKE
from .llama_like import LLAMA_LIKE

FAMILIES: dict[str, Family] = {entry.model_type: entry for entry in (*LLAMA_LIKE, *GPT_LIKE, *BARE)}


def family_of(config: Any) -> Family | None:
    """Return the family of a Hugging Face config, looked up by model_type alone; None if it is not known.

    Of a family with several kinds it is the one that the config describes.
    """
    family = FAMILIES.get(getattr(config, "model_type", ""))
    for attributes, changes in family.kinds if family is not None else ():
        if all(lookup(config, name) == value for name, value in attributes.items()):
            return replace(family, **changes) if family is not None else None
    return family
