"""A routed bank and a shared expert in the same launches of the divided kernel: its choice, layout, and results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mxmoe.backends.eager import EagerBackend
from mxmoe.backends.triton import TritonBackend, choose_ada, hopper, hopper_runs, joint
from mxmoe.backends.triton.dispatch import Tables
from mxmoe.backends.triton.executable import TritonExecutable
from mxmoe.backends.triton.kernels_hopper_ring import FIELDS
from mxmoe.backends.triton.launch import Epilogue, Matrices, Rows, reads_sorted
from mxmoe.backends.triton.layout import body_of
from mxmoe.backends.triton.rows import RowKind
from mxmoe.backends.triton.tiles import ALWAYS, Config
from mxmoe.backends.triton.tuned import parse_config, spell_config
from mxmoe.ir import ModuleOp
from mxmoe.quant import Weights, apply_act, dequantize

from .joined_blocks import EXPERTS, TOP_K, apart, draw, far, make
from .small_blocks import DEVICE

# rows of padding hold anything, and numpy says so where kernels are interpreted
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run there; a definition stands in for them here")
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no sm_90 device"
)

SETS = (
    ("bf16",),
    ("w8a8_sym",),
    ("w8a8_e4m3",),
    ("w4a8_g128_sym",),
    ("w8a8_sym", "bf16", "w4a8_g128_sym"),
    ("w4a8_g128_sym_iscale", "w8a8_sym"),
    ("w4a8_g128_sym_e4m3", "w4a8_sym", "w8a8_e4m3"),
)
HIDDEN, NARROW = 272, 144
"""Channels that fill no tile and no step."""
WIDE = 432
"""Channels of the shared expert; others have as many as a routed one, as in DeepSeek-V3."""
CASES = [*((one, WIDE) for one in SETS), (SETS[0], NARROW), (SETS[4], NARROW)]


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Divide whatever fits, by rule."""
    monkeypatch.setattr(hopper, "ENOUGH_ROWS", {"dense": 0.0, "nibbles": 0.0, "scaled": 0.0})
    monkeypatch.setattr(choose_ada, "tuned_for", lambda _device: None)
    choose_ada.choose.cache_clear()
    yield
    choose_ada.choose.cache_clear()


