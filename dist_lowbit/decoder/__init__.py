"""Floor 4: how a model's forward is run. So far: Hugging Face's, with attention and silu of dist_lowbit.ops in it."""

from .activation import FixedSilu, use_activation
from .hf_attention import ATTENTION_NAME, register_attention, use_attention
from .idle import IdleAttention

__all__ = ["ATTENTION_NAME", "FixedSilu", "IdleAttention", "register_attention", "use_activation", "use_attention"]
