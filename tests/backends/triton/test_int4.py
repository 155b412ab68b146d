"""The INT4 launch: its machine code, and its program executed step by step in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

# before anything of ours, which would have kernels interpreted where there is no GPU: most of this file compiles
pytest.importorskip("triton")

import triton  # noqa: F401

from mxmoe.backends.triton import int4, kernels_int4
from mxmoe.backends.triton.ahead import compile_all
from mxmoe.backends.triton.binaries import int4_request
from mxmoe.backends.triton.cubin import LARGEST_PROGRAM_BYTES, occupancy
from mxmoe.backends.triton.int4 import Int4Bands, int4_group_gemm, int4_group_gemm_torch
from mxmoe.backends.triton.int4_pack import pack_int4, pack_rows_torch, quantize_rows_torch
from mxmoe.errors import BadInt4
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, matmul

from .gluon_in_torch import both_products, run_in_torch
from .int4_cases import CASES, CHANNEL, GROUPED, NAMES, expected, scenario, weight

BOTH = pytest.mark.parametrize("scheme", [GROUPED, CHANNEL], ids=str)
ON_ADA: dict[str, Any] = {"arch": 89, "gather": True}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_product_of_fragments_is_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-8, 8, (16, 128), dtype=torch.int8, generator=generator)
    right = torch.randint(-8, 8, (8, 128), dtype=torch.int8, generator=generator)
    codes = (left + 8).to(torch.uint8)
    packed = pack_int4([Quantized(CHANNEL, codes, torch.ones((16, 1)))])
    a0, a1 = (packed.words[0, :, 0, half].view(1, 1, 8, 4, 2, 2) for half in (0, 1))
    b = pack_rows_torch(right).view(1, 1, 8, 4, 2, 2)
    found = both_products(a0, a1, b)[0, 0].permute(2, 0, 1, 3).reshape(16, 8)
    assert torch.equal(found, left.long() @ right.long().T)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}x{case[2]}")
def test_the_program_computes_what_is_defined(case: tuple[Any, ...]) -> None:
    positional, named = scenario(**dict(zip(NAMES, case, strict=True)))
    run_in_torch(*positional, **named)
    wanted = expected(positional, named)
    assert torch.equal(positional[4], wanted)
    assert (wanted == -7.0).any(), "rows of other experts stay as they were"


@BOTH
def test_the_twin_is_the_definition_of_a_linear(scheme: Scheme) -> None:
    positional, named = scenario(
        scheme, n=48, k=300, counts=(0, 20, 0, 0), heights=(16,), gather=False, act=False, bias=False
    )
    x = torch.randn((20, 300), generator=torch.Generator().manual_seed(1))
    words, scale = quantize_rows_torch(x, scheme)
    out = torch.zeros((20, 48))
    int4_group_gemm_torch(words, scale, *positional[2:4], out, **named)
    assert torch.equal(out, matmul(x, weight(48, 300, scheme)))


def test_what_cannot_be_launched() -> None:
    positional, named = scenario(**dict(zip(NAMES, CASES[0], strict=True)))
    x, x_scale, packed, bands, out = positional
    for wrong, reason in (
        ((x.long(), x_scale, packed, bands, out), "x is torch.int64"),
        ((x, x_scale[:, :1], packed, bands, out), r"x_scale is .* not contiguous"),
        ((x, x_scale[:5], packed, bands, out), "64 rows and x_scale 5"),
        ((x, x_scale, packed, bands, out[:, :8]), "out is"),
    ):
        with pytest.raises(BadInt4, match=reason):
            int4_group_gemm(*wrong, **named)
    low = Int4Bands(((0, 8),), *(getattr(bands, name) for name in Int4Bands.__slots__[1:]))
    with pytest.raises(BadInt4, match="heights are 16, 32, 64, 128"):
        int4_group_gemm(x, x_scale, packed, low, out, **named)


@BOTH
@pytest.mark.parametrize(("heights", "resident"), [((64, 32, 16), 2), ((128, 64, 32, 16), 1), ((16,), 3)])
def test_machine_code_of_ada(scheme: Scheme, heights: Sequence[int], resident: int) -> None:
    """Eight warps at work on a multiprocessor, native products, nothing spilled."""
    for binary in compile_all(
        [int4_request(scheme, heights, **ON_ADA, is_gated=one, has_bias=one) for one in (False, True)]
    ):
        facts = binary.facts()
        products = sum(int4.WIDTH // 16 * height // 8 * 2 // binary.num_warps for height in heights)
        assert facts.count("IMMA.16864.S4.S4") == products
        assert facts.spill_loads == facts.spill_stores == facts.stack_bytes == 0
        assert facts.shared_bytes <= LARGEST_PROGRAM_BYTES[89]
        assert facts.count("LDGSTS.E.BYPASS.128") > 0
        assert occupancy(facts, binary.num_warps) >= resident


def test_hopper_emulates_with_eight_bits() -> None:
    facts = compile_all([int4_request(GROUPED, (16,), arch=90, gather=True, is_gated=False)])[0].facts()
    assert facts.arch == 90
    assert facts.count("IMMA.16864") == 0
    assert facts.count("IMMA.16832.S8.S8") > 0
    assert facts.count("CALL") > 0


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}x{case[2]}")
def test_on_the_device(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Exact but for float32, where a product and a sum may be contracted, and for the last bit of an exponential."""
    positional, named = scenario(**dict(zip(NAMES, case, strict=True)), device="cuda", dtype=dtype)
    int4_group_gemm(*positional, **named)
    wanted = expected(positional, named)
    if named["options"].act is None and dtype != torch.float32:
        assert torch.equal(positional[4], wanted)
    else:
        torch.testing.assert_close(positional[4], wanted)


def test_one_binary_serves_every_call() -> None:
    """A number that is 1 is not made a constant, as Triton does by itself."""
    fixed = {param.name for param in kernels_int4.int4_kernel.params if param.do_not_specialize}
    assert fixed == {"steps", "top_k", "tokens"}
