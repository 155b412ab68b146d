"""What an RTX 4090 would run (mma.sync, cp.async), run by a newer GPU: its compiler is told to decide as for sm_89."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton import knobs

from mxmoe.backends.triton import TritonBackend
from mxmoe.backends.triton.ahead import code_path_option
from mxmoe.backends.triton.cubin import CubinFacts, read_cubin
from mxmoe.ir import BankShape, BlockShape, Scheme
from mxmoe.quant import Weights
from mxmoe.testing import Routed, assert_backends_agree, at_stage, random_weights

from .child import run_in_child
from .small_blocks import Compiled

HAS_GPU = torch.cuda.is_available()
ADA = "sm89"
WARP_GROUPS = ("HGMMA", "IGMMA", "QGMMA", "UTMALDG")
SCHEMES = ("bf16", "w2a16_g128_asym", "w3a16_g128_asym", "w4a16_g128_asym", "w4a4_g128_sym", "w4a8_g128_sym",
           "w4a8_sym", "w8a8_sym", "w8a8_e4m3", "w4a8_g128_sym_e4m3", "w8a16_sym")  # fmt: skip
NAMES = {"gate": "gate", "up": "up", "down": "down"}
SHAPE = BlockShape("block", 256, (BankShape("routed", 5, 2, 384, "silu", True, NAMES),))

on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
as_ada = pytest.mark.skipif(knobs.runtime.override_arch != ADA, reason="run by test_experts_on_the_code_path_of_ada")


@triton.jit
def multiply(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, depth: tl.tensor,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SUM: tl.constexpr,
) -> None:  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), SUM)
    for start in range(0, depth, K):
        left = tl.load(a + m[:, None] * depth + k[None, :] + start)
        right = tl.load(b + n[None, :] * depth + k[:, None] + start)
        total = tl.dot(left, right, total, out_dtype=SUM)
    tl.store(c + m[:, None] * N + n[None, :], total)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("dtype", "total", "opcode"),
    [
        (torch.int8, tl.int32, "IMMA.16832.S8.S8"),
        (torch.bfloat16, tl.float32, "HMMA.16816.F32.BF16"),
        (torch.float8_e4m3fn, tl.float32, "HMMA.16816.F32"),
    ],
    ids=str,
)
def test_one_product(dtype: torch.dtype, total: tl.dtype, opcode: str) -> None:
    """Whole numbers of magnitude 8 at most, so that every sum is exact in every type."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    a, b = (torch.randint(-8, 9, shape, device="cuda", generator=generator) for shape in ((64, 256), (128, 256)))
    c = torch.empty((64, 128), dtype=torch.int32 if total == tl.int32 else torch.float32, device="cuda")
    built = multiply[(1,)](
        a.to(dtype), b.to(dtype), c, 256, 64, 128, 64, total, num_warps=4, **code_path_option(89)
    )  # fmt: skip
    assert torch.equal(c.double(), a.double() @ b.double().T)
    facts = read_cubin(built.asm["cubin"])
    assert facts.count(opcode) > 0
    assert not any(facts.count(stem) for stem in WARP_GROUPS)


def facts_of_launches() -> Iterator[CubinFacts]:
    """Machine code of every group GEMM that this process has compiled."""
    from mxmoe.backends.triton.kernels import group_gemm
    from mxmoe.backends.triton.kernels_int4 import int4_kernel

    for compiled, *_ in (*group_gemm.device_caches.values(), *int4_kernel.device_caches.values()):
        yield from (read_cubin(kernel.asm["cubin"]) for kernel in compiled.values())


@pytest.mark.gpu
@on_gpu
@as_ada
@pytest.mark.parametrize("names", [*((name,) for name in SCHEMES), SCHEMES], ids=lambda names: "+".join(names[:2]))
@pytest.mark.parametrize("tokens", [3, 70, 600])
def test_ada_experts_agree_with_the_definition(names: tuple[str, ...], tokens: int) -> None:
    """
    Of float32 tokens everything that is made on the way; of bf16 ones, whose down reads bf16, what comes out.

    The definition keeps float32 before down, and rounding there moves many integer codes by one.
    """
    weights = random_weights([SHAPE])
    held = Weights({name: weights[name].cuda() for name in NAMES})
    module = at_stage([SHAPE], "lowered", [Scheme.parse(name) for name in names])
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn((tokens, 256), generator=generator).cuda()
    index = torch.rand((tokens, 5), generator=generator).argsort(-1)[:, :2].contiguous().cuda()
    routed = Routed(index, torch.rand((tokens, 2), generator=generator).cuda())
    agree = partial(assert_backends_agree, module, held, routings={"routed": routed})
    backend = TritonBackend("89")
    agree(hidden, backends=("eager", backend))
    untraced = Compiled("triton", {name: partial(one) for name, one in backend.compile(module, held).items()})
    agree(hidden.bfloat16(), backends=("eager", untraced))
    found = list(facts_of_launches())
    assert found
    assert not any(facts.count(stem) for facts in found for stem in WARP_GROUPS)
    assert any(facts.count("HMMA") + facts.count("IMMA") for facts in found)


@pytest.mark.gpu
@on_gpu
@pytest.mark.skipif(knobs.runtime.override_arch == ADA, reason="is run by itself")
def test_experts_on_the_code_path_of_ada() -> None:
    """By Triton's own variable, in a process of its own: no kernel that this one has compiled is taken for another."""
    said = run_in_child(__file__, "ada_experts", workers=8, TRITON_OVERRIDE_ARCH=ADA)
    assert said.count("PASSED") == 3 * (len(SCHEMES) + 1)
