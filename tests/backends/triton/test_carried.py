"""What a call launches on a GPU that is not here: rehearsed and compiled in a process of its own, and kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mxmoe.backends.triton.carried import Job, Kernel, compile_calls, install
from mxmoe.backends.triton.cubin import LARGEST_PROGRAM_BYTES
from mxmoe.errors import AheadFailed, BrokenCheckpoint
from mxmoe.ir import BankShape, BlockShape, Scheme, print_ir
from mxmoe.testing import at_stage

from .small_blocks import DEVICE, Pair, Small

ADA = 89
SMALL = {"routed": (4, 2, 128, False), "shared": (1, 1, 256, False)}
"""Bank -> experts, choices, width, whether there are biases."""


def job(*schemes: str, banks: tuple[str, ...] = ("routed",), tokens: tuple[int, ...] = (16,), act: str = "silu") -> Job:
    found = tuple(
        BankShape(name, *SMALL[name][:3], act, act == "silu", {role: f"{name}.{role}" for role in roles(act)})
        for name in banks
    )
    module = at_stage([BlockShape("mlp", 256, found)], "lowered", [Scheme.parse(scheme) for scheme in schemes])
    return Job(print_ir(module, elide=None), tokens, ADA)


def roles(act: str) -> tuple[str, ...]:
    return ("gate", "up", "down") if act == "silu" else ("up", "down")


def stems(kernels: Mapping[str, Kernel]) -> set[str]:
    return {name.partition(".")[0] for name in kernels}


def mix() -> Job:
    """Two schemes in either GEMM."""
    small = Small((Scheme.parse("w8a8_sym"), Scheme.parse("w4a4_g128_sym")), 256, 128)
    return Job(print_ir(small.module(), elide=None), (16, 600), ADA)


@pytest.fixture(scope="module")
def mixed() -> Mapping[str, Kernel]:
    return compile_calls(mix(), quiet=True)


def test_everything_that_a_call_launches_is_there(mixed: Mapping[str, Kernel]) -> None:
    few, many = (
        {name for name, one in mixed.items() if f"mlp with {tokens} tokens" in one.calls} for tokens in (16, 600)
    )
    assert stems({name: mixed[name] for name in few}) == {
        *("begin", "prepare_rows", "group_gemm", "_quantize_kernel", "int4_kernel", "combine")
    }
    gemms = [sum(name.startswith(stem) for name in few) for stem in ("group_gemm", "int4_kernel")]
    assert gemms == [2, 2], "gate and up together, and down"
    assert few & many, "what serves both is compiled once"
    assert few | many == set(mixed)
    assert "few_kernel.0" in many - few, "beyond some tokens a schedule has a launch of its own"


def test_machine_code_is_that_of_ada(mixed: Mapping[str, Kernel]) -> None:
    for name, kernel in mixed.items():
        facts = kernel.facts()
        assert (kernel.arch, facts.arch) == (ADA, ADA)
        assert facts.spill_loads == facts.spill_stores == 0
        assert facts.shared_bytes <= LARGEST_PROGRAM_BYTES[ADA]
        assert "griddepcontrol" not in kernel.ptx
        assert not kernel.metadata["launch_pdl"]
        assert (facts.count("IMMA.16864.S4.S4") > 0) == name.startswith("int4_kernel")
        assert (facts.count("IMMA.16832.S8.S8") > 0) == name.startswith("group_gemm")


def test_experts_of_int4_units_alone_leave_no_common_launch() -> None:
    kernels = compile_calls(job("w4a4_g128_sym"), quiet=True)
    assert stems(kernels) == {"few_kernel", "_quantize_kernel", "int4_kernel", "combine"}


def test_banks_that_run_together_have_launches_in_common() -> None:
    together = compile_calls(job("w8a8_sym", banks=("routed", "shared")), quiet=True)
    assert {"prepare_both", "combine_both"} <= stems(together)
    assert sum(name.startswith("group_gemm") for name in together) == 2
    apart = compile_calls(job("w4a4_sym", banks=("routed", "shared")), quiet=True)
    assert not {"prepare_both", "combine_both"} & stems(apart), "INT4 units have no body in the common launch"


def test_a_lone_up_stays_in_the_common_launch() -> None:
    kernels = compile_calls(job("w4a4_g128_sym", act="relu"), quiet=True)
    assert {"group_gemm", "int4_kernel"} <= stems(kernels)


def test_kernels_are_written_and_read(mixed: Mapping[str, Kernel]) -> None:
    for kernel in mixed.values():
        assert Kernel.from_bytes(kernel.to_bytes()) == kernel


@pytest.mark.parametrize("data", [b"", b"{}\n", b"[1]\n", b'{"calls": [], "size": 1}\n'])
def test_bytes_that_are_no_kernel(data: bytes) -> None:
    with pytest.raises(BrokenCheckpoint, match="a kernel is broken"):
        Kernel.from_bytes(data)


def test_calls_find_what_was_installed(
    mixed: Mapping[str, Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty cache: the same calls add nothing to it, and get the bytes that were put there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    marked = {name: replace(kernel, ptx=f"// {name}\n{kernel.ptx}") for name, kernel in mixed.items()}
    install(list(marked.values()))
    before = sorted(tmp_path.rglob("*"))
    assert len([path for path in before if path.suffix == ".cubin"]) == len(mixed)
    again = compile_calls(mix(), quiet=True)
    assert again == marked
    assert sorted(tmp_path.rglob("*")) == before


def test_what_does_not_compile_is_said() -> None:
    with pytest.raises(AheadFailed, match=r"does not compile for sm_89: [\s\S]*BadText"):
        compile_calls(Job("no module", (1,), ADA), quiet=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_calls_on_a_gpu_find_what_was_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsed for the GPU that is here, put into an empty cache: nothing is left to compile for the same calls."""
    from triton import knobs

    from mxmoe.backends.triton import kernels, kernels_hopper, kernels_schedule, prepare

    major, minor = torch.cuda.get_device_capability()
    small = Small((Scheme.parse("w8a8_sym"), Scheme.parse("w4a8_g128_sym")), 256, 128)
    pair, tokens = Pair.of(small), (16, 600)
    rehearsed = compile_calls(Job(print_ir(pair.module, elide=None), tokens, 10 * major + minor), quiet=True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    install(list(rehearsed.values()))
    for kernel in (
        one for module in (kernels, kernels_hopper, kernels_schedule, prepare) for one in vars(module).values()
    ):
        if hasattr(kernel, "device_caches"):
            monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    found: dict[str, bool] = {}
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda **named: found.update({named["metadata"]["hash"]: named["cache_hit"]})
    )
    for count in tokens:
        routed = small.routing(count, 2)
        index, weights = routed.index.to(DEVICE), routed.weights.to(DEVICE, torch.bfloat16)
        pair.triton["mlp"]("routed", small.tokens(count, 1).to(DEVICE), index, weights)
    assert found == {kernel.key: True for kernel in rehearsed.values()}
