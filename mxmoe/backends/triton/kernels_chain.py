"""
Launches that follow each other: on sm_90 one may begin while the one before it ends, and waits before it reads.

It begins once every program of the one before has said so or is done. What it needs of the machine until then is taken
from the one before, and where its programs are put depends on which SMs are free: small launches say so at once; the
divided group GEMM when its loads are under way, and not at all where it leaves SMs idle and another GEMM follows, whose
programs would be put beside each other (1 token of Qwen1.5-MoE's gate and up in bf16: 18.0 us instead of 15.6); the
other group GEMM never (its programs are many, and Mixtral's gate and up in w4a8 at 1 token took 37 us instead of 32).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from mxmoe.backends.triton import mode

HOPPER_PTX = tl.constexpr(mode.HOPPER_PTX)


@triton.jit
def wait(PTX: tl.constexpr) -> None:
    """
    Wait until launches before have written what they write: what they wrote may be read after this only.

    A launch begins early if it is told so (`mode.overlap`); where PTX is not that of sm_90, launches follow each other
    anyway.
    """
    if PTX == HOPPER_PTX:
        cuda.gdc_wait()


@triton.jit
def wait_and_lead(PTX: tl.constexpr) -> None:
    """As `wait`, and let the next launch begin, whose programs wait in turn."""
    wait(PTX)
    if PTX == HOPPER_PTX:
        cuda.gdc_launch_dependents()
