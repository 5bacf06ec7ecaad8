"""The key/value cache of the fused decoder, as transformers' caches look: layers that speak CacheLayerMixin.

A `transformers.Cache` that Hugging Face or a user made is *adopted*: its layers become `PagedLayer`s of one
`PagedBatch`, in place, so whoever holds the cache object (generate, beam search, a user's loop) goes on with it.
Padding is not stored: a batch row keeps the real tokens only, and the padded view is what transformers is told of.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from dist_lowbit.core.errors import UsageError

from .blocks import BlockTables
from .program import Program


class PagedBatch:
    """The cache of one batch: block tables per row, and which of the padded positions are real.

    kept: bool [B, seen], True where a padded position holds a token of the row; on the cpu, as all that only counts.
    """

    def __init__(self, program: Program, dtype: str, device: str | torch.device = "cpu") -> None:
        self.blocks = BlockTables(program, dtype, device)
        self.kept = torch.zeros(0, 0, dtype=torch.bool, device="cpu")

    @property
    def seen(self) -> int:
        """Return the padded length."""
        return self.kept.shape[1]

    @property
    def rows(self) -> int:
        """Return the number of batch rows."""
        return self.kept.shape[0]

    def start(self, rows: int) -> None:
        """Begin anew with empty rows."""
        self.blocks.start(rows)
        self.kept = torch.zeros(rows, 0, dtype=torch.bool, device="cpu")

    def append(self, kept: torch.Tensor) -> None:
        """Make room for new padded positions, bool [B, T]."""
        counts = kept.sum(dim=1).tolist()
        self.blocks.make_room(counts)
        for row, count in enumerate(counts):
            self.blocks.extend(row, count)
        self.kept = torch.cat([self.kept, kept], dim=1)

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` padded positions."""
        self.kept = self.kept[:, : max(0, self.seen - tokens)]
        for row, count in enumerate(self.kept.sum(dim=1).tolist()):
            self.blocks.shorten(row, count)

    def choose(self, rows: list[int]) -> None:
        """Go on with these rows, in this order."""
        self.blocks.choose(rows)
        self.kept = self.kept[rows]

    def padded(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a layer as Hugging Face holds them: [B, kv heads, seen, D], zeros at padding."""
        store = self.blocks.store
        keys, values = store.keys[layer], store.values[layer]
        shape = (self.rows, keys.shape[1], self.seen)
        out = tuple(torch.zeros(*shape, kind.shape[3], dtype=dtype, device=kind.device) for kind in (keys, values))
        scales = (store.key_scales, store.value_scales)
        for row in range(self.rows):
            block, slot = self.blocks.slots(row)
            at = self.kept[row].nonzero()[:, 0]
            for target, source, scale in zip(out, (keys, values), scales, strict=True):
                numbers = source[block, :, slot].float()
                if scale:
                    numbers = numbers * scale[layer][block, :, slot].float()[..., None]
                target[row][:, at] = numbers.to(dtype).transpose(0, 1)
        return out[0], out[1]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store a layer's padded keys and values [B, kv heads, seen, D], as Hugging Face computed them."""
        store = self.blocks.store
        if store.key_scales:
            raise UsageError(
                "an int8 cache cannot take over keys that another forward computed; start with an empty one"
            )
        for row in range(self.rows):
            block, slot = self.blocks.slots(row)
            at = self.kept[row].nonzero()[:, 0]
            for target, source in ((store.keys[layer], keys), (store.values[layer], values)):
                target[block, :, slot] = source[row][:, at].transpose(0, 1).to(target)


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer's view of a PagedBatch. What concerns the whole batch is done once, by layer 0."""

    is_sliding = False
    is_croppable = True

    def __init__(self, batch: PagedBatch, index: int) -> None:
        super().__init__()
        self.batch, self.index = batch, index
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        """Return the number of batch rows."""
        return self.batch.rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the decoder made the layer ready."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: only the decoder's own step writes here."""
        raise UsageError(
            "this cache belongs to dist_lowbit's decoder, and another attention tried to write into it; "
            "pass it to the model that filled it"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the mask of the next forward."""
        return self.batch.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the padded length."""
        return self.batch.seen

    def get_max_length(self) -> int:
        """Return -1: it grows."""
        return -1

    def offload(self) -> None:
        """Do nothing: the cache stays where the weights are."""

    def prefetch(self) -> None:
        """Do nothing: the cache stays where the weights are."""

    def reset(self) -> None:
        """Forget all tokens."""
        if self.index == 0:
            self.batch.start(self.batch.rows)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on with these rows: block tables move, no key is copied."""
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove padded positions."""
        if tokens_to_remove > 0:
            raise UsageError(f"crop takes minus the number of tokens to remove, and {tokens_to_remove} is positive")
        if self.index == 0 and tokens_to_remove:
            self.batch.crop(-tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, sharing its blocks."""
        if self.index == 0:
            self.batch.choose([row for row in range(self.batch.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Go on with these rows (a mask or indices)."""
        if self.index == 0:
            chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            self.batch.choose(chosen.tolist())


def batch_of(cache: Cache) -> PagedBatch | None:
    """Return the batch behind a cache that was adopted, None for any other."""
    first = cache.layers[0] if cache.layers else None
    return first.batch if isinstance(first, PagedLayer) else None


def cache_why_not(cache: Cache | None) -> str | None:
    """Return what a cache is that the decoder cannot go on from, as part of a sentence; None where it can."""
    if cache is None:
        return None
    if not isinstance(cache, Cache):
        raise UsageError(f"past_key_values is a {type(cache).__name__}; expected a transformers.Cache")
    odd = [type(layer).__name__ for layer in cache.layers if not isinstance(layer, (DynamicLayer, PagedLayer))]
    return f"a cache of {odd[0]}" if odd else None


def _check_held(cache: Cache, batch: PagedBatch, held: int) -> None:
    """Refuse keys and values of other rows than the input's, or of another model: they would be spread or cut."""
    store = batch.blocks.store
    if len(cache.layers) != len(store.keys):
        raise UsageError(
            f"the cache has {len(cache.layers)} layers and the model {len(store.keys)}; it is another model's"
        )
    for index, layer in enumerate(cache.layers):
        for what, found, own in (("keys", layer.keys, store.keys), ("values", layer.values, store.values)):
            heads, size = own[index].shape[1], own[index].shape[3]
            expected = [batch.rows, heads, held, size]
            if heads and list(found.shape) != expected:
                raise UsageError(
                    f"layer {index} of the cache holds {what} of shape {list(found.shape)}; expected {expected}: the "
                    "input's rows, this model's heads, the tokens seen and the head size"
                )


def adopt(
    cache: Cache, program: Program, dtype: str, kept: torch.Tensor, device: str | torch.device = "cpu"
) -> PagedBatch:
    """Make a cache the decoder's own, in place; the tokens that it holds come along.

    kept: bool [B, tokens in the cache], which of them are no padding. `cache_why_not` has no objection to the cache.
    """
    batch = PagedBatch(program, dtype, device)
    batch.start(kept.shape[0])
    held = cache.get_seq_length()
    if held:
        if any(layer.keys.shape[-2] != held for layer in cache.layers):
            raise UsageError(
                "the decoder cannot take over a sliding cache that has dropped tokens; start with an empty one"
            )
        _check_held(cache, batch, held)
        batch.append(kept)
        for index, layer in enumerate(cache.layers):
            batch.write(index, layer.keys, layer.values)
    cache.layers[:] = [PagedLayer(batch, index) for index in range(len(program.layers))]
    return batch


def release(cache: Cache, batch: PagedBatch, dtype: torch.dtype) -> None:
    """Turn an adopted cache back into one that Hugging Face's forward reads, in place."""
    layers = []
    for index in range(len(cache.layers)):
        layer = DynamicLayer()
        if batch.seen:
            layer.update(*batch.padded(index, dtype))
        layers.append(layer)
    cache.layers[:] = layers
