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

from .sampling import Sampling, check_limit
from .session import Session


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
    """Return the token ids [1, S] of a prompt; an empty one is the beginning-of-text token.

    A prompt that leaves no room for a token in the model's context is a UsageError.
    """
    # verbose: the tokenizer would warn of a long prompt, for which there is a better word below.
    ids: torch.Tensor = session.tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] == 0:
        if prompt:
            raise UsageError(f"the prompt {prompt!r} has no tokens in this model's tokenizer; give other text")
        bos = session.tokenizer.bos_token_id
        if bos is None:
            raise UsageError("the prompt is empty, and this model has no beginning-of-text token; give some text")
        ids = torch.tensor([[bos]])
    _room(session, ids.shape[1])
    return ids.long()


def _room(session: Session, prompt_tokens: int) -> int | None:
    """Return how many tokens fit after a prompt, None for a model without a limit; none at all is a UsageError."""
    limit = getattr(session.model.config, "max_position_embeddings", None)
    if limit is None:
        return None
    if prompt_tokens >= limit:
        raise UsageError(f"the prompt has {prompt_tokens} tokens; this model holds {limit} with its answer")
    return int(limit) - prompt_tokens


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


def _ends(model: Any) -> set[int]:
    """Return the tokens that end a text."""
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else set() if found is None else {found}


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
    check_limit(max_new_tokens)
    sampling = sampling or Sampling()
    group, model = session.group, session.model
    ids = encode(session, prompt) if isinstance(prompt, str) else prompt
    room = _room(session, ids.shape[1])
    if room is not None and room < max_new_tokens:
        logger.warning("only %d new tokens fit after %d of the prompt", room, ids.shape[1])
        max_new_tokens = room
    options: dict[str, Any] = {"do_sample": not sampling.greedy, "max_new_tokens": max_new_tokens}
    seed = None
    if not sampling.greedy:
        drawn = secrets.randbits(31) if sampling.seed is None else sampling.seed
        seed = int(group.broadcast_object(drawn, 0))
        torch.manual_seed(seed)
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    clock = _Clock(session.tokenizer, on_text)
    started = time.perf_counter()
    with torch.inference_mode():
        ids = ids.to(model.device)  # type: ignore[arg-type]
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
        finish_reason="stop" if tokens[-1] in _ends(model) else "length",
        ttft_ms=(times[0] - started) * 1e3,
        itl_ms=sum(gaps) / len(gaps) * 1e3 if gaps else 0.0,
        tokens_per_s=len(tokens) / (times[-1] - started),
        peak_rss_bytes=group.gather_object(peak_rss()),
    )
