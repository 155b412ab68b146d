"""Blocks whose w4a4 experts have launches of their own: on a GPU as on sm_89, and anywhere with their twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

import mxmoe.backends.triton.mode as mode
from mxmoe.backends.triton.int4_pack import runs_on_int4
from mxmoe.backends.triton.tiles import Gemm
from mxmoe.ir import Scheme
from mxmoe.quant import pack

from .child import run_in_child
from .small_blocks import DEVICE, Pair, Small

HAS_GPU = torch.cuda.is_available()
ADA = "sm89"
G128, CHANNEL = Scheme.parse("w4a4_g128_sym"), Scheme.parse("w4a4_sym")
W8A8, W4A16 = Scheme.parse("w8a8_sym"), Scheme.parse("w4a16_g128_asym")
SMALLS = {
    "all g128": Small((G128,), 136, 192),
    "all per channel": Small((CHANNEL,), 128, 80, act="gelu"),
    "mixed": Small((G128, W8A8, CHANNEL, W4A16), 136, 144, 8, 3, has_bias=True),
    "rotated": Small((G128, CHANNEL), 128, 192, turn=32),
    "rotated by what no kernel does": Small((CHANNEL, W8A8), 128, 192, turn=24),
    "gate and up apart": Small((CHANNEL, W8A8), 128, 208, is_tied=False, has_bias=True),
    "clamped, fp16": Small((CHANNEL, G128), 96, 264 - 8, act="swiglu_oai", dtype="fp16"),
    "fp32": Small((G128, W8A8), 128, 128, dtype="fp32"),
}
"""Blocks with experts that INT4 units run."""

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows of padding hold anything


def native_in(pair: Pair) -> list[Any]:
    """Launches on INT4 units of every GEMM of a block."""
    executable: Any = pair.triton["mlp"]
    return [experts for one in executable.banks["routed"].gemms for experts in one.int4]


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Callable[[Small], Pair]:
    """Compile a block as for INT4 units, with the twin in place of the launch."""
    mode.choose_mode()
    from mxmoe.backends.triton import backend, int4, native

    def compiled(small: Small) -> Pair:
        with monkeypatch.context() as patch:
            patch.setattr(backend, "has_int4_units", lambda device: True)
            return Pair.of(small)

    monkeypatch.setattr(native, "int4_group_gemm", int4.int4_group_gemm_torch)
    return compiled


@pytest.mark.skipif(HAS_GPU, reason="compiles too much; on a GPU the launch itself runs")
@pytest.mark.parametrize("name", SMALLS)
def test_the_twin_within_a_block_equals_widened_codes(name: str, twin: Callable[[Small], Pair]) -> None:
    """Both sum the same whole numbers and scale them alike: only the last bit of an exponential may differ."""
    small = SMALLS[name]
    native, widened = twin(small), Pair.of(small)
    wanted = {scheme for scheme in small.schemes if runs_on_int4(scheme)}
    assert {experts.weights.scheme for experts in native_in(native)} == wanted
    assert not native_in(widened)
    for tokens in (0, 1, 5):
        hidden, routed = small.tokens(tokens, 1), small.routing(tokens, 2)
        index = routed.index.clone()
        index[::3, 0] = small.experts  # padding
        found, other = (one.triton["mlp"]("routed", hidden, index, routed.weights) for one in (native, widened))
        if small.dtype == "fp32":
            torch.testing.assert_close(found, other)
        else:
            assert torch.equal(found, other)


@pytest.mark.skipif(HAS_GPU, reason="as above")
@pytest.mark.parametrize("name", SMALLS)
def test_the_twin_within_a_block_equals_the_definition(name: str, twin: Callable[[Small], Pair]) -> None:
    small = SMALLS[name]
    twin(small).check(small.tokens(5, 1), small.routing(5, 2), is_traced=True)


@pytest.mark.skipif(HAS_GPU, reason="as above")
def test_weights_come_back_and_lie_there_once(twin: Callable[[Small], Pair]) -> None:
    small = SMALLS["mixed"]
    pair = twin(small)
    held: Any = pair.triton["mlp"]
    for role in ("gate", "up", "down"):
        for expert in range(small.experts):
            scheme = small.schemes[(expert + (role == "down")) % len(small.schemes)]
            wanted = pack(pair.weights.quantized(f"mlp.{role}", expert, scheme))
            found = held.packed(f"mlp.{role}", expert)
            assert (found.scheme, found.n, found.k) == (scheme, wanted.n, wanted.k)
            assert torch.equal(found.payload, wanted.payload)
            assert wanted.scale is not None
            assert torch.equal(found.scale, wanted.scale)
    large = Small((G128,), 256, 512)
    codes = 4 * 3 * 256 * 512 // 2
    assert codes * (1 + 2 * 2 / 128) <= twin(large).triton["mlp"].nbytes <= 1.01 * codes * (1 + 2 * 2 / 128)


def test_which_schemes_leave_the_common_launch() -> None:
    mode.choose_mode()
    from mxmoe.backends.triton.native import native_schemes

    schemes = (G128, W8A8, CHANNEL, W4A16)
    assert set(native_schemes(Gemm(64, 128, schemes, gated=True), "silu")) == {G128, CHANNEL}
    assert native_schemes(Gemm(64, 128, (G128,)), "none") == (G128,)
    assert native_schemes(Gemm(72, 128, (G128,), gated=True), "silu") == (), "gate and up go in sixteens"
    assert native_schemes(Gemm(64, 128, (G128,)), "relu") == (), "a lone up has its nonlinearity in the common launch"
    assert native_schemes(Gemm(64, 128, (G128, G128), True, always=(128, 128)), "silu") == ()


on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.skipif(knobs.runtime.override_arch != ADA, reason="run by test_int4_within_blocks_as_on_ada")
@pytest.mark.parametrize("name", SMALLS)
@pytest.mark.parametrize("tokens", [3, 40, 700])
def test_ada_int4_within_a_block(name: str, tokens: int) -> None:
    """The INT4 launch, emulated where the GPU is newer, against the eager definition."""
    small = SMALLS[name]
    pair = Pair.of(small)
    assert native_in(pair)
    routed = small.routing(tokens, 2)
    pair.check(small.tokens(tokens, 1), routed)
    if tokens == 40:
        pair.check(small.tokens(tokens, 1), routed, is_traced=True)


@pytest.mark.gpu
@on_gpu
@pytest.mark.skipif(knobs.runtime.override_arch != ADA, reason="as above")
def test_ada_int4_in_a_graph() -> None:
    """A captured call is replayed over another routing."""
    small = SMALLS["mixed"]
    pair = Pair.of(small)
    run = pair.triton["mlp"]
    hidden, (first, second) = small.tokens(40, 1).to(DEVICE), (small.routing(40, seed) for seed in (2, 3))
    index, weights = first.index.to(DEVICE), first.weights.to(DEVICE)
    wanted = run("routed", hidden, second.index.to(DEVICE), second.weights.to(DEVICE))
    run("routed", hidden, index, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run("routed", hidden, index, weights)
    index.copy_(second.index)
    weights.copy_(second.weights)
    graph.replay()
    assert torch.equal(out, wanted)


@pytest.mark.gpu
@on_gpu
@pytest.mark.skipif(knobs.runtime.override_arch == ADA, reason="is run by itself")
def test_int4_within_blocks_as_on_ada() -> None:
    """By Triton's own variable, in a process of its own: no kernel that this one has compiled is taken for another."""
    assert run_in_child(__file__, "ada_int4", TRITON_OVERRIDE_ARCH=ADA).count("PASSED") == 3 * len(SMALLS) + 1
