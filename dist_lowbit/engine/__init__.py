"""Floor 6: run a model: load it on this rank, generate, time each token."""

from .generate import Generation, Sampling, generate
from .session import Session, open_session

__all__ = ["Generation", "Sampling", "Session", "generate", "open_session"]
