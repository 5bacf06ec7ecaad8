"""The module that stands in for a Hugging Face base model and runs the fused decoder.

Only the base model is swapped: the head, the loss and `generate()` stay Hugging Face's. The swapped module keeps the
old one's children under their names, so a checkpoint looks the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.log import logger

from .agree import check_same_input
from .cache import PagedBatch, adopt, batch_of, cache_why_not, release
from .hf_attention import ATTENTION_NAME
from .program import Program
from .step import Executor, Step

# What only Hugging Face's forward returns.
_ASKED = ("output_attentions", "output_hidden_states", "output_router_logits")
# Arguments of base models that ask for nothing, or for what is done anyway.
_HARMLESS = frozenset(
    {"return_dict", "use_cache", "cache_position", "logits_to_keep", "num_items_in_batch", "tokenizer"}
)


@dataclass
class FusedOutput(BaseModelOutputWithPast):  # type: ignore[misc]
    """What base models return, with the fields that some heads look at besides."""

    router_logits: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class FusedBackbone(nn.Module):
    """Compute the last hidden states of a model with one executor call per step.

    Takes what Hugging Face's base models take; all ranks must call together with the same arguments. What the decoder
    does not compute (hidden states of all layers, attention weights, masks of four dimensions, other inputs) is left to
    Hugging Face's forward over the same weights, and said once.
    """

    def __init__(
        self,
        original: nn.Module,
        executor: Executor,
        kv_cache_dtype: str,
        no_fallback: str | None = None,
    ) -> None:
        """Run the program of `original`, which an executor holds. no_fallback: why Hugging Face's own forward cannot
        run here, None where it can.
        """
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.detach(), requires_grad=False))
        for name, buffer in original.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
        self._original = (original,)  # in a tuple, which nn.Module does not look into: no second set of names
        self.config: Any = original.config
        self.program, self.executor, self.kv_cache_dtype = executor.program, executor, kv_cache_dtype
        self._no_fallback = no_fallback
        self._told: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedBackbone:
        """Copy modules and program, which share their tensors, and let an executor of the same kind run the copy."""
        original, program = copy.deepcopy((self._original[0], self.program), memo)
        executor = type(self.executor)(program, str(self.executor.device))  # type: ignore[call-arg]
        return FusedBackbone(original, executor, self.kv_cache_dtype, self._no_fallback)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse torch.save and pickle: what an executor holds lives in this process alone."""
        raise UsageError("a low-bit model on the fused decoder is not pickled; call save_low_bit(directory)")

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that Hugging Face's code reads off a base model."""
        return self._original[0].dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.executor.device

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FusedBackbone:
        """Refuse to be moved: prepacked weights and a cache that lie elsewhere than the executor reads them."""
        probe = fn(torch.empty(0, device=self.device))
        device = probe.device
        if device.type == "cpu" and probe.is_shared():  # type: ignore[no-untyped-call]
            raise UsageError(
                "this model cannot be moved to shared memory: its decoder reads the weights where they lie; load it in "
                "each process, or with optimize_llm=False"
            )
        if device != self.device:
            raise UsageError(
                f"this model runs on {self.device} and cannot be moved to {device}; name the device where it is made, "
                "as device= of from_pretrained, optimize_model or load_low_bit"
            )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.program.embed

    # torch.compile breaks its graph here: a step is one call already, and counting tokens is no work for a graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **rest: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states, fp32 [B, T, hidden] (zeros at padding), and the cache."""
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        _check_ids(input_ids)
        _check_kind("attention_mask", attention_mask, (torch.Tensor, dict))
        _check_embeds(inputs_embeds, self.program.lm_head.in_features)
        given = input_ids if inputs_embeds is None else inputs_embeds
        _check_positions(position_ids, given)
        check_same_input(self.program.embed.group, given, attention_mask)
        why = self._why_not(attention_mask, position_ids, rest) or cache_why_not(past_key_values)
        if why is not None:
            return self._hugging_face(why, inputs | rest)
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise UsageError("give the model either input_ids or inputs_embeds")
        keep = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        cache = past_key_values if past_key_values is not None else DynamicCache()
        kept, mask = _masks(attention_mask, given.shape[0], given.shape[1], cache.get_seq_length())
        batch = batch_of(cache) or adopt(cache, self.program, self.kv_cache_dtype, kept, self.device)
        _check_batch(batch, kept)
        hidden = self._run(batch, input_ids, inputs_embeds, _positions(position_ids, batch, mask, self.program), mask)
        return FusedOutput(
            last_hidden_state=hidden, past_key_values=cache if keep or past_key_values is not None else None
        )

    def _run(
        self,
        batch: PagedBatch,
        ids: torch.Tensor | None,
        embeds: torch.Tensor | None,
        positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Run the real tokens of a padded input [B, T], and put their hidden states back in their places."""
        rows, width = mask.shape
        counts = mask.sum(dim=1).tolist()
        present = [row for row, count in enumerate(counts) if count]
        batch.append(mask)
        hidden = torch.zeros(rows, width, self.program.lm_head.in_features, dtype=torch.float32, device=self.device)
        if not present:
            return hidden
        begins = torch.tensor([0, *(counts[row] for row in present)], device="cpu").cumsum(0)
        lengths = [batch.blocks.lengths[row] for row in present]
        step = Step(
            ids=None if ids is None else _narrow(ids.cpu()[mask]),
            embeds=None if embeds is None else embeds.cpu()[mask].float(),
            positions=_narrow(positions[mask]),
            row_begin=begins.to(torch.int32),
            lengths=torch.tensor(lengths, dtype=torch.int32, device="cpu"),
            table=batch.blocks.table(present),
            wanted=torch.arange(int(begins[-1]), device="cpu"),
            store=batch.blocks.store,
        )
        try:
            hidden[mask.to(self.device)] = self.executor.step(step, logits=False)
        except BaseException:
            batch.crop(width)  # what the step did not compute is not in the cache
            raise
        return hidden

    def _why_not(self, mask: torch.Tensor | None, positions: torch.Tensor | None, rest: dict[str, Any]) -> str | None:
        """Return what a call asks for that the decoder does not compute."""
        for name in _ASKED:
            asked = rest.get(name)
            if asked or (asked is None and getattr(self.config, name, False)):
                return name
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            return "a mask that is not of [batch, tokens]"
        if positions is not None and positions.dim() != 2:
            return "positions of more than one kind"
        ignored = _HARMLESS | set(_ASKED)
        odd = [name for name, value in rest.items() if name not in ignored and value is not None and value is not False]
        return odd[0] if odd else None

    def _hugging_face(self, why: str, inputs: dict[str, Any]) -> BaseModelOutputWithPast:
        if self._no_fallback is not None:
            raise UsageError(f"this call asks for {why}, which needs Hugging Face's forward: {self._no_fallback}")
        weights = why == "output_attentions" and getattr(self.config, "_attn_implementation", None) == ATTENTION_NAME
        if weights and self.program.embed.group.size > 1:
            raise UsageError("this call asks for output_attentions; a rank has a part of the heads: run on one rank")
        if why not in self._told:
            self._told.add(why)
            logger.warning("this call asks for %s: Hugging Face's forward computes it, slower than the decoder", why)
        cache = inputs.get("past_key_values")
        batch = batch_of(cache) if cache is not None else None
        if batch is not None:
            release(cache, batch, self.dtype)
        with self._attention_that_returns(weights):
            result: BaseModelOutputWithPast = self._original[0](**{k: v for k, v in inputs.items() if v is not None})
        if isinstance(result.last_hidden_state, torch.Tensor):  # so that the head's logits are fp32 here too
            result.last_hidden_state = result.last_hidden_state.float()
        return result

    @contextmanager
    def _attention_that_returns(self, weights: bool) -> Iterator[None]:
        """Let Hugging Face's plain attention run where its weights are asked for: ours never forms them."""
        if not weights:
            yield
            return
        self.config._attn_implementation = "eager"
        try:
            yield
        finally:
            self.config._attn_implementation = ATTENTION_NAME


def _narrow(numbers: torch.Tensor) -> torch.Tensor:
    """Return int32; what does not fit becomes what the decoder refuses, not another token."""
    return numbers.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)


