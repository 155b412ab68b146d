"""The seat: what can be planned, and that nothing pretends to run."""

import pytest

from mxmoe.backends.triton import TritonBackend
from mxmoe.errors import NoKernels, UnknownName
from mxmoe.ir import ModuleOp, Scheme
from mxmoe.quant import Weights
from mxmoe.target import TARGETS, Target


@pytest.mark.parametrize("target", [t for t in TARGETS.values() if t.backend == "triton"], ids=lambda t: t.name)
def test_candidates_can_be_planned(target: Target) -> None:
    backend = TritonBackend(**target.options)
    assert all(backend.supports(Scheme.parse(name)) for name in target.candidates)


@pytest.mark.parametrize(
    ("scheme", "ada", "hopper"),
    [
        ("w4a4_g128_sym", True, False),
        ("w8a8_sym", True, True),
        ("w8a8_e4m3", True, True),
        ("w3a16_g128_asym", True, True),
        ("bf16", True, True),
    ],
)
def test_supports_follows_the_matrix_units(scheme: str, ada: bool, hopper: bool) -> None:
    assert TritonBackend("89").supports(Scheme.parse(scheme)) is ada
    assert TritonBackend("90").supports(Scheme.parse(scheme)) is hopper


@pytest.mark.parametrize("capability", ["89", "90"])
def test_running_is_refused_with_the_way_out(capability: str) -> None:
    backend = TritonBackend(capability)
    with pytest.raises(NoKernels, match=r"no triton kernels.*eager, numba"):
        backend.ready()
    with pytest.raises(NoKernels):
        backend.compile(ModuleOp([]), Weights({}))


def test_unknown_capability() -> None:
    with pytest.raises(UnknownName, match="compute capability named '75'"):
        TritonBackend("75")