def defined(
    matrices: Matrices, config: Config, rows: Rows, tables: Tables, which: int, out: Tensor, epilogue: Epilogue,
    *, few_next: bool = False, compile_only: bool = False,
) -> None:  # fmt: skip
    """Stand in for `hopper.run_hopper`: what its launch means, expert by expert, from what that gives its kernel."""
    assert reads_sorted(config)
    assert not compile_only
    assert few_next or which == 0, "what follows down is no GEMM"
    gemm, dispatch = matrices.gemm, tables.dispatch
    always = hopper.Always.of(gemm, rows, dispatch, out)
    runs = [dict(zip(FIELDS, run, strict=True)) for run in hopper_runs.runs(matrices, config, epilogue)]
    offsets = tables.table("offsets").tolist()
    for lane, scheme in enumerate(gemm.schemes):
        first, last = offsets[lane : lane + 2]
        kind = gemm.row_kinds.index(RowKind.of(scheme))
        codes, scales = rows.codes[kind].view(-1, gemm.k), rows.scales[kind].view(-1)
        arena, to, read, write = matrices.arena, out[0], slice(first, last), slice(first, last)
        if always is not None and lane == dispatch.experts:
            mine = {run["apart"] for run in runs if run["ring"] == hopper_runs.MOST_OPERANDS}
            assert mine == {hopper_runs.WRITES if gemm.gated else hopper_runs.READS}
            codes, scales, to = always.codes, always.scales.view(-1), always.out.view(-1, always.n)
            read, write = (read, slice(0, last - first)) if gemm.gated else (slice(0, last - first), write)
            arena = replace(arena, n=always.n, k=always.k)
        x = codes[read].double()
        if scheme.act_bits < 16:
            x = x * scales[read, None].double()
        sums = [x @ dequantize(arena.read(matrix, lane)).double().T for matrix in range(1 + gemm.gated)]
        y = apply_act(epilogue.act, sums[0], sums[1], {}) if gemm.gated else sums[0]
        to[write] = y.to(out.dtype)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Divide whatever fits, by the definition; gives the configs of its launches."""
    ran: list[Config] = []

    def run(*given: Any, **named: Any) -> None:  # noqa: ANN401
        ran.append(given[1])
        defined(*given, **named)

    monkeypatch.setattr(hopper, "run_hopper", run)
    monkeypatch.setattr(choose_ada, "_divides", lambda _device: True)
    monkeypatch.setattr(choose_ada, "arch_of", lambda _device: 90)
    return ran


def compiled(module: ModuleOp, weights: Weights) -> TritonExecutable:
    """Compile the one block."""
    made = TritonBackend("89").compile(module, weights)["mlp"]
    assert isinstance(made, TritonExecutable)
    return made


def block(schemes: Sequence[str], wide: int = WIDE, **more: Any) -> tuple[TritonExecutable, Any]:  # noqa: ANN401
    """Compile a block, and its definition."""
    module, weights = make(schemes, hidden=HIDDEN, wide=wide, narrow=NARROW, **more)
    return compiled(module, weights), EagerBackend().compile(module, weights)["mlp"]


def configs(made: TritonExecutable, tokens: int) -> tuple[Config, Config]:
    assert made.joint is not None
    return made.joint.configs(tokens, TOP_K)


@interpreted
@pytest.mark.parametrize(("schemes", "wide"), CASES, ids=str)
def test_rows_and_results_lie_where_the_launches_look(
    schemes: tuple[str, ...], wide: int, stand_in: list[Config]
) -> None:
    made, meant_by = block(schemes, wide)
    for tokens in (1, 17):
        assert made.joins(tokens)
        args = draw(tokens, seed=tokens, width=HIDDEN)
        both, each, meant = made.run_block(*args), apart(made, *args), apart(meant_by, *args)
        for name in joint.JOINED:
            assert far(both[name], each[name]) < 4e-3
            assert far(both[name], meant[name]) < 1.1 * far(each[name], meant[name]) + 4e-3
    assert all(map(reads_sorted, stand_in))
    assert sum(ALWAYS in dict(config.shapes) for config in stand_in) == 4


@interpreted
def test_banks_that_turn_and_nobody_routed(stand_in: list[Config]) -> None:
    made, _ = block(("w8a8_sym", "bf16"), turns=(16, 0))
    hidden, index, weights = draw(20, width=HIDDEN)
    for routing in (index, torch.full_like(index, EXPERTS)):
        both, each = made.run_block(hidden, routing, weights), apart(made, hidden, routing, weights)
        for name in joint.JOINED:
            assert far(both[name], each[name]) < 4e-3
    assert not both["routed"].any()
    assert stand_in


@interpreted
def test_more_kinds_of_operands_than_rings_run_one_bank_after_the_other(stand_in: list[Config]) -> None:
    made, _ = block(("bf16", "w8a8_sym", "w8a8_e4m3", "w4a8_g128_sym", "w4a8_g128_sym_iscale"))
    assert made.joins(joint.MOST_TOKENS)
    assert not made.joins(joint.MOST_TOKENS + 1)
    assert not any(map(reads_sorted, configs(made, 300)))
    # a scheme without a body, of either bank
    for schemes in (("w8a8_sym", "w4a16_g128_asym"), ("w4a16_g128_asym", "w8a8_sym")):
        assert not block(schemes)[0].joins(300)
    assert not stand_in


@interpreted
def test_the_kinds_that_routed_experts_have_leave_room_for_a_shared_one(stand_in: list[Config]) -> None:
    schemes = ("bf16", "w8a8_sym", "w8a8_e4m3", "w4a8_g128_sym", "w4a8_g128_sym_iscale")
    module, weights = make(schemes, hidden=HIDDEN, wide=288, narrow=NARROW)
    made = compiled(module, weights)
    assert made.joint is not None
    for one in (made.joint.entry, made.joint.down):
        schemes = (*one.gemm.schemes[:4], one.gemm.schemes[0], one.gemm.schemes[-1])
        gemm = replace(one.gemm, schemes=schemes)
        assert hopper.config_for(gemm) is not None
        assert len(hopper_runs.operands_of(gemm)) == hopper_runs.MOST_OPERANDS


@interpreted
def test_a_shared_expert_has_tiles_by_its_own_rows(stand_in: list[Config]) -> None:
    for name in ("w8a8_sym", "w4a8_g128_sym"):
        made, _ = block((name,))
        assert made.joint is not None
        lowest = hopper.HEIGHTS[:1]
        for tokens, heights in ((1, lowest), (16, lowest), (20, hopper.HEIGHTS), (300, None)):
            for matrices, config in zip((made.joint.entry, made.joint.down), configs(made, tokens), strict=True):
                scheme = matrices.gemm.schemes[-1]
                tall = hopper.HEIGHTS[2:] if body_of(scheme) == "dense" else hopper.HEIGHTS
                assert config.shapes[-1][0] == ALWAYS
                assert config.shape_of_always(scheme).heights == (heights or tall)
                assert parse_config(spell_config(config)) == config
        plain = replace(made.joint, chosen={})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choose_ada, "_divides", lambda _device: False)
            assert not any(map(reads_sorted, plain.configs(300, TOP_K)))
            assert plain.takes(joint.MOST_TOKENS, TOP_K)
            assert not plain.takes(300, TOP_K)
        assert not made.joint.takes(joint.MOST_ROWS, TOP_K)
    assert not stand_in


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("tokens", [1, 17, 64, 300, 2048])
@pytest.mark.parametrize(("schemes", "wide"), CASES, ids=str)
def test_joined_launches_equal_the_definition(schemes: tuple[str, ...], wide: int, tokens: int) -> None:
    made, meant_by = block(schemes, wide)
    assert made.joins(tokens)
    assert all(map(reads_sorted, configs(made, tokens)))
    args = draw(tokens, seed=tokens, width=HIDDEN)
    both, each = made.run_block(*args), apart(made, *args)
    meant = apart(meant_by, *(one.cpu() for one in args))
    for name in joint.JOINED:
        assert far(both[name], each[name]) < 4e-3, name
        assert far(both[name].cpu(), meant[name]) < 1.1 * far(each[name].cpu(), meant[name]) + 4e-3
        assert torch.equal(made.run_block(*args)[name], both[name]), "equal calls give equal bits"


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("heights", [(16, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("schemes", SETS[-2:], ids="+".join)
def test_tiles_of_all_heights_equal_the_definition(
    schemes: tuple[str, ...], heights: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "by_rule", lambda gemm, _rows: hopper.config_for(gemm, heights))
    made, _ = block(schemes)
    for tokens in (5, 150):
        assert made.joins(tokens)
        args = draw(tokens, seed=tokens, width=HIDDEN)
        both, each = made.run_block(*args), apart(made, *args)
        for name in joint.JOINED:
            assert far(both[name], each[name]) < 4e-3, f"{name} of {tokens} tokens"


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("tokens", [1, 64, 1500])
@pytest.mark.parametrize("schemes", SETS[3:6], ids="+".join)
def test_a_joined_graph_is_replayed_over_changing_routings(schemes: tuple[str, ...], tokens: int) -> None:
    made, _ = block(schemes)
    held = draw(tokens, seed=0, width=HIDDEN)
    made.run_block(*held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = made.run_block(*held)
    for seed in range(8):
        for place, tensor in zip(held, draw(tokens, seed=seed, width=HIDDEN), strict=True):
            place.copy_(tensor)
        if seed == 5:
            held[1].fill_(EXPERTS)
        graph.replay()
        found = {name: one.clone() for name, one in out.items()}
        again = made.run_block(*held)
        for name, one in found.items():
            assert torch.equal(one, again[name]), f"{name} of routing {seed}"
