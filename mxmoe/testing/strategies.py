"""Hypothesis strategies for schemes, tables, routings, blocks, modules, and whole cases to run on two backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.vendor.pretty import RepresentationPrinter, for_type_by_name
from torch import Tensor

from mxmoe.ir import (
    BankShape,
    BlockShape,
    ModuleOp,
    Scheme,
    Stage,
    Table,
    banks,
    moe_ops,
    print_ir,
    rotation_blocks,
    rotations,
)
from mxmoe.quant import ACT_PARAMS, ACTS, Weights
from mxmoe.testing.blocks import Routed, at_stage, random_weights


def _pretty_module(module: ModuleOp, printer: RepresentationPrinter, cycle: bool) -> None:
    del cycle
    printer.text(print_ir(module))


# a failing example prints as text with elided tables; the repr of an op is its whole object graph, megabytes of it
for_type_by_name(ModuleOp.__module__, ModuleOp.__name__, _pretty_module)

_GROUPS = ("", "_g32", "_g64", "_g128")
SCHEMES: tuple[Scheme, ...] = tuple(
    Scheme.parse(name)
    for name in (
        *(f"w{b}a16{g}_{s}" for b in (1, 2, 3, 4, 8) for g in _GROUPS for s in ("sym", "asym")),
        *(f"w{b}a16{g}_{s}_fp16" for b in (1, 2, 3, 4, 8) for g in _GROUPS for s in ("sym", "asym")),
        *(f"w{w}a{a}{g}_sym" for w, a in ((8, 8), (4, 8), (4, 4)) for g in ("", "_g128")),
        *(f"w{w}a8{g}_sym_iscale" for w, g in ((4, "_g128"), (4, "_g32"), (2, "_g64"))),
        "w8a8_e4m3",
        "bf16",
        "fp16",
    )
)
"""The schemes that a backend must get right where its `supports` says so; the reference backends run all of them."""

_NASTY = (0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 1e-38, 1e-45, 1234567.0, 3.4028234663852886e38)
_ACT_NUMBERS: Mapping[str, float] = {"alpha": 1.702, "limit": 7.0, "gate_cap": 5.0, "up_cap": 3.0}


@st.composite
def schemes(draw: st.DrawFn, *, weight_only: bool | None = None) -> Scheme:
    """
    Draw any scheme of the grammar, with groups of any size.

    Args:
        weight_only: True for 16-bit activations and quantized weights only, False for all others, None for both.
    """
    act_bits = draw(st.sampled_from((16,) if weight_only else (4, 5, 6, 7, 8) if weight_only is False else (4, 8, 16)))
    if weight_only is not True and act_bits == 16 and draw(st.booleans()):
        return Scheme.parse(draw(st.sampled_from(("bf16", "fp16"))))
    formats = {16: ("bf16", "fp16"), 8: ("int", "e4m3")}.get(act_bits, ("int",))
    act_format = draw(st.sampled_from(formats))
    weight_bits = draw(st.integers(1, 8))
    symmetric = draw(st.booleans()) or (act_format == "e4m3" and weight_bits == 8)
    group = draw(st.none() | st.sampled_from((32, 64, 128)) | st.integers(1, 200))
    narrow = group is not None and symmetric and weight_bits in (2, 3, 4)
    integer_scales = narrow and act_format == "int" and act_bits != 4 and draw(st.booleans())
    return Scheme(weight_bits, act_bits, group, symmetric, act_format, integer_scales)  # pyright: ignore[reportArgumentType]


@st.composite
def tables(
    draw: st.DrawFn,
    axes: Sequence[str] = ("expert", "scheme"),
    shape: Sequence[int] | None = None,
    dtype: Any = None,  # noqa: ANN401  # whatever numpy takes as a dtype
) -> Table:
    """
    Draw a table: of finite numbers, inf, nan, -0.0, denormals and the largest float, or of any integers.

    Args:
        axes: names of its axes.
        shape: extents, or None to draw 1 to 5 for each axis.
        dtype: float32, float64, int8, int32 or int64, or None to draw it.
    """
    extents = tuple(shape) if shape is not None else tuple(draw(st.integers(1, 5)) for _ in axes)
    kind = np.dtype(dtype or draw(st.sampled_from((np.float32, np.float64, np.int8, np.int32, np.int64))))
    if kind.kind == "f":
        elements = st.sampled_from(_NASTY) | st.floats(width=32 if kind.itemsize == 4 else 64)
    else:
        bounds = np.iinfo(kind.name)
        elements = st.integers(int(bounds.min), int(bounds.max))
    count = int(np.prod(extents))
    values = draw(st.lists(elements, min_size=count, max_size=count))
    return Table(tuple(axes), np.array(values, dtype=kind).reshape(extents))


@st.composite
def routings(draw: st.DrawFn, experts: int, top_k: int, tokens: int | None = None) -> Routed:
    """
    Draw the output of a router: what routers do, and what breaks kernels.

    Kinds: `spread` (distinct random experts), `skewed` (a few experts, the others empty), `one expert` (every token
    to the same, the other slots padding), `padded` (random slots are padding), `all padding`; each with no token, one
    or more.

    Args:
        experts: number of experts; this index is padding.
        top_k: assignments per token.
        tokens: number of tokens, or None to draw 0 to 40.
    """
    n = draw(st.sampled_from((0, 1, 2)) | st.integers(3, 40)) if tokens is None else tokens
    kind = draw(st.sampled_from(("spread", "skewed", "one expert", "padded", "all padding")))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    score = torch.rand((n, experts), generator=generator)
    if kind == "skewed":
        score[:, :top_k] += 1
    index = score.argsort(dim=-1, descending=True)[:, :top_k].contiguous()
    if kind == "one expert":
        index = torch.full((n, top_k), experts)
        index[:, draw(st.integers(0, top_k - 1))] = draw(st.integers(0, experts - 1))
    elif kind == "padded":
        index[torch.rand((n, top_k), generator=generator) < 0.5] = experts
    elif kind == "all padding":
        index = torch.full((n, top_k), experts)
    return Routed(index, torch.rand((n, top_k), generator=generator), f"{kind}, {n} tokens")


@st.composite
def blocks(draw: st.DrawFn, name: str = "model.layers.0.mlp") -> BlockShape:
    """Draw the shape of a small block: sizes that divide nothing, any act, with and without gate, bias, shared bank."""
    hidden = draw(st.sampled_from((32, 64, 128)) | st.integers(1, 150))
    routed = draw(_banks(name, "routed"))
    shared = (draw(_banks(name, "shared")),) if draw(st.booleans()) else ()
    return BlockShape(name, hidden, (routed, *shared), draw(st.sampled_from(("bf16", "fp16", "fp32"))))


@st.composite
def _banks(draw: st.DrawFn, block: str, name: str) -> BankShape:
    experts = 1 if name == "shared" else draw(st.integers(1, 6))
    act = draw(st.sampled_from(sorted(ACTS)))
    gated = draw(st.booleans()) or act in ACT_PARAMS
    weights = {role: f"{block}.{name}.{role}" for role in (("gate", "up", "down") if gated else ("up", "down"))}
    has_bias = draw(st.booleans())
    return BankShape(
        name=name,
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 3))),
        intermediate=draw(st.sampled_from((32, 64)) | st.integers(1, 150)),
        act=act,
        gated=gated,
        weights=weights,
        biases={role: f"{weight}.bias" for role, weight in weights.items()} if has_bias else {},
        act_params={key: _ACT_NUMBERS[key] for key in ACT_PARAMS.get(act, ())},
    )


@st.composite
def modules(draw: st.DrawFn, stage: Stage | None = None) -> ModuleOp:
    """Draw a verified module of one or two blocks; `stage` None draws that too."""
    shapes = [draw(blocks(f"model.layers.{i}.mlp")) for i in range(draw(st.integers(1, 2)))]
    candidates = draw(st.lists(schemes(), min_size=1, max_size=4, unique=True))
    at = stage or draw(st.sampled_from(("lifted", "annotated", "allocated", "lowered")))
    return _rotated(draw, at_stage(shapes, at, candidates, draw(st.integers(0, 2**16))))


def _rotated(draw: st.DrawFn, module: ModuleOp) -> ModuleOp:
    """Rotate what goes to down, in some banks."""
    for act in (bank.act for moe in moe_ops(module) for bank in banks(moe).values()):
        width = act.out.type.get_shape()[-1]  # pyright: ignore  # a tensor, by the verifier
        act.hadamard = draw(st.sampled_from((0, *rotation_blocks(width))))
    return module


@dataclass(frozen=True, eq=False)
class Case:
    """Everything that it takes to run one block on two backends."""

    shape: BlockShape
    module: ModuleOp
    weights: Weights
    """As the module reads them: those of down are rotated where it rotates what down takes."""
    hidden: Tensor
    """[tokens, hidden], in the dtype of the block."""
    routings: Mapping[str, Routed]
    """Bank -> what its router says."""

    def __repr__(self) -> str:
        chosen = ", ".join(map(str, moe_ops(self.module)[0].candidates))
        return f"Case({self.shape}, [{chosen}], {dict(self.routings)})"

    def _repr_pretty_(self, printer: RepresentationPrinter, cycle: bool) -> None:
        del cycle
        printer.text(repr(self))


@st.composite
def cases(draw: st.DrawFn, stage: Stage = "lowered", candidates: Sequence[Scheme] | None = None) -> Case:
    """
    Draw a block with weights, tokens and routings to run it on.

    Args:
        stage: of the module.
        candidates: what experts choose from at random, or None to draw 1 to 4 of `SCHEMES` and of the whole grammar.
    """
    shape = draw(blocks())
    choices = candidates or draw(st.lists(st.sampled_from(SCHEMES) | schemes(), min_size=1, max_size=4, unique=True))
    seed = draw(st.integers(0, 2**16))
    module = _rotated(draw, at_stage([shape], stage, choices, seed))
    drawn = {name: draw(routings(bank.experts, bank.top_k)) for name, bank in banks(moe_ops(module)[0]).items()}
    tokens = len(drawn["routed"].index)
    if "shared" in drawn:
        drawn["shared"] = Routed(torch.zeros((tokens, 1), dtype=torch.int64), torch.ones((tokens, 1)), "shared")
    hidden = torch.randn((tokens, shape.hidden), generator=torch.Generator().manual_seed(seed))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[shape.dtype]
    weights = random_weights([shape], seed).rotated(rotations(module))
    return Case(shape, module, weights, hidden.to(dtype), drawn)
