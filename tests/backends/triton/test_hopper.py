"""The divided kernel of sm_90: which launches it takes, its runs of tiles, and the products against the definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from mxmoe.backends.triton import hopper, hopper_runs
from mxmoe.backends.triton.dispatch import Dispatch
from mxmoe.backends.triton.kernels_hopper_ring import FIELDS
from mxmoe.backends.triton.launch import Epilogue, Matrices, Rows, make_rows
from mxmoe.backends.triton.layout import allocate_arena, body_of, put
from mxmoe.backends.triton.rows import RowKind
from mxmoe.backends.triton.schedule import allocate, build
from mxmoe.backends.triton.tiles import Config, Gemm, Shape, classes_of
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, apply_act, dequantize, quantize

DENSE = ("bf16", "w8a8_sym", "w8a8_e4m3")
NIBBLES = ("w4a8_g128_sym", "w4a8_g128_sym_e4m3", "w4a8_sym", "w4a8_g128_sym_iscale")
OTHERS = ("w4a16_g128_asym", "w8a16_g128_sym", "w2a16_g64_asym")
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no sm_90 device"
)


def gemm_of(names: tuple[str, ...], n: int = 256, k: int = 512, gated: bool = True) -> Gemm:
    return Gemm(n, k, tuple(map(Scheme.parse, names)), gated)


heights = st.sets(st.sampled_from(hopper.HEIGHTS), min_size=1).map(sorted).map(tuple)


@given(st.lists(st.sampled_from(DENSE), min_size=1, max_size=6), st.booleans(), st.integers(1, 9), heights)
@settings(max_examples=50, deadline=None)
def test_tiles_are_those_the_kernel_is_written_for(
    names: list[str], gated: bool, width: int, tall: tuple[int, ...]
) -> None:
    names = [*names, NIBBLES[width % len(NIBBLES)]] if len(set(names)) < hopper_runs.MOST_OPERANDS else names
    gemm = gemm_of(tuple(names), n=64 * width, gated=gated)
    config = hopper.config_for(gemm, tall)
    assert config is not None
    tiling, _ = classes_of(gemm, config)
    for one in tiling.classes:
        is_wide = body_of(gemm.distinct[one.group]) != "nibbles"
        side_by_side = (256 if is_wide else 128) // (2 if gated else 1)
        assert one.n_tiles == -(-gemm.n // side_by_side)
        assert one.height in tall


@pytest.mark.parametrize("name", DENSE + NIBBLES)
def test_what_decodes_for_most_of_its_time_is_not_kept_together(name: str) -> None:
    gemm = gemm_of((name,))
    kept = {config for config in hopper.candidates(gemm) if config.shape(gemm.distinct[0]).together}
    assert bool(kept) == (body_of(gemm.distinct[0]) != "nibbles")
    # a launch of many rows of dense weights may have slim tiles
    slim = {config for config in kept if config.shape(gemm.distinct[0]).slim}
    assert bool(slim) == (body_of(gemm.distinct[0]) == "dense")
    for config in kept:
        assert classes_of(gemm, config)[0].together == {0}
        assert Shape.parse(str(config.shape(gemm.distinct[0]))) == config.shape(gemm.distinct[0])


@pytest.mark.parametrize("gated", [True, False])
def test_slim_tiles_share_the_ring_of_tall_ones(gated: bool) -> None:
    gemm = gemm_of(("w8a8_sym",), n=1000, gated=gated)
    config = hopper.config_for(gemm, is_narrow=True, slim=True)
    assert config is not None
    matrices = Matrices(gemm, allocate_arena(1000, 512, gemm.schemes, 1 + gated, "cpu"), None)
    runs = [dict(zip(FIELDS, run, strict=True)) for run in hopper_runs.runs(matrices, config, Epilogue())]
    tall = next(run for run in runs if run["height"] == 128)
    assert (tall["kind"], tall["stages"]) == (hopper_runs.SLIM, hopper_runs.STAGES[hopper_runs.WIDE])
    assert tall["columns"] == (16 if gated else 8)
    assert all(run["kind"] == hopper_runs.NARROW for run in runs if run is not tall)


@given(st.lists(st.sampled_from(DENSE + NIBBLES), min_size=1, max_size=4), heights)
@settings(max_examples=50, deadline=None)
def test_a_ring_is_left_before_its_memory_is_another(names: list[str], tall: tuple[int, ...]) -> None:
    gemm = gemm_of(tuple(names))
    config = hopper.config_for(gemm, tall)
    if config is None:
        assert len(hopper_runs.operands_of(gemm)) > hopper_runs.MOST_OPERANDS
        return
    matrices = Matrices(gemm, allocate_arena(256, 512, gemm.schemes, 2, "cpu"), None)
    runs = [dict(zip(FIELDS, run, strict=True)) for run in hopper_runs.runs(matrices, config, Epilogue("silu"))]
    assert sorted(run["place"] for run in runs) == list(range(len(config.shapes) * len(tall)))
    rings = [(hopper_runs.RINGS[run["kind"]], run["rows"]) for run in runs]
    assert len(list(groupby(rings))) == len(set(rings))
    free = 0
    for before, run, ring, ring_before in zip([None, *runs], runs, rings, [None, *rings], strict=False):
        free += before["stages"] if before is not None and ring != ring_before else 0
        assert run["first_barrier"] == free
        assert before is None or before["leaves"] == (ring != ring_before)
    assert not runs[-1]["leaves"]


@given(st.sampled_from(DENSE + NIBBLES), st.sampled_from(DENSE + NIBBLES), st.booleans(), heights, st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_an_expert_that_sees_every_token_has_runs_of_its_own(
    name: str, other: str, gated: bool, tall: tuple[int, ...], tokens: int
) -> None:
    own = (1280, 512) if gated else (256, 2560)
    gemm = replace(gemm_of((name, name, other), gated=gated), always=own)
    config = hopper.config_for(gemm, tall)
    assert config is not None
    config = hopper.with_always(gemm, config, tokens)
    matrices = Matrices(gemm, allocate_arena(256, 512, gemm.schemes, 1 + gated, "cpu"), None)
    runs = [dict(zip(FIELDS, run, strict=True)) for run in hopper_runs.runs(matrices, config, Epilogue())]
    tiling, _ = classes_of(gemm, config)
    assert sorted(run["place"] for run in runs) == list(range(len(tiling.classes)))
    for run in runs:
        one = tiling.classes[run["place"]]
        assert run["height"] == one.height
        is_always = one.group == tiling.group[-1]
        assert (run["n"], run["k"]) == (own if is_always else (256, 512))
        assert run["ring"] == (hopper_runs.MOST_OPERANDS if is_always else 0)
        assert run["rows"] == (len(gemm.row_kinds) if is_always else gemm.row_kinds.index(RowKind.of(gemm.schemes[0])))
        assert run["apart"] == ((hopper_runs.WRITES if gated else hopper_runs.READS) if is_always else 0)
        wide = 128 if run["kind"] in (hopper_runs.NARROW, hopper_runs.NIBBLES, hopper_runs.SCALED_LOW) else 256
        assert run["columns"] == -(-run["n"] * (1 + gated) // wide)
    assert {one.height for one in tiling.classes if one.group == 0} == set(tall)


@pytest.mark.parametrize("gated", [True, False])
def test_rows_and_results_of_an_expert_that_sees_every_token_lie_behind_the_others(gated: bool) -> None:
    tokens, top_k, n, k = 5, 2, 64, 32
    gemm = Gemm(n, k, tuple(map(Scheme.parse, ("w8a8_sym", "bf16"))), gated, (3 * n, k) if gated else (n, 3 * k))
    config = hopper.config_for(gemm)
    assert config is not None
    dispatch = Dispatch(1, top_k, tokens, (classes_of(gemm, config)[0],), always=1)
    assert dispatch.beyond == 16
    width, behind = (n, 3 * n) if gated else (k, 3 * k)
    flat = torch.arange(dispatch.beyond * width + tokens * behind)
    plain = torch.zeros((dispatch.rows, k if gated else n))
    scales = torch.arange(100.0)
    rows = Rows((plain, plain), (scales, scales)) if gated else Rows((flat, flat), (scales, scales))
    found = hopper.Always.of(gemm, rows, dispatch, flat.view(1, -1, n) if gated else plain[None])
    assert found is not None
    assert (found.n, found.k) == gemm.always
    last = flat[-tokens * behind :].view(tokens, behind)
    assert torch.equal(found.out if gated else found.codes, last)
    assert len(found.codes if gated else found.out[0]) == dispatch.rows
    assert found.scales[0] == (0 if gated else dispatch.beyond)
    assert hopper.Always.of(replace(gemm, always=None), rows, dispatch, plain[None]) is None


@pytest.mark.parametrize("name", OTHERS)
def test_schemes_without_a_kernel_have_no_config(name: str) -> None:
    assert hopper.config_for(gemm_of(("bf16", name))) is None


def test_rows_of_no_whole_16_bytes_have_no_config() -> None:
    assert hopper.config_for(gemm_of(("w8a8_sym",), k=520)) is None
    assert hopper.config_for(gemm_of(("bf16",), k=520)) is not None
    assert hopper.config_for(replace(gemm_of(("w8a8_sym",)), always=(256, 520))) is None


def test_only_launches_that_the_kernels_compute_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "runs_on", lambda _device: True)
    gemm = gemm_of(("bf16",))
    config = hopper.config_for(gemm)
    assert config is not None
    matrices = Matrices(gemm, allocate_arena(256, 512, gemm.schemes, 2, "cpu"), None)
    out, silu = torch.empty(1, 8, 256), Epilogue("silu")
    assert hopper.takes(matrices, config, out, silu)
    assert not hopper.takes(matrices, config, out, Epilogue())
    assert not hopper.takes(matrices, config, torch.empty(2, 8, 256), silu)
    assert not hopper.takes(matrices, config, torch.empty(1, 8, 512)[..., :256], silu)
    assert not hopper.takes(matrices, Config(8, (("bf16", Shape((64,), 128)),)), out, silu)
    monkeypatch.undo()
    assert not hopper.runs_on(torch.device("cpu"))


def weights_of(gemm: Gemm, seed: int) -> list[Quantized]:
    """By matrix and expert, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    matrices = 2 if gemm.gated else 1
    return [
        quantize(torch.randn((gemm.n, gemm.k), generator=generator) * gemm.k**-0.5, scheme)
        for _ in range(matrices)
        for scheme in gemm.schemes
    ]


