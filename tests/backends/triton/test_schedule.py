"""The tile schedule: every row and column once, whatever the routing; the kernels' tables equal those of the twin."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton import knobs

from mxmoe.backends.triton import kernels_schedule, schedule
from mxmoe.backends.triton.ahead import compile_ahead
from mxmoe.backends.triton.dispatch import Dispatch, Tables, TileClass, Tiling
from mxmoe.backends.triton.mode import ptx_for
from mxmoe.backends.triton.schedule import allocate, build, build_reference
from mxmoe.errors import BadDispatch

from .child import run_in_child

interpreted = pytest.mark.skipif(not knobs.runtime.interpret, reason="run by test_kernels_in_the_interpreter")
on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# every way through the kernels: one launch, and two
FEW = (0, 1 << 20)
HEIGHTS = ((16, 64, 128), (128,), (16, 32), (1, 2, 4), (64,))
DEPTH = 3


@dataclass(frozen=True)
class Case:
    dispatch: Dispatch
    index: Tensor


def make_tiling(
    groups: tuple[tuple[int, ...], ...], group: tuple[int, ...], n_tiles: int, together: frozenset[int] = frozenset()
) -> Tiling:
    """Tallest classes first, each with its own number of tiles side by side."""
    pairs = sorted(((g, h) for g, heights in enumerate(groups) for h in heights), key=lambda pair: -pair[1])
    return Tiling(tuple(TileClass(g, h, n_tiles + at % 3) for at, (g, h) in enumerate(pairs)), group, together)


@st.composite
def tilings(draw: st.DrawFn, lanes: int) -> Tiling:
    groups = draw(st.lists(st.sampled_from(HEIGHTS), min_size=1, max_size=3))
    # one seed instead of a list of draws: there are up to 302 experts
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    group = torch.randint(0, len(groups), (lanes,), generator=random).tolist()
    together = frozenset(draw(st.sets(st.integers(0, len(groups) - 1))))
    return make_tiling(tuple(groups), tuple(group), draw(st.integers(1, 5)), together)


@st.composite
def cases(draw: st.DrawFn, most_tokens: int = 300) -> Case:
    """1 to 300 experts, top-1 to top-8, no token to many; random, all to one expert, mostly padding, or skewed."""
    experts, top_k = draw(st.sampled_from((1, 2, 7, 8, 60, 256, 300))), draw(st.integers(1, 8))
    tokens, always = draw(st.sampled_from((0, 1, 2, 17, 64, most_tokens))), draw(st.integers(0, 2))
    made = tuple(draw(tilings(experts + always)) for _ in range(draw(st.integers(1, 2))))
    kind = draw(st.sampled_from(("random", "one", "padding", "skewed")))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (tokens, top_k)
    if kind == "one":
        index = torch.full(shape, draw(st.integers(0, experts - 1)))
    elif kind == "padding":
        index = torch.randint(-2, 1, shape, generator=random) * (experts + 1) + experts
    elif kind == "skewed":
        index = (torch.rand(shape, generator=random) ** 6 * experts).long()
    else:
        index = torch.randint(0, experts + 1, shape, generator=random)
    dtype = draw(st.sampled_from((torch.int32, torch.int64)))
    return Case(Dispatch(experts, top_k, tokens, made, always), index.to(dtype))


def make_reference(case: Case) -> Tables:
    tables = allocate(case.dispatch, "cpu")
    build_reference(tables, case.index.cpu())
    return tables


def check_equal(tables: Tables, case: Case) -> None:
    found, wanted = tables.filled(), make_reference(case).filled()
    assert found.keys() == wanted.keys()
    for name, table in wanted.items():
        assert torch.equal(found[name], table), name


@given(cases())
@settings(max_examples=50, deadline=None)
def test_rows_are_a_stable_sort(case: Case) -> None:
    dispatch, tables = case.dispatch, make_reference(case)
    row_of, place_of = tables.table("row_of").tolist(), tables.table("place_of").tolist()
    offsets = tables.table("offsets").tolist()
    flat = case.index.reshape(-1).tolist()
    owner = [one if 0 <= one < dispatch.experts else dispatch.lanes for one in flat]
    owner += [dispatch.experts + s for s in range(dispatch.always) for _ in range(dispatch.tokens)]
    assert row_of == sorted(range(dispatch.rows), key=lambda row: (owner[row], row))
    for row, place in enumerate(place_of):
        assert place == -1 if owner[row] == dispatch.lanes else row_of[place] == row
    assert tables.table("counts").tolist() == [owner.count(lane) for lane in range(dispatch.lanes)]
    assert offsets == [sum(one < lane for one in owner) for lane in range(dispatch.lanes + 1)]


@given(cases(most_tokens=150), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_every_row_and_column_is_covered_once(case: Case, depth: int) -> None:
    dispatch, tables = case.dispatch, make_reference(case)
    offsets = tables.table("offsets").tolist()
    for which, tiling in enumerate(dispatch.tilings):
        expert, row, rows = (tables.table(f"band_{name}", which).tolist() for name in ("expert", "row", "rows"))
        class_tile = tables.table("class_tile", which).tolist()
        assert tables.table("class_band", which)[-1] <= dispatch.bands(which)
        assert class_tile[-1] <= dispatch.most_tiles(which)
        seen: Counter[tuple[int, int, int]] = Counter()
        for at, one in enumerate(tiling.classes):
            bands = tables.table("class_band", which)[at : at + 2].tolist()
            for local in range(class_tile[at + 1] - class_tile[at]):
                inside, column = schedule.tile_in_class_reference(local, bands[1] - bands[0], one.n_tiles, depth)
                band = bands[0] + inside
                assert tiling.group[expert[band]] == one.group
                assert 0 < rows[band] <= one.height
                assert offsets[expert[band]] <= row[band]
                assert row[band] + rows[band] <= offsets[expert[band] + 1]
                seen.update((at, place, column) for place in range(row[band], row[band] + rows[band]))
        columns: dict[int, set[int]] = {}
        assert set(seen.values()) <= {1}
        for at, place, column in seen:
            columns.setdefault(place, set()).add(column)
            assert column < tiling.classes[at].n_tiles
        owners = Counter(place for _, place, _ in seen)
        assert sorted(columns) == list(range(offsets[-1]))
        classes = {place: at for at, place, _ in seen}
        assert all(owners[place] == tiling.classes[classes[place]].n_tiles == len(columns[place]) for place in columns)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("heights", HEIGHTS)
def test_an_expert_has_one_partial_band(heights: tuple[int, ...], together: bool) -> None:
    """Of the smallest height that covers it; of the tallest, beside a full band of an expert that is together."""
    tallest = heights[-1]
    experts = 2 * tallest + 2
    tiling = make_tiling((heights,), (0,) * experts, 1, frozenset({0} if together else ()))
    index = torch.cat([torch.full((count,), count) for count in range(experts)]).reshape(-1, 1)
    tables = make_reference(Case(Dispatch(experts, 1, len(index), (tiling,)), index))
    ends, expert = tables.table("class_band").tolist(), tables.table("band_expert").tolist()
    rows = tables.table("band_rows").tolist()
    for count in range(experts):
        found = sorted(
            ((one.height, rows[at]) for c, one in enumerate(tiling.classes) for at in range(ends[c], ends[c + 1])
             if expert[at] == count), reverse=True,
        )  # fmt: skip
        rest = count % tallest
        height = tallest if together and count >= tallest else min(height for height in heights if height >= rest)
        last = [(height, rest)] if rest else []
        assert found == sorted([(tallest, tallest)] * (count // tallest) + last, reverse=True)


def test_tiles_of_a_group_of_bands_run_together() -> None:
    order = [schedule.tile_in_class_reference(local, 5, 2, 3) for local in range(10)]
    assert order == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (4, 0), (3, 1), (4, 1)]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Tiling((), ()), "no class"),
        (lambda: Tiling((TileClass(0, 48, 1),), (0,)), "powers of two"),
        (lambda: Tiling((TileClass(0, 16, 1), TileClass(0, 16, 2)), (0,)), "same height"),
        (lambda: Tiling((TileClass(0, 16, 1),), (0, 1)), "no class for experts of group 1"),
        (lambda: Dispatch(2, 1, 1, (make_tiling(((16,),), (0,), 1),)), "groups for 1 experts"),
        (lambda: Dispatch(1, 1, 1, ()), "0 tilings"),
        (lambda: Dispatch(1, 1, -1, (make_tiling(((16,),), (0,), 1),)), "-1 tokens"),
    ],
)
def test_what_cannot_be_scheduled(make: object, reason: str) -> None:
    assert callable(make)
    with pytest.raises(BadDispatch, match=reason):
        make()


@pytest.mark.parametrize("index", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int64)])
def test_a_routing_of_another_shape_or_type(index: Tensor) -> None:
    tables = allocate(Dispatch(2, 2, 3, (make_tiling(((16,),), (0, 0), 1),)), "cpu")
    with pytest.raises(BadDispatch, match="top_k_index"):
        build(tables, index)


@triton.jit
def walk_kernel(
    words: tl.tensor, constants: tl.tensor, out: tl.tensor,
    EP: tl.constexpr, CP: tl.constexpr, SETS: tl.constexpr, WHICH: tl.constexpr, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(0)
    classes = constants + SETS * EP + WHICH * 6 * CP
    found, band, column = kernels_schedule.tile_at(tile, words + 2 * EP + WHICH * 2 * CP, classes, CP, DEPTH)
    tl.store(out + 3 * tile, found)
    tl.store(out + 3 * tile + 1, band)
    tl.store(out + 3 * tile + 2, column)


def check_walk(tables: Tables, which: int) -> None:
    dispatch = tables.dispatch
    total = int(tables.table("class_tile", which)[-1])
    out = torch.zeros(max(total, 1), 3, dtype=torch.int32, device=tables.words.device)
    sizes = (dispatch.expert_width, dispatch.class_width, len(dispatch.tilings), which, DEPTH)
    if total:
        walk_kernel[(total,)](tables.words, tables.constants, out, *sizes)
    found = [tuple(row) for row in out[:total].tolist()]
    assert found == [schedule.tile_at_reference(tables, which, tile, DEPTH) for tile in range(total)]


@interpreted
@pytest.mark.parametrize("few", FEW)
@given(case=cases(most_tokens=100))
@settings(max_examples=25, deadline=None)
def test_kernel_equals_twin(few: int, case: Case) -> None:
    tables = allocate(case.dispatch, "cpu", few_assignments=few)
    # what an earlier routing left must not show
    tables.words.fill_(-7)
    build(tables, case.index)
    check_equal(tables, case)


@interpreted
@given(case=cases(most_tokens=64))
@settings(max_examples=8, deadline=None)
def test_kernel_walks_the_tiles_in_the_order_of_the_twin(case: Case) -> None:
    tables = allocate(case.dispatch, "cpu")
    build(tables, case.index)
    for which in range(len(case.dispatch.tilings)):
        check_walk(tables, which)


@interpreted
@pytest.mark.parametrize("few", FEW)
def test_kernel_cuts_every_count_as_the_twin(few: int) -> None:
    experts = 70
    tiling = make_tiling(((8, 16, 32),), (0,) * experts, 2)
    index = torch.cat([torch.full((count,), count) for count in range(experts)]).reshape(-1, 1)
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    case = Case(Dispatch(experts, 1, len(index), (tiling,)), index)
    tables = allocate(case.dispatch, "cpu", few_assignments=few)
    build(tables, index)
    check_equal(tables, case)


@pytest.mark.skipif(knobs.runtime.interpret, reason="is run by itself")
def test_kernels_in_the_interpreter() -> None:
    """Triton decides when it is loaded whether it interprets, so this takes a process of its own."""
    assert run_in_child(__file__, "kernel_", TRITON_INTERPRET="1").count("PASSED") == 5


@pytest.mark.parametrize("arch", [89, 90])
@pytest.mark.parametrize("name", ["few_kernel", "count_kernel", "many_kernel"])
def test_kernels_compile_without_local_memory_to_speak_of(arch: int, name: str) -> None:
    kernel = getattr(kernels_schedule, name)
    sizes = {"E": 60, "ALWAYS": 1, "EP": 64, "CP": 8, "HEAD": 160, "SETS": 2, "ROWS": 32, "COUNT": 4096}
    sizes |= {"CHUNK": 256 if name == "few_kernel" else 32, "BLOCK": 256, "BLOCKS": 32, "PART_COUNT": 8}
    sizes["PTX"] = ptx_for(arch)
    names = kernel.arg_names
    kinds = {one: "constexpr" if one in sizes else "*i32" if one.endswith("_ptr") else "i32" for one in names}
    kinds["index_ptr"] = "*i64"
    chosen = {one: sizes[one] for one in names if one in sizes}
    warps = schedule.FEW_WARPS if name == "few_kernel" else schedule.MANY_WARPS
    binary = compile_ahead(kernel, kinds, chosen, arch=arch, num_warps=warps)
    assert binary.facts().stack_bytes <= 16


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("few", FEW)
@given(case=cases(most_tokens=3000))
@settings(max_examples=100, deadline=None)
def test_device_equals_twin(few: int, case: Case) -> None:
    tables = allocate(case.dispatch, "cuda", few_assignments=few)
    tables.words.fill_(-7)
    build(tables, case.index.cuda())
    check_equal(tables, case)
    for which in range(len(case.dispatch.tilings)):
        if int(tables.table("class_tile", which)[-1]) < 2000:
            check_walk(tables, which)


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("few", FEW)
def test_a_graph_is_replayed_over_changing_routings(few: int) -> None:
    tiling = make_tiling(((16, 64, 128), (16, 32)), tuple(at % 2 for at in range(61)), 4)
    dispatch = Dispatch(60, 4, 512, (tiling, tiling), always=1)
    tables = allocate(dispatch, "cuda", few_assignments=few)
    index = torch.zeros(512, 4, dtype=torch.int64, device="cuda")
    build(tables, index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        build(tables, index)
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        index.copy_(torch.rand(512, 4, generator=random).pow(1 + seed % 5).mul(61).long())
        graph.replay()
        check_equal(tables, Case(dispatch, index))
