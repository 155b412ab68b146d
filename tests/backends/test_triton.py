"""What the GPU backend can run, and what it says where it cannot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NoReturn

import pytest
import torch

from mxmoe.backends import triton as package
from mxmoe.backends.triton import TritonBackend
from mxmoe.backends.triton.mode import INTERPRET, choose_mode, has_triton
from mxmoe.errors import NoKernels, NotLowered, UnknownName, UnsupportedScheme, WrongCapability
from mxmoe.ir import BankShape, BlockShape, ModuleOp, Scheme
from mxmoe.target import TARGETS, Target
from mxmoe.testing import at_stage

SHAPE = BlockShape("mlp", 64, (BankShape("routed", 2, 1, 64, "relu", False, {"up": "up", "down": "down"}),))


class Untouched:
    """Weights that must not be read."""

    def __getitem__(self, name: str) -> NoReturn:
        pytest.fail(f"{name} was read")

    def quantized(self, name: str, expert: int, scheme: Scheme) -> NoReturn:
        pytest.fail(f"{name} was packed")


def module(*schemes: str, stage: str = "lowered") -> ModuleOp:
    return at_stage([SHAPE], stage, [Scheme.parse(one) for one in schemes])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("target", [t for t in TARGETS.values() if t.backend == "triton"], ids=lambda t: t.name)
def test_candidates_can_be_run(target: Target) -> None:
    backend = TritonBackend(**target.options)
    assert all(backend.supports(Scheme.parse(name)) for name in target.candidates)


@pytest.mark.parametrize(
    ("scheme", "ada", "hopper"),
    [
        ("w4a4_g128_sym", True, False),
        ("w8a8_sym", True, True),
        ("w8a8_e4m3", True, True),
        ("w4a8_g128_sym_e4m3", True, True),
        ("w3a16_g128_asym", True, True),
        ("bf16", True, True),
        ("w5a16_g128_sym", False, False),
        ("w4a16_g48_sym", False, False),
        ("w4a8_g64_sym", False, False),
        ("w8a8_g128_sym", False, False),
        ("w4a8_asym", False, False),
        ("w4a6_sym", False, False),
    ],
)
def test_supports_what_there_is_a_body_and_a_matrix_unit_for(scheme: str, ada: bool, hopper: bool) -> None:
    assert TritonBackend("89").supports(Scheme.parse(scheme)) is ada
    assert TritonBackend("90").supports(Scheme.parse(scheme)) is hopper


@pytest.mark.parametrize("capability", ["89", "90"])
def test_without_triton_the_way_out_is_named(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "has_triton", lambda: False)
    backend = TritonBackend(capability)
    with pytest.raises(NoKernels, match=r"no triton kernels.*eager, numba"):
        backend.ready()
    with pytest.raises(NoKernels):
        backend.compile(module("bf16"), Untouched())


@pytest.fixture
def a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with Triton and a GPU of the capability that the test names."""
    monkeypatch.setattr(package, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)


@pytest.mark.parametrize(
    ("a_gpu", "capability", "found", "runnable"),
    [
        ((8, 0), "89", r"8\.0", "eager, numba$"),
        ((8, 6), "90", r"8\.6", "eager, numba$"),
        ((8, 9), "90", r"8\.9", "eager, numba, triton-sm89$"),
    ],
    indirect=["a_gpu"],
)
@pytest.mark.usefixtures("a_gpu")
def test_an_older_gpu_is_told_what_it_can_run(capability: str, found: str, runnable: str) -> None:
    message = f"for compute capability {capability} and this GPU has {found}; .*{runnable}"
    with pytest.raises(WrongCapability, match=message):
        TritonBackend(capability).compile(module("bf16"), Untouched())


@pytest.mark.parametrize(("a_gpu", "capability"), [((8, 9), "89"), ((9, 0), "89"), ((9, 0), "90")], indirect=["a_gpu"])
@pytest.mark.usefixtures("a_gpu")
def test_a_gpu_runs_its_own_capability_and_lower_ones(capability: str) -> None:
    TritonBackend(capability).ready()


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_nothing_is_read_before_every_scheme_was_checked() -> None:
    message = r"triton-sm90 cannot run w4a4_sym, which mlp chose for expert 0 of up; it runs none of these"
    with pytest.raises(UnsupportedScheme, match=message):
        TritonBackend("90").compile(module("w4a4_sym"), Untouched())


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("stage", ["lifted", "annotated", "allocated"])
def test_a_block_with_linears_is_not_run(stage: str) -> None:
    with pytest.raises(NotLowered, match="lower-to-group-gemm"):
        TritonBackend().compile(module("bf16", stage=stage), Untouched())


def test_unknown_capability() -> None:
    with pytest.raises(UnknownName, match="compute capability named '75'"):
        TritonBackend("75")


@pytest.fixture
def loaded() -> Iterator[dict[str, object]]:
    """What is loaded of Triton; put back behind the test."""
    before = {name: part for name, part in sys.modules.items() if name.split(".")[0] == "triton"}
    yield before
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        del sys.modules[name]
    sys.modules.update(before)  # pyright: ignore[reportCallIssue, reportArgumentType]


@pytest.mark.skipif(not has_triton() or torch.cuda.is_available(), reason="without a GPU, with Triton")
def test_triton_is_loaded_anew_to_interpret(loaded: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.delenv(INTERPRET)
    choose_mode()
    assert "triton" not in sys.modules
    assert all(name.startswith("triton._C") for name in sys.modules if name.split(".")[0] == "triton")
    import triton as anew

    assert anew is not triton
    assert anew.knobs.runtime.interpret
    choose_mode()  # once is enough
    assert sys.modules["triton"] is anew
    assert loaded.keys()