def _check_kind(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if value is not None and not isinstance(value, kinds):
        raise UsageError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")


def _check_embeds(embeds: torch.Tensor | None, width: int) -> None:
    _check_kind("inputs_embeds", embeds, (torch.Tensor,))
    if embeds is not None and (embeds.dim() != 3 or embeds.shape[2] != width):
        raise UsageError(f"inputs_embeds have shape {list(embeds.shape)}; expected [batch, tokens, {width}]")


def _check_positions(positions: torch.Tensor | None, given: torch.Tensor | None) -> None:
    """Refuse positions that are not integers, or not one for each token; those of several kinds are not looked at."""
    _check_kind("position_ids", positions, (torch.Tensor,))
    if positions is None or given is None or positions.dim() > 2:
        return
    rows, width = given.shape[:2]
    odd = positions.is_floating_point() or positions.dtype == torch.bool
    if odd or positions.shape not in ((rows, width), (1, width)):
        raise UsageError(
            f"position_ids are {positions.dtype} of shape {list(positions.shape)}; expected integers {[rows, width]}: "
            "one for each token of the input, none for the tokens of the cache"
        )


def _check_ids(ids: torch.Tensor | None) -> None:
    _check_kind("input_ids", ids, (torch.Tensor,))
    if ids is not None and (ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool):
        raise UsageError(f"input_ids are {ids.dtype} of shape {list(ids.shape)}; expected integers [batch, tokens]")


def _masks(given: torch.Tensor | None, rows: int, width: int, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which positions are real: of the cache, bool [B, seen], and of the input, bool [B, T]; on the cpu."""
    if given is None:
        real = torch.ones(rows, seen + width, dtype=torch.bool, device="cpu")
        return real[:, :seen], real[:, seen:]
    if given.shape != (rows, seen + width):
        raise UsageError(
            f"attention_mask has shape {list(given.shape)}; expected {[rows, seen + width]}: the tokens of the "
            "cache and of the input"
        )
    real = given.cpu().bool()
    return real[:, :seen], real[:, seen:]


def _check_batch(batch: PagedBatch, kept: torch.Tensor) -> None:
    if kept.shape[0] != batch.rows:
        raise UsageError(f"the input has {kept.shape[0]} rows and the cache {batch.rows}; they must be the same")
    if not torch.equal(kept, batch.kept):
        raise UsageError(
            "attention_mask hides tokens of the cache that were visible before, or the other way round; "
            "start with an empty cache"
        )


def _positions(given: torch.Tensor | None, batch: PagedBatch, mask: torch.Tensor, program: Program) -> torch.Tensor:
    """Return the position of every input token, int64 [B, T], on the cpu: as given, or as Hugging Face counts them."""
    if given is not None:
        return given.cpu().expand(mask.shape)
    if program.mask_positions:
        before = batch.kept.sum(dim=1, keepdim=True)
        return (before + mask.cumsum(dim=1) - 1).clamp(min=0)
    return torch.arange(batch.seen, batch.seen + mask.shape[1], device="cpu").expand(mask.shape)