def wanted(gemm: Gemm, made: list[Quantized], rows: Rows, expert: int, source: Tensor, bias: Tensor | None) -> Tensor:
    """Rows `source` through one expert, in float64."""
    scheme = gemm.schemes[expert]
    kind = gemm.row_kinds.index(RowKind.of(scheme))
    x = rows.codes[kind].cpu().double()[source]
    if scheme.act_bits < 16:
        x = x * rows.scales[kind].cpu().double()[source]
    sums: list[Tensor] = []
    for matrix in range(2 if gemm.gated else 1):
        q = made[matrix * len(gemm.schemes) + expert]
        y = x @ dequantize(q).double().T
        sums.append(y if bias is None else y + bias[matrix, expert].double())
    return apply_act("silu", sums[0], sums[1], {}) if gemm.gated else sums[0]


@dataclass
class Program:
    """What a program does, as `kernels_hopper._load` has it: one fetch a step."""

    runs: list[dict[str, int]]
    counts: list[int]
    is_back: bool
    number: int
    begun: tuple[int, int]
    """Programs that begin with what multiplies, and with what reads."""
    counters: list[int]
    left: list[int] = field(default_factory=list[int])
    """Rings in the order in which they were entered."""
    taken: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def steps(self) -> Iterator[None]:
        tile = self.number
        for part in range(1 + self.is_back):
            for at, run in enumerate(self.runs):
                reads = run["reads"]
                if self.is_back and part == reads:
                    continue
                if run["begins"] and self.is_back != bool(reads):
                    tile = self._fetch(reads)
                    yield
                if not self.left or self.left[-1] != run["first_barrier"]:
                    self.left.append(run["first_barrier"])
                last = self.counts[at] * run["columns"]
                while tile < last:
                    self.taken.append((at, tile))
                    # what `_load_run` counts from the run's first, all before it in its part taken off
                    tile = self._fetch(reads) - sum(
                        self.counts[i] * self.runs[i]["columns"] for i in range(at) if self.runs[i]["reads"] == reads
                    )
                    yield
                tile -= last

    def _fetch(self, reads: int) -> int:
        self.counters[reads] += 1
        return self.begun[reads] + self.counters[reads] - 1


