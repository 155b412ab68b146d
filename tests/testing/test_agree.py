"""The equivalence check catches what it must, and says where."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mxmoe.backends.eager import EagerBackend, EagerExecutable
from mxmoe.errors import BackendsDisagree
from mxmoe.ir import BankShape, BlockShape, ModuleOp, Scheme
from mxmoe.quant import Weights
from mxmoe.target import Executable, WeightSource
from mxmoe.testing import Routed, assert_backends_agree, at_stage, random_weights
from mxmoe.testing.agree import relative_error

NAMES = {role: f"mlp.routed.{role}" for role in ("gate", "up", "down")}
SHAPE = BlockShape("mlp", 24, (BankShape("routed", 3, 2, 40, "silu", True, NAMES),))
HIDDEN = torch.randn((9, 24), generator=torch.Generator().manual_seed(0))
ROUTINGS = {"routed": Routed(torch.tensor([[0, 1], [1, 2], [2, 3]]).repeat(3, 1), torch.ones(9, 2))}


Wrap = Callable[[EagerExecutable], Any]


@dataclass
class _Opaque:
    """Hides the trace of an executable."""

    inner: EagerExecutable
    change: Callable[[Tensor], Tensor] = lambda out: out

    def __call__(self, bank: str, *tensors: Tensor) -> Tensor:
        return self.change(self.inner(bank, *tensors))


class _Broken(EagerBackend):
    """Eager on other weights, or with another output: name and options as a third party's backend would have them."""

    name = "broken"  # pyright: ignore[reportAssignmentType]

    def __init__(self, spoil: Mapping[str, int] | None = None, wrap: Wrap = lambda executable: executable) -> None:
        self.spoil, self.wrap = spoil or {}, wrap

    def compile(self, module: ModuleOp, weights: WeightSource) -> Mapping[str, Executable]:
        assert isinstance(weights, Weights)
        tensors = {name: weights[name].clone() for name in weights}
        for name, expert in self.spoil.items():
            tensors[name][expert] *= 1.5
        return {key: self.wrap(value) for key, value in super().compile(module, Weights(tensors)).items()}


def _check(broken: _Broken, scheme: str = "w8a16_sym", **options: bool) -> None:
    module = at_stage([SHAPE], "lowered", [Scheme.parse(scheme)])
    assert_backends_agree(module, random_weights([SHAPE]), HIDDEN, ROUTINGS, backends=("eager", broken), **options)


def test_equal_backends_agree() -> None:
    _check(_Broken())
    _check(_Broken(wrap=_Opaque))
    _check(_Broken(), "w8a8_sym", exact_integers=True)


@pytest.mark.parametrize("role", ["gate", "up", "down"])
def test_the_first_wrong_op_and_expert_is_named(role: str) -> None:
    with pytest.raises(BackendsDisagree, match=rf"bank routed: eager and broken .* {role} of expert 2 in w8a16_sym"):
        _check(_Broken({NAMES[role]: 2}))


def test_without_a_trace_the_expert_is_found() -> None:
    with pytest.raises(BackendsDisagree, match="first at expert 1"):
        _check(_Broken({NAMES["down"]: 1}, _Opaque))


def test_a_wrong_sum_is_told_from_a_wrong_expert() -> None:
    def scale_crowds(out: Tensor) -> Tensor:
        return out * 1.5 if bool((out != 0).all()) else out

    with pytest.raises(BackendsDisagree, match="combining the experts"):
        _check(_Broken(wrap=lambda executable: _Opaque(executable, scale_crowds)))


def test_integers_must_be_exact_where_that_is_promised() -> None:
    class Nearly(_Broken):
        def compile(self, module: ModuleOp, weights: WeightSource) -> Mapping[str, Executable]:
            found = super().compile(module, weights)
            trace = found["mlp"].trace  # type: ignore[attr-defined]

            def nudged(bank: str, *tensors: Tensor) -> dict[str, Tensor]:
                made = trace(bank, *tensors)
                return {**made, "up": made["up"] * (1 + 2**-22)}

            object.__setattr__(found["mlp"], "trace", nudged)
            return found

    _check(Nearly(), "w8a8_sym")
    with pytest.raises(BackendsDisagree, match="up of expert 0 in w8a8_sym"):
        _check(Nearly(), "w8a8_sym", exact_integers=True)


def test_wrong_dtype_and_shape_are_named() -> None:
    with pytest.raises(BackendsDisagree, match=r"the shape: broken gives torch.float64 \[9, 24\]"):
        _check(_Broken(wrap=lambda executable: _Opaque(executable, Tensor.double)))
    with pytest.raises(BackendsDisagree, match=r"the shape: broken gives torch.float32 \[9, 23\]"):
        _check(_Broken(wrap=lambda executable: _Opaque(executable, lambda out: out[:, 1:])))


def test_nan_where_there_was_none_is_a_difference() -> None:
    with pytest.raises(BackendsDisagree, match="differ by inf"):
        _check(_Broken(wrap=lambda executable: _Opaque(executable, lambda out: out * float("nan"))))


def test_dense_stages_are_compared_too() -> None:
    module = at_stage([SHAPE], "lifted", [Scheme.parse("bf16")])
    args = (module, random_weights([SHAPE]), HIDDEN, ROUTINGS)
    assert_backends_agree(*args, backends=("eager", _Broken()))
    with pytest.raises(BackendsDisagree, match="up of expert 0 in dense weights"):
        assert_backends_agree(*args, backends=("eager", _Broken({NAMES["up"]: 0})))


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.0], [3.0, 9.0], 1.0),
        ([], [], 0.0),
        ([0.0], [0.0], 0.0),
        ([float("nan"), 1.0], [float("nan"), 1.0], 0.0),
        ([float("nan"), 1.0], [0.0, 1.0], float("inf")),
        ([float("inf")], [float("-inf")], float("inf")),
        ([float("inf"), 2.0], [3.4028234663852886e38, 2.0], float("inf")),
        ([1.0], [1.0, 1.0], float("inf")),
    ],
)
def test_relative_error(a: list[float], b: list[float], error: float) -> None:
    assert relative_error(torch.tensor(a), torch.tensor(b)) == error
