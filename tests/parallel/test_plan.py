"""Plans are arithmetic: invariants over many shapes and degrees, and every refusal."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lowbit.core.errors import PlanError
from dist_lowbit.models import FAMILIES, ModelDims
from dist_lowbit.ops.spec import SEGMENTS
from dist_lowbit.parallel import make_plan, owned_ranges, segment_cuts
from dist_lowbit.parallel.plan import VOCAB_UNIT, match_role, query_unit
from dist_lowbit.parallel.units import count, rank_ranges

SIZES = st.integers(1, 3000)
UNITS = st.sampled_from([1, 32, 64, 96, 128, 320])
DEGREES = st.integers(1, 17)


@given(SIZES, UNITS, DEGREES)
def test_ranks_tile_the_axis(size: int, unit: int, tp: int) -> None:
    ranges = rank_ranges(size, unit, tp)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert all(start % unit == 0 for start, _ in ranges if start < size)
    widths = [count(stop - start, unit) for start, stop in ranges]
    assert max(widths) - min(widths) <= 1


@given(SIZES, UNITS, st.sampled_from([1, 2, 4, 8]))
def test_ranks_of_two_four_and_eight_hold_whole_segments(size: int, unit: int, tp: int) -> None:
    whole = segment_cuts(size, unit)
    for rank, held in enumerate(rank_ranges(size, unit, tp)):
        per_rank = SEGMENTS // tp
        mine = whole[rank * per_rank : (rank + 1) * per_rank + 1]
        assert (mine[0], mine[-1]) == held
        local = segment_cuts(size, unit, held)
        inside = local[rank * per_rank : (rank + 1) * per_rank + 1]
        assert inside == tuple(edge - held[0] for edge in mine)
        assert set(local[: rank * per_rank + 1]) == {0}
        assert set(local[(rank + 1) * per_rank :]) == {held[1] - held[0]}


@given(SIZES, UNITS, DEGREES)
def test_segments_of_all_ranks_are_the_whole_axis(size: int, unit: int, tp: int) -> None:
    for held in rank_ranges(size, unit, tp):
        cuts = segment_cuts(size, unit, held)
        assert len(cuts) == SEGMENTS + 1
        assert cuts[0] == 0
        assert cuts[-1] == held[1] - held[0]
        assert all(a <= b for a, b in itertools.pairwise(cuts))


@given(st.lists(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=3), max_size=5))
def test_every_element_has_one_owner(raw: list[list[tuple[int, int]]]) -> None:
    held = [[(min(pair), max(pair)) for pair in ranges] for ranges in raw]
    owned = owned_ranges(held)
    elements = [i for ranges in owned for a, b in ranges for i in range(a, b)]
    assert len(elements) == len(set(elements))
    assert set(elements) == {i for ranges in held for a, b in ranges for i in range(a, b)}
    for mine, ranges in zip(owned, held, strict=True):
        everything = {i for a, b in ranges for i in range(a, b)}
        assert all(i in everything for a, b in mine for i in range(a, b))


def shapes_of(fused: bool, dims: ModelDims, hidden: int, layers: int = 2) -> dict[str, tuple[int, int]]:
    """Return the matrices of a small decoder, as llama has them or as phi3 fuses them."""
    q, kv, mlp = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim, INTERMEDIATE[dims]
    shapes = {"model.embed_tokens": (dims.vocab, hidden), "lm_head": (dims.vocab, hidden)}
    for i in range(layers):
        base = f"model.layers.{i}"
        if fused:
            shapes |= {
                f"{base}.self_attn.qkv_proj": (q + 2 * kv, hidden),
                f"{base}.mlp.gate_up_proj": (2 * mlp, hidden),
            }
        else:
            shapes |= {f"{base}.self_attn.{name}_proj": (q if name == "q" else kv, hidden) for name in "qkv"}
            shapes |= {f"{base}.mlp.{name}_proj": (mlp, hidden) for name in ("gate", "up")}
        shapes |= {f"{base}.self_attn.o_proj": (hidden, q), f"{base}.mlp.down_proj": (hidden, mlp)}
    return shapes


INTERMEDIATE = {
    ModelDims(heads=8, kv_heads=4, head_dim=32, vocab=2048): 768,
    ModelDims(heads=6, kv_heads=2, head_dim=32, vocab=100): 352,
    ModelDims(heads=6, kv_heads=6, head_dim=64, vocab=515): 640,
    ModelDims(heads=4, kv_heads=1, head_dim=80, vocab=65): 100,
}
DIMS = list(INTERMEDIATE)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_producers_are_cut_where_their_consumers_are(dims: ModelDims, family: str, tp: int) -> None:
    entry = FAMILIES[family]
    shapes = shapes_of(family == "phi3", dims, hidden=192)
    plan = make_plan(shapes, entry.roles, entry.keep, dims, lambda name: 64, tp)
    assert plan.splits.keys() == shapes.keys()
    for i in range(2):
        o = plan.splits[f"model.layers.{i}.self_attn.o_proj"]
        down = plan.splits[f"model.layers.{i}.mlp.down_proj"]
        heads = plan.heads[f"model.layers.{i}.self_attn"]
        assert sum(h.heads for h in heads) == dims.heads
        for rank in range(tp):
            (q_range,) = o.ranges[rank]
            assert q_range[1] - q_range[0] == heads[rank].heads * dims.head_dim
            _check_kv_map(plan.splits, i, rank, dims, q_range, heads[rank].kv_index)
            (mlp_range,) = down.ranges[rank]
            ups = _up_ranges(plan.splits, i, rank, dims)
            assert all(held == mlp_range for held in ups)
    assert plan.splits["lm_head"].gather
    assert all(start % VOCAB_UNIT == 0 for ((start, stop),) in plan.splits["lm_head"].ranges if start < stop)


def _kv_range(splits: dict, i: int, rank: int, dims: ModelDims) -> tuple[int, int]:
    fused = splits.get(f"model.layers.{i}.self_attn.qkv_proj")
    if fused is None:
        k, v = (splits[f"model.layers.{i}.self_attn.{name}_proj"].ranges[rank] for name in "kv")
        assert k == v
        return k[0]
    _, k, v = fused.ranges[rank]
    q_size, kv_size = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    assert (k[0] + kv_size, k[1] + kv_size) == v
    return (k[0] - q_size, k[1] - q_size)


def _check_kv_map(splits: dict, i: int, rank: int, dims: ModelDims, q: tuple[int, int], index: tuple[int, ...]) -> None:
    start, stop = _kv_range(splits, i, rank, dims)
    assert start % dims.head_dim == stop % dims.head_dim == 0
    for local, kv in enumerate(index):
        head = q[0] // dims.head_dim + local
        assert start // dims.head_dim + kv == head * dims.kv_heads // dims.heads
        assert start <= (start // dims.head_dim + kv) * dims.head_dim < stop


def _up_ranges(splits: dict, i: int, rank: int, dims: ModelDims) -> list[tuple[int, int]]:
    fused = splits.get(f"model.layers.{i}.mlp.gate_up_proj")
    if fused is None:
        return [splits[f"model.layers.{i}.mlp.{name}_proj"].ranges[rank][0] for name in ("gate", "up")]
    gate, up = fused.ranges[rank]
    return [gate, (up[0] - INTERMEDIATE[dims], up[1] - INTERMEDIATE[dims])]


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_a_qkv_by_head_holds_each_heads_rows(dims: ModelDims, tp: int) -> None:
    group, size = dims.heads // dims.kv_heads, dims.head_dim
    shapes = {"a.qkv": ((dims.heads + 2 * dims.kv_heads) * size, 192), "a.o": (192, dims.heads * size)}
    plan = make_plan(shapes, {"a.qkv": "qkv_by_head", "a.o": "o"}, (), dims, lambda name: 64, tp)
    held = [{row for start, stop in ranges for row in range(start, stop)} for ranges in plan.splits["a.qkv"].ranges]
    for rank, heads in enumerate(plan.heads["a"]):
        queries = range(heads.first, heads.first + heads.heads)
        places = [head // group * (group + 2) + head % group for head in queries]
        keys = {head // group for head in queries}
        places += [kv * (group + 2) + group + part for kv in keys for part in (0, 1)]
        assert held[rank] == {place * size + i for place in places for i in range(size)}
    assert set().union(*held) == set(range(shapes["a.qkv"][0]))


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_every_expert_of_a_stack_is_cut_alike(tp: int) -> None:
    experts, inner, dims = 5, 160, DIMS[0]
    shapes = {"e.gate_up": (experts * 2 * inner, 192), "e.down": (experts * 192, inner)}
    plan = make_plan(shapes, {"e.gate_up": "expert_gate_up", "e.down": "expert_down"}, (), dims, lambda name: 64, tp)
    for rank in range(tp):
        ((start, stop),) = plan.splits["e.down"].ranges[rank]
        rows = [row for a, b in plan.splits["e.gate_up"].ranges[rank] for row in range(a, b)]
        assert rows == [half * inner + i for half in range(2 * experts) for i in range(start, stop)]


def test_six_heads_over_four_ranks_leave_one_idle() -> None:
    # Units of two heads (64 elements): three units over four ranks.
    dims = DIMS[1]
    entry = FAMILIES["llama"]
    plan = make_plan(shapes_of(False, dims, 192), entry.roles, (), dims, lambda name: 64, 4)
    assert [h.heads for h in plan.heads["model.layers.0.self_attn"]] == [0, 2, 2, 2]
    assert query_unit(64, 32) == 64
    assert query_unit(64, 80) == 320


def test_a_matrix_without_a_rule_is_named() -> None:
    with pytest.raises(PlanError, match=r"model\.extra is matched by no rule"):
        match_role("model.extra", {"model.layers.*": "q"})


def test_a_matrix_with_two_rules_is_named_with_both() -> None:
    with pytest.raises(PlanError, match=r"model\.a is matched by more than one rule of the plan \(model\.\*, \*\.a\)"):
        match_role("model.a", {"model.*": "q", "*.a": "o"})


def test_a_kept_matrix_has_no_role() -> None:
    assert match_role("router", {"model.*": "q"}, ("router",)) is None


def test_a_size_that_is_not_the_configs_is_refused() -> None:
    dims = DIMS[0]
    shapes = shapes_of(False, dims, 192) | {"model.layers.0.self_attn.q_proj": (13, 192)}
    with pytest.raises(PlanError, match=r"q_proj has N = 13; its config says 256"):
        make_plan(shapes, FAMILIES["llama"].roles, (), dims, lambda name: 64, 2)
