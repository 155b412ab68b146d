"""A routed bank and a shared expert in the same launches: what they make is what each makes by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mxmoe.backends.eager import EagerBackend
from mxmoe.backends.triton import TritonBackend
from mxmoe.ir import BankShape, BlockShape, ModuleOp, Scheme, Table, banks, moe_ops, rotations
from mxmoe.passes import Environment, LowerToGroupGemm
from mxmoe.quant import Weights
from mxmoe.testing import at_stage, random_weights

from .small_blocks import DEVICE, DTYPES

pytest.importorskip("triton")
# rows of padding hold anything, and numpy says so where kernels are interpreted
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HIDDEN, EXPERTS, TOP_K = 128, 4, 2
SETS = (
    ("bf16",),
    ("w8a8_sym",),
    ("w8a8_e4m3",),
    ("w4a8_g128_sym",),
    ("w4a16_g128_asym",),
    ("w4a4_g128_sym",),
    ("w8a8_sym", "w4a4_g128_sym", "bf16"),
    ("w4a16_g128_asym", "w8a8_e4m3", "w4a8_g128_sym", "w3a16_g128_asym"),
)


def make(
    schemes: Sequence[str], *, wide: int = 384, narrow: int = 128, dtype: str = "bf16", turns: tuple[int, int] = (0, 0),
    act: tuple[str, str] = ("silu", "silu"), has_bias: bool = False, seed: int = 0,
) -> tuple[ModuleOp, Weights]:  # fmt: skip
    """Draw a block of two banks; the shared expert takes the last scheme, the routed ones take turns."""
    shapes: list[BankShape] = []
    for name, experts, top_k, width, kind in (
        ("routed", EXPERTS, TOP_K, narrow, act[0]),
        ("shared", 1, 1, wide, act[1]),
    ):
        names = {role: f"mlp.{name}.{role}" for role in ("gate", "up", "down")}
        biases = {role: f"{one}.bias" for role, one in names.items()} if has_bias else {}
        shapes.append(BankShape(name, experts, top_k, width, kind, True, names, biases))  # pyright: ignore
    block = BlockShape("mlp", HIDDEN, tuple(shapes), dtype)  # pyright: ignore[reportArgumentType]
    module = at_stage([block], "allocated", [Scheme.parse(one) for one in schemes], seed)
    for moe in moe_ops(module):
        for name, turn in zip(("routed", "shared"), turns, strict=True):
            bank = banks(moe)[name]
            bank.act.hadamard = turn
            for role, op in bank.linears.items():
                first = len(schemes) - 1 if name == "shared" else int(role == "down")
                chosen = (np.arange(bank.experts) + first) % len(schemes)
                op.set_table("choice", Table(("expert",), chosen.astype(np.int8)))
    LowerToGroupGemm().run(module, Environment())
    module.verify()
    return module, random_weights([block], seed).rotated(rotations(module))


def draw(tokens: int, dtype: str = "bf16", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, some with outliers; distinct experts, or padding for about one choice of five; weights."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn((tokens, HIDDEN), generator=random)
    hidden[:, seed % HIDDEN] *= 20
    index = torch.rand((tokens, EXPERTS), generator=random).argsort(dim=1)[:, :TOP_K]
    index[torch.rand((tokens, TOP_K), generator=random) < 0.2] = EXPERTS
    weights = torch.rand((tokens, TOP_K), generator=random)
    return hidden.to(DTYPES[dtype]).to(DEVICE), index.contiguous().to(DEVICE), weights.to(DEVICE)


def apart(executable: object, hidden: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Both banks, one by one."""
    alone = torch.zeros((len(hidden), 1), dtype=torch.int64, device=hidden.device)
    one = torch.ones((len(hidden), 1), device=hidden.device)
    return {
        "routed": executable("routed", hidden, index, weights),  # pyright: ignore
        "shared": executable("shared", hidden, alone, one),  # pyright: ignore
    }


def far(one: Tensor, other: Tensor) -> float:
    """Distance, relative to the second."""
    return float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-20))


@pytest.mark.parametrize("schemes", SETS, ids="+".join)
def test_both_banks_as_each_alone_and_as_the_definition(schemes: tuple[str, ...]) -> None:
    module, weights = make(schemes)
    made = TritonBackend("89").compile(module, weights)["mlp"]
    defined = EagerBackend().compile(module, weights)["mlp"]
    for tokens in (1, 17):
        assert made.joins(tokens)
        args = draw(tokens, seed=tokens)
        both, each = made.run_block(*args), apart(made, *args)
        meant = apart(defined, *(one.cpu() for one in args))
        for name in ("routed", "shared"):
            assert both[name].shape == each[name].shape
            assert both[name].dtype == each[name].dtype
            assert far(both[name], each[name]) < 4e-3
            assert far(both[name].cpu(), meant[name]) < 1.1 * far(each[name].cpu(), meant[name]) + 4e-3
