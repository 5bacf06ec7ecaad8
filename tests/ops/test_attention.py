"""Attention: the definition near exact softmax, C++ equal to the definition, and what a row depends on."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any

import pytest
import torch
from native_kernels import each_isa, library, threads

from dist_lowbit.core.errors import UsageError
from dist_lowbit.ops.attention import _KV_TYPES, _Args, _strides, attention, attention_error, attention_reference

MAPS = {
    "mha": [0, 1, 2, 3],
    "gqa": [0, 0, 1, 1, 2, 2],
    "mqa": [0, 0, 0],
    "local": [1, 1, 2, 2, 2],  # a rank's heads: shares of unequal size, the first KV head unused
    "irregular": [2, 0, 0, 1, 0, 2],
    "wide": [0] * 41,  # more heads than a block has rows
}


def _index(name: str) -> torch.Tensor:
    return torch.tensor(MAPS[name], dtype=torch.int32)


def _qkv(
    batch: int,
    index: torch.Tensor,
    rows: int,
    slots: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    value_dim: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kv_heads = int(index.max()) + 1
    q = torch.randn(batch, len(index), rows, dim)
    k = torch.randn(batch, kv_heads, slots, dim).to(dtype)
    return q, k, torch.randn(batch, kv_heads, slots, value_dim or dim).to(dtype)


def _options(kind: str, batch: int, heads: int, rows: int, slots: int) -> dict[str, Any]:
    causal = slots - rows
    return {
        "all": {},
        "causal": {"causal_offset": causal},
        "window": {"causal_offset": causal, "window": max(1, slots // 3)},
        "softcap": {"causal_offset": causal, "softcap": 3.0},
        "alibi": {"causal_offset": causal, "alibi": torch.rand(heads)},
        "bool": {"mask": torch.rand(batch, 1, rows, slots) < 0.6},
        "added": {"mask": torch.randn(1, heads, rows, slots).masked_fill_(torch.rand(rows, slots) < 0.3, -torch.inf)},
        "start": {"causal_offset": causal, "kv_start": torch.tensor([300, -5], dtype=torch.int32)[:batch]},
        "both": {"mask": torch.rand(1, 1, rows, slots) < 0.9, "causal_offset": causal, "window": 7, "softcap": 20.0},
    }[kind]


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, scale: float, **options: Any
) -> torch.Tensor:
    given = {"mask": None, "causal_offset": -1, "window": 0, "softcap": 0.0} | options
    return attention_reference(q, k, v, index, scale=scale, **given)


def _exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, scale: float, **options: Any
) -> tuple[torch.Tensor, float]:
    """Return attention in fp64 and the bound of the fp32 one."""
    rows, slots = q.shape[2], k.shape[2]
    q, k, v = q.double(), k.double()[:, index.long()], v.double()[:, index.long()]
    s, size = q @ k.transpose(2, 3) * scale, float((q.abs() @ k.abs().transpose(2, 3)).max()) * scale
    cap = options.get("softcap", 0.0)
    s = cap * torch.tanh(s / cap) if cap else s
    offset = options.get("causal_offset", -1)
    distance = torch.arange(slots)[None, :] - torch.arange(rows)[:, None] - max(offset, 0)
    see = torch.ones(rows, slots, dtype=torch.bool)
    if offset >= 0:
        see = (distance <= 0) & ((distance > -options["window"]) if options.get("window") else True)
    if options.get("alibi") is not None:
        add = options["alibi"].double()[:, None, None] * distance
        s, size = s + add, size + float(add.abs().max())
    mask = options.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        finite = mask.double().masked_fill(mask == -torch.inf, 0)
        s, size, mask = s + finite, size + float(finite.abs().max()), mask != -torch.inf
    see = (see if mask is None else see & mask).expand(s.shape)
    s = s.masked_fill(~see, -torch.inf)
    spread = (s.amax(-1, keepdim=True) - s)[see]
    bound = attention_error(
        slots, q.shape[-1], size, float(spread.max()) if len(spread) else 0.0, float(v.abs().max()), cap
    )
    out = torch.nan_to_num(torch.softmax(s, -1)) @ v
    return out.transpose(1, 2), bound


KINDS = ["all", "causal", "window", "softcap", "alibi", "bool", "added", "start", "both"]
SIZES = [(1, 1, 16), (1, 600, 64), (3, 5, 20), (7, 255, 32), (2, 256, 80), (5, 257, 128), (17, 300, 32)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "slots", "dim"), SIZES)
def test_the_definition_is_attention(kind: str, rows: int, slots: int, dim: int) -> None:
    torch.manual_seed(0)
    index = _index("irregular")
    q, k, v = _qkv(2, index, rows, slots, dim)
    options = _options(kind, 2, len(index), rows, slots)
    exact, bound = _exact(q, k, v, index, dim**-0.5, **options)
    assert float((_reference(q, k, v, index, dim**-0.5, **options) - exact).abs().max()) <= bound


@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=[] if d == torch.float32 else pytest.mark.slow, id=str(d)) for d in _KV_TYPES]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "slots", "dim"), SIZES)
def test_cpp_has_the_bits_of_the_definition(kind: str, rows: int, slots: int, dim: int, dtype: torch.dtype) -> None:
    library()
    torch.manual_seed(1)
    index = _index(list(MAPS)[(rows + slots + dim) % len(MAPS)])
    q, k, v = _qkv(2, index, rows, slots, dim, dtype, dim + 4)
    options = _options(kind, 2, len(index), rows, slots)
    expected = _reference(q, k, v, index, dim**-0.5, **options)
    with each_isa() as isas:
        for isa in isas:
            library().dlb_isa_select(isa)
            assert torch.equal(attention(q, k, v, index, scale=dim**-0.5, **options), expected)


@pytest.mark.parametrize("name", list(MAPS))
def test_any_map_of_heads(name: str) -> None:
    library()
    torch.manual_seed(2)
    q, k, v = _qkv(1, _index(name), 3, 270, 32)
    got = attention(q, k, v, _index(name), scale=0.2, causal_offset=267)
    assert torch.equal(got, _reference(q, k, v, _index(name), 0.2, causal_offset=267))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_queries_are_widened_and_the_result_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    q, k, v = _qkv(1, _index("gqa"), 4, 40, 32, dtype)
    out = attention(q.to(dtype), k, v, _index("gqa"), scale=0.2)
    assert out.dtype == dtype
    assert torch.equal(out, attention(q.to(dtype).float(), k.float(), v.float(), _index("gqa"), scale=0.2).to(dtype))


class TestARowDependsOnNothingElse:
    """Each on whatever path is there: C++, or the definition where there are no compiled kernels."""

    index = _index("local")
    scale = 0.17

    @pytest.fixture(autouse=True)
    def _inputs(self) -> None:
        torch.manual_seed(4)
        self.q, self.k, self.v = _qkv(2, self.index, 300, 300, 32)

    def _run(self, q: torch.Tensor, slots: int, batch: slice = slice(None), **options: Any) -> torch.Tensor:
        k, v = self.k[batch, :, :slots], self.v[batch, :, :slots]
        return attention(q, k, v, self.index, scale=self.scale, causal_offset=slots - q.shape[2], **options)

    @pytest.mark.parametrize("window", [0, 33])
    def test_not_on_the_chunking_of_a_prefill(self, window: int) -> None:
        whole = self._run(self.q, 300, window=window)
        for cuts in ([0, 300], [0, 1, 7, 255, 256, 299, 300], [0, 100, 257, 300]):
            parts = [self._run(self.q[:, :, a:b], b, window=window) for a, b in pairwise(cuts)]
            assert torch.equal(torch.cat(parts, 1), whole)

    def test_not_on_the_batch(self) -> None:
        whole = self._run(self.q, 300)
        for b in range(2):
            assert torch.equal(self._run(self.q[b : b + 1], 300, slice(b, b + 1)), whole[b : b + 1])

    def test_not_on_the_heads_at_hand(self) -> None:
        whole = self._run(self.q, 300)
        for heads in ([0], [1, 4], [2, 3, 4]):
            index = self.index[heads] - int(self.index[heads].min())
            k, v = self.k[:, int(self.index[heads].min()) :], self.v[:, int(self.index[heads].min()) :]
            part = attention(self.q[:, heads], k, v, index, scale=self.scale, causal_offset=0)
            assert torch.equal(part, whole[:, :, heads])

    def test_not_on_padding_to_the_left(self) -> None:
        alone = self._run(self.q[:1], 300, slice(0, 1))
        pad = 41
        q, k, v = (torch.nn.functional.pad(x[:1], (0, 0, pad, 0), value=9.0) for x in (self.q, self.k, self.v))
        mask = (torch.arange(300 + pad) >= pad).expand(1, 1, 300 + pad, -1)
        start = torch.tensor([-pad], dtype=torch.int32)
        got = attention(q, k, v, self.index, scale=self.scale, mask=mask, causal_offset=0, kv_start=start)
        assert torch.equal(got[:, pad:], alone)
        assert not got[:, :pad].any()

    def test_not_on_slots_dropped_by_a_window(self) -> None:
        whole = self._run(self.q, 300, window=30)
        k, v = self.k[:, :, 262:], self.v[:, :, 262:]
        start = torch.full((2,), 262, dtype=torch.int32)
        last = attention(
            self.q[:, :, -1:], k, v, self.index, scale=self.scale, causal_offset=37, window=30, kv_start=start
        )
        assert torch.equal(last, whole[:, -1:])

    def test_not_on_a_mask_that_says_the_same(self) -> None:
        see = torch.ones(300, 300, dtype=torch.bool).tril()
        for mask in (see, torch.zeros(300, 300).masked_fill_(~see, -torch.inf)):
            got = attention(self.q, self.k, self.v, self.index, scale=self.scale, mask=mask[None, None])
            assert torch.equal(got, self._run(self.q, 300))

    def test_not_on_the_strides(self) -> None:
        whole = self._run(self.q, 300)
        self.q = self.q.transpose(1, 2).contiguous().transpose(1, 2)
        self.k = torch.nn.functional.pad(self.k, (3, 5))[..., 3:-5]
        self.v = self.v.transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(self._run(self.q, 300), whole)

    def test_not_on_threads(self) -> None:
        library()
        for rows in (300, 1):  # one row: chunks are shared out among the threads
            q, results = self.q[:, :, -rows:], []
            for count in (1, 2, 3, 8):
                with threads(count):
                    results.append(self._run(q, 300))
            assert all(torch.equal(r, results[0]) for r in results)


def test_what_is_not_seen_may_hold_anything() -> None:
    torch.manual_seed(5)
    q, k, v = _qkv(1, _index("mqa"), 2, 40, 32)
    mask = torch.rand(1, 1, 2, 40) < 0.5
    expected = attention(q, k, v, _index("mqa"), scale=0.2, mask=mask)
    dead = ~mask.any(2)[0, 0]
    for garbage in (torch.nan, torch.inf, 1e30):
        k[:, :, dead], v[:, :, dead] = garbage, garbage
        assert torch.equal(attention(q, k, v, _index("mqa"), scale=0.2, mask=mask), expected)


def test_a_row_that_sees_nothing_is_zero_and_nan_stays_nan() -> None:
    q, k, v = _qkv(1, _index("mqa"), 3, 20, 16)
    mask = torch.ones(1, 1, 3, 20, dtype=torch.bool)
    mask[0, 0, 1] = False
    q[0, 1, 2] = torch.nan
    out = attention(q, k, v, _index("mqa"), scale=1.0, mask=mask)
    assert not out[0, 1].any()
    assert out[0, 2, 1].isnan().all()
    assert not out[0, :2].isnan().any()
    assert attention(q, k[:, :, :0], v[:, :, :0], _index("mqa"), scale=1.0).eq(0).all()


def test_scores_of_any_size_neither_overflow_nor_vanish() -> None:
    q, k, v = _qkv(1, _index("mha"), 4, 300, 64)
    out = attention(q * 1e4, k * 1e4, v, _index("mha"), scale=1.0)
    best = ((q * 1e4).double() @ (k * 1e4).double().transpose(2, 3)).argmax(-1)
    assert torch.equal(out.transpose(1, 2), torch.gather(v, 2, best[..., None].expand(-1, -1, -1, 64)))


def _packed_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, **more: Any) -> torch.Tensor:
    """Call the C function as a decoder does: packed rows [rows, heads, dim], blocks [block, slot, kv head, dim]."""
    out = torch.empty(q.shape[0], q.shape[1], v.shape[3])
    args = _Args(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), kv_index=index.data_ptr(),
        q_stride=_strides((0, q.stride(1), q.stride(0))), out_stride=_strides((0, out.stride(1), out.stride(0))),
        k_stride=_strides((k.stride(0), k.stride(2), k.stride(1))),
        v_stride=_strides((v.stride(0), v.stride(2), v.stride(1))),
        heads=q.shape[1], kv_heads=k.shape[2], head_dim=q.shape[2], value_dim=v.shape[3], scale=0.2,
        block_size=k.shape[1], causal_offset=-2, kv_type=_KV_TYPES[k.dtype], **more,
    )  # fmt: skip
    assert library().dlb_attention(ctypes.byref(args)) == 0
    return out


@pytest.mark.parametrize("block", [16, 24, 256])
@pytest.mark.parametrize("dtype", list(_KV_TYPES), ids=str)
def test_packed_sequences_over_blocks_of_cache_equal_each_alone(block: int, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    index, slots, rows = _index("gqa"), [300, 5, 261], [1, 5, 20]
    most = -(-max(slots) // block)
    table = torch.randperm(3 * most, dtype=torch.int32).view(3, most)
    k, v = (torch.randn(3 * most, block, 3, 32).to(dtype) for _ in range(2))
    q = torch.randn(sum(rows), len(index), 32)
    begin, used = torch.tensor([0, 1, 6, 26], dtype=torch.int32), torch.tensor(slots, dtype=torch.int32)
    got = _packed_call(
        q, k, v, index, batch=3, block_table=table.data_ptr(), block_table_stride=most, slot_count=used.data_ptr(),
        row_begin=begin.data_ptr(), slots=max(slots),
    )  # fmt: skip
    for b in range(3):
        own_k, own_v = (x[table[b].long()].flatten(0, 1)[: slots[b]].transpose(0, 1)[None] for x in (k, v))
        own_q = q[begin[b] : begin[b + 1]].transpose(0, 1)[None]
        alone = attention(own_q, own_k, own_v, index, scale=0.2, causal_offset=slots[b] - rows[b])
        assert torch.equal(got[begin[b] : begin[b + 1]], alone[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 2, 16)}, "3, 4, 4 axes"),
        ({"k": torch.zeros(1, 2, 5, 32)}, "do not fit together"),
        ({"kv_index": torch.zeros(3, dtype=torch.int32)}, "one entry per query head"),
        ({"mask": torch.zeros(1, 1, 3, 4)}, "the mask has shape"),
        ({"window": 4}, "without a causal_offset"),
        ({"kv_start": torch.zeros(2)}, "kv_start has shape"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given = {
        "q": torch.zeros(1, 2, 3, 16), "k": torch.zeros(1, 2, 5, 16), "v": torch.zeros(1, 2, 5, 16),
        "kv_index": torch.zeros(2, dtype=torch.int32), "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(UsageError, match=message):
        attention(**(given | change))  # type: ignore[arg-type]


def test_a_kv_head_that_is_not_there_is_refused() -> None:
    library()
    with pytest.raises(UsageError, match="KV head"):
        attention(*_qkv(1, _index("mqa"), 1, 4, 16), torch.tensor([0, 1, 0], dtype=torch.int32), scale=1.0)


def test_the_op_can_be_traced_exported_and_has_no_gradient() -> None:
    q, k, v = _qkv(1, _index("gqa"), 3, 9, 16)

    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, _index("gqa"), scale=0.25, causal_offset=6)

    expected = Module()(q, k, v)
    other = (q + 1, k, v)
    assert torch.equal(torch.jit.trace(Module(), (q, k, v))(*other), Module()(*other))
    assert torch.equal(torch.export.export(Module(), (q, k, v)).module()(q, k, v), expected)
    with pytest.raises(UsageError, match="no gradient"):
        Module()(q.requires_grad_(), k, v).sum().backward()
