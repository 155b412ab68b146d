"""The kernels on a GPU: every scheme against the definition, graphs, torch.compile, equal bits, a memory checker."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.backends.triton import TritonBackend
from mxmoe.errors import UnsupportedScheme, WrongCapability, WrongDevice
from mxmoe.ir import Scheme
from mxmoe.testing import Routed, routings

from .sanitize import CASES
from .small_blocks import KERNEL_SCHEMES, Pair, Small, mixes, smalls

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BLOCKS = smalls(mixes(4))
# rows of a mean expert: tiles are chosen by them
ROWS = (40, 250, 700)
FEW_TOKENS = 3
MIXED = Small(tuple(map(Scheme.parse, ("w4a8_g128_sym", "w8a8_sym", "bf16", "w4a16_g128_asym"))), 256, 384, 8, 2)


# the tests of a block run in one process: its kernels are compiled once
def _one_process(number: int) -> object:
    return pytest.param(number, marks=pytest.mark.xdist_group(f"block{number}"), id=f"{number}-{BLOCKS[number]}")


each_block = pytest.mark.parametrize("number", [_one_process(number) for number in range(len(BLOCKS))])


@cache
def pair_of(number: int) -> Pair:
    return Pair.of(BLOCKS[number])


def token_counts(number: int) -> tuple[int, int]:
    small = BLOCKS[number]
    return FEW_TOKENS, ROWS[number % len(ROWS)] * small.experts // small.top_k


def test_every_scheme_is_among_the_blocks() -> None:
    assert {scheme for small in BLOCKS for scheme in small.schemes} == set(KERNEL_SCHEMES)
    assert len(KERNEL_SCHEMES) == 75


@each_block
@settings(max_examples=28, deadline=None)
@given(data=st.data())
def test_equals_the_definition(number: int, data: st.DataObject) -> None:
    pair = pair_of(number)
    tokens = data.draw(st.sampled_from((0, *token_counts(number))))
    routed = data.draw(routings(pair.small.experts, pair.small.top_k, tokens))
    if data.draw(st.booleans()):
        routed = Routed(routed.index.int(), routed.weights.to(torch.bfloat16), routed.kind)
    pair.check(pair.small.tokens(tokens, data.draw(st.integers(0, 999))), routed)


@each_block
def test_every_expert_and_role_equals_the_definition(number: int) -> None:
    pair = pair_of(number)
    tokens = token_counts(number)[1]
    pair.check(pair.small.tokens(tokens, 1), pair.small.routing(tokens, 2), is_traced=True)


@each_block
def test_equal_calls_give_equal_bits(number: int) -> None:
    pair = pair_of(number)
    tokens = token_counts(number)[1]
    routed = pair.small.routing(tokens, 5)
    args = tuple(tensor.cuda() for tensor in (pair.small.tokens(tokens, 4), routed.index, routed.weights))
    first = pair.triton["mlp"]("routed", *args)
    for _ in range(3):
        assert torch.equal(pair.triton["mlp"]("routed", *args), first)


@pytest.mark.parametrize("turn", [2, 8, 16, 128, 24, 384])
def test_rotations_of_every_size(turn: int) -> None:
    scheme = tuple(map(Scheme.parse, ("w4a4_g128_sym", "bf16")))
    pair = Pair.of(Small(scheme, 128, 384, turn=turn))
    pair.check(pair.small.tokens(20, 0), pair.small.routing(20, 1), is_traced=True)


@pytest.mark.parametrize("tokens", [1, 16, 100, 1500])
def test_a_graph_is_replayed_over_changing_routings(tokens: int) -> None:
    pair = Pair.of(MIXED)
    run = pair.triton["mlp"]
    held = [tensor.cuda() for tensor in (MIXED.tokens(tokens, 0), *_tensors(MIXED.routing(tokens, 0)))]
    run("routed", *held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run("routed", *held)
    for seed in range(12):
        routed = MIXED.routing(tokens, seed)
        index = routed.index
        if seed % 3 == 1:  # all to one expert, the other choices padding
            index = torch.full_like(index, MIXED.experts)
            index[:, 0] = seed % MIXED.experts
        elif seed % 3 == 2:
            index = index.where(torch.rand(index.shape, generator=torch.Generator().manual_seed(seed)) < 0.5, 8)
        for place, tensor in zip(held, (MIXED.tokens(tokens, seed), index, routed.weights), strict=True):
            place.copy_(tensor)
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, run("routed", *held)), f"routing {seed}"
        assert replayed.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 16, 100, 600])
@pytest.mark.parametrize("names", ["bf16", "w8a8_sym+w4a8_g128_sym", "w4a16_g128_asym+w8a8_e4m3"])
def test_launches_that_overlap_equal_launches_one_by_one(names: str, tokens: int) -> None:
    """Calls in a row use each other's memory again: a launch that began too early would read or overwrite it."""
    small = Small(tuple(map(Scheme.parse, names.split("+"))), 256, 384, 8, 2)
    run = Pair.of(small).triton["mlp"]
    drawn = [(small.tokens(tokens, seed), *_tensors(small.routing(tokens, seed))) for seed in range(12)]
    calls = [[tensor.cuda() for tensor in one] for one in drawn]
    wanted: list[torch.Tensor] = []
    for call in calls:
        wanted.append(run("routed", *call).clone())
        torch.cuda.synchronize()
    assert any(not torch.equal(wanted[0], other) for other in wanted[1:]), "calls that cannot be told apart"
    in_a_row = [run("routed", *call) for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [run("routed", *call) for call in calls]
    for _ in range(20):
        graph.replay()
    for made in (in_a_row, captured):
        assert all(map(torch.equal, made, wanted))


@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_torch_compile_sees_one_graph() -> None:
    run = Pair.of(MIXED).triton["mlp"]

    def block(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden + run.op("routed", hidden * 2, index, weights.softmax(-1))  # pyright: ignore

    compiled = torch.compile(block, fullgraph=True)
    for seed in range(3):
        args = [tensor.cuda() for tensor in (MIXED.tokens(40, seed), *_tensors(MIXED.routing(40, seed)))]
        wanted = block(*args)
        # inductor may keep the softmax in float32 where torch rounds it
        assert (compiled(*args) - wanted).norm() <= 2**-7 * wanted.norm()


def test_more_rows_than_are_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxmoe.backends.triton import executable

    pair = Pair.of(MIXED)
    args = [tensor.cuda() for tensor in (MIXED.tokens(40, 7), *_tensors(MIXED.routing(40, 7)))]
    whole = pair.triton["mlp"]("routed", *args)
    monkeypatch.setattr(executable, "MAX_ROWS", 48)
    turns = pair.triton["mlp"]("routed", *args)
    assert (turns.float() - whole.float()).norm() <= 2**-6 * whole.float().norm()


def test_a_capability_that_the_gpu_lacks_is_refused_before_anything_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = MIXED.module()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(WrongCapability, match=r"89 and this GPU has 8\.0; here run eager, numba"):
        TritonBackend("89").compile(module, {})  # pyright: ignore[reportArgumentType]


def test_a_scheme_that_hopper_lacks_is_refused_before_anything_is_packed() -> None:
    module = Small((Scheme.parse("w4a4_sym"), Scheme.parse("bf16"))).module()
    with pytest.raises(UnsupportedScheme, match=r"cannot run w4a4_sym, which mlp chose for expert 0.*it runs bf16"):
        TritonBackend("90").compile(module, {})  # pyright: ignore[reportArgumentType]


def test_tokens_elsewhere_are_refused() -> None:
    pair = Pair.of(MIXED)
    with pytest.raises(WrongDevice, match=r"cuda.*cpu"):
        pair.triton["mlp"]("routed", MIXED.tokens(2, 0), *_tensors(MIXED.routing(2, 0)))


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("name", CASES)
def test_no_body_reads_or_writes_out_of_bounds(name: str) -> None:
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    script = Path(__file__).parent / "sanitize.py"
    done = subprocess.run([*tool, sys.executable, str(script), name], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout


def _tensors(routed: Routed) -> tuple[torch.Tensor, torch.Tensor]:
    return routed.index, routed.weights
