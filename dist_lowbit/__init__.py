"""Low-bit LLM inference, tensor-parallel over Intel CPU sockets and GPUs."""

__version__ = "0.1.0"