@given(
    st.lists(st.sampled_from(DENSE + NIBBLES), min_size=1, max_size=4), heights, st.booleans(), st.integers(2, 4),
    st.integers(1, 12), st.booleans(), st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip
@example(["w8a8_sym"], (64, 128), False, 3, 12, True, False, Random(0))
@settings(max_examples=100, deadline=None)
def test_tiles_of_both_parts_are_taken_once(
    names: list[str], tall: tuple[int, ...], is_narrow: bool, back: int, programs: int, together: bool, slim: bool,
    random: Random,
) -> None:  # fmt: skip
    gemm = gemm_of(tuple(names))
    config = hopper.config_for(gemm, tall, is_narrow=is_narrow, together=together, slim=slim)
    if config is None:
        return
    matrices = Matrices(gemm, allocate_arena(256, 512, gemm.schemes, 2, "cpu"), None)
    config = replace(config, back=back)
    runs = [dict(zip(FIELDS, run, strict=True)) for run in hopper_runs.runs(matrices, config, Epilogue("silu"))]
    assert [run["place"] for run in runs if run["begins"]] == [
        next(run["place"] for run in runs if run["reads"] == reads) for reads in dict.fromkeys(r["reads"] for r in runs)
    ]
    if runs[0]["back"]:  # programs in front begin with what multiplies
        assert [run["reads"] for run in runs] == sorted(run["reads"] for run in runs)
    else:  # all read, or all multiply
        assert len({run["reads"] for run in runs}) == 1 or not back
        return
    counts = [random.randint(0, 3) for _ in runs]
    backs, counters = programs // back, [0, 0]
    made = [
        Program(
            runs, counts, at % back == back - 1, at // back if at % back == back - 1 else at - at // back,
            (programs - backs, backs), counters,
        )
        for at in range(programs)
    ]  # fmt: skip
    going = [one.steps() for one in made]
    while going:
        at = random.randrange(len(going))
        if next(going[at], 0) is not None:
            going.pop(at)
    taken = sorted(one for program in made for one in program.taken)
    assert taken == [(at, i) for at, run in enumerate(runs) for i in range(counts[at] * run["columns"])]
    # a ring is entered once, and left where another follows, whichever part comes first
    for program in made:
        assert len(program.left) == len(set(program.left))
    rings = [run["first_barrier"] for run in runs]
    assert all(run["leaves"] == (rings[(at + 1) % len(rings)] != rings[at]) for at, run in enumerate(runs))


CASES = [
    *((gemm_of((name,) * 3, n, k, gated), False) for name in DENSE + NIBBLES for n, k, gated in ((192, 640, True),)),
    *((gemm_of((name,) * 3, n, k, gated), True) for name in DENSE + NIBBLES for n, k, gated in ((320, 384, False),)),
    (gemm_of(("w8a8_sym", "w4a8_g128_sym", "bf16", "w4a8_sym"), 256, 512, True), True),
    (gemm_of(("w8a8_e4m3", "w4a8_g128_sym_e4m3", "w4a8_g128_sym"), 192, 128, False), False),
    (gemm_of(("w4a8_g128_sym", "w8a8_sym", "w8a8_sym"), 384, 1152, False), False),
]
MANY = (64, 128)
CUTS: dict[str, tuple[tuple[int, ...], dict[str, bool]]] = {
    "all": ((16, 32, 64, 128), {}),
    "many": (MANY, {"together": True}),
    "few": ((16, 32), {}),
    "some": ((32, 64), {}),
    "narrow": (MANY, {"is_narrow": True, "together": True}),
    "slim": (MANY, {"is_narrow": True, "slim": True}),
    "back": (MANY, {"together": True}),
    "back, narrow": ((16, 32, 64, 128), {"is_narrow": True}),
    "back, slim": (MANY, {"together": True, "slim": True}),
}
"""Heights of tiles, and how else they are cut."""


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("gemm", "biased"), CASES)
def test_products_are_those_of_the_definition(gemm: Gemm, biased: bool, cut: str, alone: bool) -> None:
    if alone and not gemm.gated:
        pytest.skip("one matrix is alone anyway")
    tall, options = CUTS[cut]
    # many rows for tall tiles, or some
    tokens, top_k, experts = 2500 if tall == MANY else 333, 2, len(gemm.schemes)
    made, matrices = weights_of(gemm, 1), 2 if gemm.gated else 1
    arena = allocate_arena(gemm.n, gemm.k, gemm.schemes, matrices, "cuda")
    for number, q in enumerate(made):
        put(arena, number // experts, number % experts, q)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn((matrices, experts, gemm.n), generator=generator) if biased else None
    config = hopper.config_for(gemm, tall, **options)
    assert config is not None
    config = replace(config, back=3 if "back" in cut else 0)
    tiling, _ = classes_of(gemm, config)
    tables = allocate(Dispatch(experts, top_k, tokens, (tiling,)), torch.device("cuda"))
    # the last expert is used little, and some assignments are padding
    index = torch.rand((tokens, experts + 1), generator=generator).topk(top_k).indices.to(torch.int32)
    index[torch.rand(index.shape, generator=generator) < 0.4] = 0
    build(tables, index.cuda())
    rows = make_rows(torch.randn((tokens * top_k, gemm.k), generator=generator).bfloat16().cuda(), gemm.row_kinds)
    out = torch.full((1, tokens * top_k, gemm.n), float("nan"), dtype=torch.bfloat16, device="cuda")
    held = Matrices(gemm, arena, None if bias is None else bias.cuda())
    if alone:  # up by itself, in the tiles of both
        held, gemm, made = held.alone(1), held.alone(1).gemm, made[experts:]
        bias = None if bias is None else bias[1:]
    epilogue = Epilogue("silu") if gemm.gated else Epilogue()
    assert hopper.takes(held, config, out, epilogue)
    hopper.run_hopper(held, config, rows, tables, 0, out, epilogue)
    start = 0
    for expert, count in enumerate(tables.table("counts").cpu().tolist()):
        want = wanted(gemm, made, rows, expert, torch.arange(start, start + count), bias)
        found = out[0, start : start + count].cpu().double()
        assert (found - want).norm() <= 6e-3 * want.norm(), gemm.schemes[expert]
        start += count
    assert out[0, start:].isnan().all()
