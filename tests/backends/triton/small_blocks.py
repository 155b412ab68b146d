"""Small blocks for the kernels: every scheme they multiply, chosen so that each occurs in gate, up and down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mxmoe.backends.eager import EagerBackend
from mxmoe.backends.triton import TritonBackend
from mxmoe.ir import BankShape, BlockShape, ModuleOp, Scheme, Table, banks, moe_ops, rotations
from mxmoe.passes import Environment, LowerToGroupGemm
from mxmoe.quant import ACT_PARAMS, ACTS, Weights
from mxmoe.target import Executable, WeightSource
from mxmoe.testing import SCHEMES, Routed, assert_backends_agree, at_stage, random_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = tuple(map(Scheme.parse, ("w4a8_sym_e4m3", "w4a8_g128_sym_e4m3")))
KERNEL_SCHEMES = tuple(scheme for scheme in (*SCHEMES, *FP8) if TritonBackend("89").supports(scheme))
TURNS = ((), (32, 24), (), (24, 32))
"""Blocks that down's input is rotated by, the first that divides it; 24 is no power of two."""
NUMBERS: Mapping[str, float] = {"alpha": 1.702, "limit": 2.0, "gate_cap": 5.0, "up_cap": 3.0}
DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Small:
    """One bank of a block, and what is special about it."""

    schemes: tuple[Scheme, ...]
    """Expert e of gate takes the e-th of them, round and round; up and down begin later."""
    hidden: int = 128
    intermediate: int = 192
    experts: int = 4
    top_k: int = 2
    act: str = "silu"
    gated: bool = True
    has_bias: bool = False
    dtype: str = "bf16"
    turn: int = 0
    """Channels of the blocks that down's input is rotated by."""
    is_tied: bool = True
    """Gate and up of an expert in the same scheme, so that one launch makes both."""
    seed: int = 0

    def __str__(self) -> str:
        names = "+".join(map(str, self.schemes))
        parts = (self.act, "gated" if self.gated else "", f"h{self.turn}" if self.turn else "", self.dtype)
        return f"{names}-{self.hidden}x{self.intermediate}-{'-'.join(filter(None, parts))}"

    @property
    def shape(self) -> BlockShape:
        """The block, called `mlp`."""
        roles = ("gate", "up", "down") if self.gated else ("up", "down")
        names = {role: f"mlp.{role}" for role in roles}
        biases = {role: f"{name}.bias" for role, name in names.items()} if self.has_bias else {}
        params = {name: NUMBERS[name] for name in ACT_PARAMS.get(self.act, ())}
        bank = BankShape(
            "routed", self.experts, self.top_k, self.intermediate, self.act, self.gated, names, biases, params
        )
        return BlockShape("mlp", self.hidden, (bank,), self.dtype)  # pyright: ignore[reportArgumentType]

    def module(self) -> ModuleOp:
        """Build it with its choices, lowered."""
        module = at_stage([self.shape], "allocated", self.schemes, self.seed)
        begins = {"gate": 0, "up": 0 if self.is_tied else 1, "down": 1}
        for moe in moe_ops(module):
            bank = banks(moe)["routed"]
            bank.act.hadamard = self.turn
            for role, op in bank.linears.items():
                chosen = (np.arange(self.experts) + begins[role]) % len(self.schemes)
                op.set_table("choice", Table(("expert",), chosen.astype(np.int8)))
        LowerToGroupGemm().run(module, Environment())
        module.verify()
        return module

    def weights(self, module: ModuleOp) -> Weights:
        """Draw weights, those of down rotated where the module says so."""
        return random_weights([self.shape], self.seed).rotated(rotations(module))

    def tokens(self, count: int, seed: int) -> Tensor:
        """Draw [count, hidden]: with a row of zeros, and outliers in two channels."""
        x = torch.randn((count, self.hidden), generator=torch.Generator().manual_seed(seed))
        x[:, seed % self.hidden] *= 6
        x[:, -1] *= 4
        if count > 2:
            x[seed % count] = 0
        return x.to(DTYPES[self.dtype])

    def routing(self, count: int, seed: int, dtype: torch.dtype = torch.int64) -> Routed:
        """Draw distinct experts for each token."""
        random = torch.Generator().manual_seed(seed)
        index = torch.rand((count, self.experts), generator=random).argsort(dim=1)[:, : self.top_k]
        return Routed(index.to(dtype).contiguous(), torch.rand((count, self.top_k), generator=random))


@dataclass(frozen=True, eq=False)
class Compiled:
    """A backend that has compiled already: every compilation of it is the same."""

    name: str
    executables: Mapping[str, Executable]

    def compile(self, module: ModuleOp, weights: WeightSource) -> Mapping[str, Executable]:
        del module, weights
        return self.executables


@dataclass(frozen=True, eq=False)
class Moved:
    """An executable that is called with tensors of the CPU."""

    executable: Executable

    def __call__(self, bank: str, *tensors: Tensor) -> Tensor:
        return self.executable(bank, *(tensor.to(DEVICE) for tensor in tensors)).cpu()


@dataclass(frozen=True, eq=False)
class MovedAndTraced(Moved):
    """The same, saying what every op made."""

    def trace(self, bank: str, *tensors: Tensor) -> dict[str, Tensor]:
        made = self.executable.trace(bank, *(tensor.to(DEVICE) for tensor in tensors))  # pyright: ignore
        return {name: tensor.cpu() for name, tensor in made.items()}


@dataclass(frozen=True, eq=False)
class Pair:
    """A block compiled by the definition and by Triton."""

    small: Small
    module: ModuleOp
    weights: Weights
    eager: Compiled
    triton: Mapping[str, Executable]

    @classmethod
    def of(cls, small: Small) -> Pair:
        """Compile it twice."""
        module = small.module()
        weights = small.weights(module)
        eager = Compiled("eager", EagerBackend().compile(module, weights))
        return cls(small, module, weights, eager, TritonBackend("89").compile(module, weights))

    def check(self, hidden: Tensor, routed: Routed, *, is_traced: bool = False) -> None:
        """Compare on these tokens; with a trace every role and expert for itself."""
        wrap = MovedAndTraced if is_traced else Moved
        moved = Compiled("triton", {name: wrap(one) for name, one in self.triton.items()})
        assert_backends_agree(self.module, self.weights, hidden, {"routed": routed}, backends=(self.eager, moved))  # pyright: ignore[reportArgumentType]


def mixes(count: int) -> list[tuple[Scheme, ...]]:
    """All schemes of the kernels in sets of `count`, as unlike as they get."""
    sets = -(-len(KERNEL_SCHEMES) // count)
    return [KERNEL_SCHEMES[first::sets] for first in range(sets)]


def smalls(sets: Sequence[tuple[Scheme, ...]]) -> list[Small]:
    """A block for each set of schemes: every activation, size, and option somewhere."""
    sizes = ((128, 192), (192, 160), (256, 96), (320, 128), (120, 72), (96, 264))
    acts = sorted(ACTS)
    made: list[Small] = []
    for at, schemes in enumerate(sets):
        act = acts[at % len(acts)]
        hidden, intermediate = sizes[at % len(sizes)]
        gated = act in ACT_PARAMS or at % 4 != 3
        made.append(
            Small(
                schemes, hidden, intermediate, 8, 1 + at % 8, act, gated,
                has_bias=at % 3 == 1, dtype=("bf16", "fp16", "fp32")[at % 3 if at % 2 else 0],
                turn=next((block for block in TURNS[at % 4] if intermediate % block == 0), 0),
                is_tied=at % 5 != 2, seed=at,
            )
        )  # fmt: skip
    return made
