"""Our entry in Hugging Face's quantizer registry: `AutoModel...from_pretrained(saved_dir)` loads our directories.

transformers builds the model on meta and asks the quantizer to prepare it; we take every planned module out, let it
find nothing to load, and then load the checkpoint ourselves. Imported in the middle of transformers' own import (see
dist_lowbit/__init__.py), so everything that imports transformers in turn is imported when it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.log import logger

from .hf_files import QUANT_METHOD

if TYPE_CHECKING:
    from .mode import Mode

# Patterns of names that transformers neither misses nor wonders about.
_IGNORING = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")


class LowBitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The note in config.json; everything that matters stands in lowbit.json."""

    def __init__(self, low_bit: str = "sym_int4", group_size: int | None = None, **kwargs: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.low_bit = low_bit
        self.group_size = group_size


class _Held(nn.Module):
    """Stands in for a module whose weights transformers shall neither look for, nor allocate, nor initialise.

    It has the parameters, on meta, for code that ties or initialises them by name, but no entry in a state dict.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
            self._parameters[name]._is_hf_initialized = True  # type: ignore[union-attr]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Add nothing."""


class LowBitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads a directory written by save_low_bit or convert."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from .build import set_submodule
        from .target import linears

        self._dtype = kwargs.get("dtype")
        # Every Linear and embedding gives way, so that transformers allocates and initialises none of them.
        self._places = {name: model.get_submodule(name) for name in linears(model)}
        self._places |= {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
        for name, module in self._places.items():
            set_submodule(model, name, _Held(module))
        self._ignored = {name: getattr(model, name, None) for name in _IGNORING}
        for name in _IGNORING:
            setattr(model, name, {r".*"})
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from .build import set_submodule
        from .load import load_low_bit
        from .mode import mode_here, switched
        from .paths import require_checkpoint

        for name, module in self._places.items():
            set_submodule(model, name, module)
        for name, patterns in self._ignored.items():
            setattr(model, name, patterns)
        config: Any = model.config
        path, mode = require_checkpoint(config._name_or_path), mode_here(self._dtype)
        return load_low_bit(model, path, mode=switched(mode, _takes_decoder(model, mode)))

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what this loader does not do: device maps beyond the CPU."""
        device_map = kwargs.get("device_map")
        if device_map is not None and set(device_map.values() if isinstance(device_map, dict) else [device_map]) - {
            "cpu",
            "auto",
        }:
            raise UsageError(
                f"device_map is {device_map}; transformers itself loads a low-bit checkpoint on the cpu; "
                "dist_lowbit.transformers takes device="
            )

    def is_serializable(self) -> bool:
        """Say that save_pretrained does not write this model; save_low_bit does."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Say that low-bit models are for inference."""
        return False


def _takes_decoder(model: nn.Module, mode: Mode) -> bool:
    """Return whether the decoder may take the place of the attention that transformers was asked for.

    What the caller chose beside transformers' own default for the class stays as it is, and a line says so; beside a
    decoder that the settings name it is a UsageError.
    """
    from dist_lowbit.decoder import ATTENTION_NAME

    from .target import family_for

    config: Any = model.config
    asked = config._attn_implementation
    # Where a class has no sdpa, eager is what transformers takes by itself, and does not tell from a caller's wish.
    usual = (None, ATTENTION_NAME, "sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    if asked in usual or not mode.optimize_llm or family_for(model) is None:
        return True  # nothing else was asked for, or no decoder would run anyway
    if mode.decoder != "auto":
        raise UsageError(
            f"attn_implementation is {asked!r}, and DIST_LOWBIT_DECODER is {mode.decoder!r}, whose attention is its "
            "own; leave one of the two out"
        )
    logger.warning(
        "Hugging Face's forward runs this model, slower than the decoder: attn_implementation is %r; leave it out",
        asked,
    )
    return False


def register() -> None:
    """Enter our quantizer in Hugging Face's registry, once."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(LowBitConfig)
        register_quantizer(QUANT_METHOD)(LowBitQuantizer)
