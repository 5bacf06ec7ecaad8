"""Generate text from one prompt on all ranks at once, with the time of every token."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from transformers import TextStreamer

from dist_lowbit.core.errors import CommError, UsageError
from dist_lowbit.core.log import logger

from .session import Session


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one, or drawn by temperature, top_k and top_p."""

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None  # None: rank 0 draws one for all

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"temperature is {self.temperature}; expected more than 0 (or ask for greedy)")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; expected 0 (off) or more")


@dataclass(frozen=True)
class Generation:
    """What came out, and when: times in milliseconds."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    seed: int | None
    finish_reason: str  # "stop": the model ended; "length": the limit was reached
    ttft_ms: float
    itl_ms: float  # mean time between tokens
    tokens_per_s: float
    peak_rss_bytes: list[int] = field(default_factory=list)  # per rank, since the process began


class _Clock(TextStreamer):  # type: ignore[misc]
    """Stamps each token as it comes and passes finished text on."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.times = on_text, list[float]()

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.on_text is not None and text:
            self.on_text(text)


def encode(session: Session, prompt: str) -> torch.Tensor:
    """Return the token ids [1, S] of a prompt; an empty one is the beginning-of-text token."""
    ids: torch.Tensor = session.tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        bos = session.tokenizer.bos_token_id
        if bos is None:
            raise UsageError("the prompt is empty, and this model has no beginning-of-text token; give some text")
        ids = torch.tensor([[bos]])
    return ids.long()


def _room(session: Session, prompt_tokens: int, wanted: int) -> int:
    limit = getattr(session.model.config, "max_position_embeddings", None)
    if limit is None:
        return wanted
    if prompt_tokens >= limit:
        raise UsageError(f"the prompt has {prompt_tokens} tokens; this model holds {limit} with its answer")
    if prompt_tokens + wanted > limit:
        logger.warning("only %d new tokens fit after %d of the prompt", limit - prompt_tokens, prompt_tokens)
    return min(wanted, int(limit) - prompt_tokens)


def peak_rss() -> int:
    """Return the most memory this process has had resident, in bytes (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _agree(session: Session, tokens: list[int]) -> None:
    """Check that every rank chose the same tokens: they hold the same bits, so anything else is a defect."""
    digests = session.group.gather_object(hashlib.sha256(repr(tokens).encode()).hexdigest())
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise CommError(f"rank {rank} generated other tokens than rank 0; results are not to be trusted", rank)


def generate(
    session: Session,
    prompt: str | torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Generate at most `max_new_tokens` after a prompt (text, or ids [1, S]). All ranks must call together.

    on_text receives pieces of text as they are finished. Ranks agree on every token, or a CommError is raised.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    sampling = sampling or Sampling()
    group, model = session.group, session.model
    ids = encode(session, prompt) if isinstance(prompt, str) else prompt
    room = _room(session, ids.shape[1], max_new_tokens)
    options: dict[str, Any] = {"do_sample": not sampling.greedy, "max_new_tokens": room}
    seed = None
    if not sampling.greedy:
        drawn = secrets.randbits(31) if sampling.seed is None else sampling.seed
        seed = int(group.broadcast_object(drawn, 0))
        torch.manual_seed(seed)
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    clock = _Clock(session.tokenizer, on_text)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)  # type: ignore[operator]
    tokens = output[0, ids.shape[1] :].tolist()
    _agree(session, tokens)
    times = clock.times
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return Generation(
        text=session.tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        prompt_tokens=int(ids.shape[1]),
        seed=seed,
        finish_reason="length" if len(tokens) == room else "stop",
        ttft_ms=(times[0] - started) * 1e3,
        itl_ms=sum(gaps) / len(gaps) * 1e3 if gaps else 0.0,
        tokens_per_s=len(tokens) / (times[-1] - started),
        peak_rss_bytes=group.gather_object(peak_rss()),
    )
