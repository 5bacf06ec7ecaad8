"""Floor 4: how a model's forward is run. So far: Hugging Face's, with the attention of dist_lowbit.ops in it."""

from .hf_attention import ATTENTION_NAME, register_attention, use_attention
from .idle import IdleAttention

__all__ = ["ATTENTION_NAME", "IdleAttention", "register_attention", "use_attention"]
