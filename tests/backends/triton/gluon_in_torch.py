"""
The INT4 kernel's own Python, run on torch tensors: no machine without a GPU runs Gluon.

Addresses, loops, masks, the ring of buffers and the order of waits are the kernel's, and the matrix instruction is its
definition in the PTX ISA. Copies land when they are waited for, and their buffers hold nonsense until then.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mxmoe.backends.triton import int4, kernels_int4
from mxmoe.backends.triton.int4 import PLAIN, Int4Bands, Int4Options
from mxmoe.backends.triton.int4_pack import PackedInt4


class Pointer:
    """Addresses in one flat tensor."""

    def __init__(self, memory: Tensor, offset: Tensor | int = 0) -> None:
        self.memory, self.offset = memory, torch.as_tensor(offset)
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, step: Tensor | int) -> Pointer:
        return Pointer(self.memory, self.offset + step)


class Shared:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    def index(self, at: Tensor | int) -> Shared:
        return Shared(self.memory[int(at)])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.memory.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.memory.permute(*order))

    def load(self, _layout: object) -> Tensor:
        return self.memory.clone()

    def store(self, value: Tensor) -> None:
        self.memory.copy_(value)


def poison(memory: Tensor) -> Tensor:
    return memory.fill_(0x77777777 if memory.dtype == torch.int32 else float("nan"))


class Copies:
    """Copies under way: groups of (destination, addresses, mask), and of which a wait lets the oldest land."""

    def __init__(self) -> None:
        self.open: list[tuple[Tensor, Pointer, Tensor | None]] = []
        self.groups: list[list[tuple[Tensor, Pointer, Tensor | None]]] = []

    def async_copy_global_to_shared(self, to: Shared, source: Pointer, mask: Tensor | None = None) -> None:
        assert to.memory.shape == source.offset.shape
        poison(to.memory)
        self.open.append((to.memory, source, mask))

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, left: int) -> None:
        while len(self.groups) > left:
            for to, source, mask in self.groups.pop(0):
                to.copy_(load(source, mask, 0.0))


def load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    if mask is None:
        return pointer.memory.view(-1)[pointer.offset.long()].clone()
    inside = torch.where(mask, pointer.offset, 0).long()
    return torch.where(mask, pointer.memory.view(-1)[inside], torch.tensor(other).to(pointer.memory.dtype))


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    offset, value, mask = torch.broadcast_tensors(pointer.offset, value, mask)
    pointer.memory.view(-1)[offset[mask].long()] = value[mask]


def expand_dims(value: Pointer | Tensor, dim: int) -> Pointer | Tensor:
    if isinstance(value, Pointer):
        return Pointer(value.memory, value.offset.unsqueeze(dim))
    return value.unsqueeze(dim)


def nibbles(words: Tensor) -> Tensor:
    return ((words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32) & 15) ^ 8) - 8


def mma(a: Tensor, b: Tensor) -> Tensor:
    """
    mma.m16n8k64 on the fragments of all lanes: a [M, N, 8, 4, 4 registers], b [.., 2 registers] -> int64 [.., 2, 2].

    PTX ISA: element i of a lies in row g (i < 8, 16 <= i < 24) or g + 8, column 8 t + i % 8 (+ 32 for i >= 16); of b in
    row 8 t + i % 8 (+ 32 for i >= 8), column g; of the sum in row g (i < 2) or g + 8, column 2 t + i % 2.
    """
    m, n = a.shape[:2]
    left = torch.zeros((m, n, 16, 64), dtype=torch.int64)
    right = torch.zeros((m, n, 64, 8), dtype=torch.int64)
    out = torch.zeros((m, n, 8, 4, 2, 2), dtype=torch.int64)
    for g in range(8):
        for t in range(4):
            for i in range(32):
                row, column = g + 8 * (8 <= i < 16 or i >= 24), 8 * t + i % 8 + 32 * (i >= 16)
                left[:, :, row, column] = nibbles(a[:, :, g, t])[..., i // 8, i % 8]
            for i in range(16):
                right[:, :, 8 * t + i % 8 + 32 * (i >= 8), g] = nibbles(b[:, :, g, t])[..., i // 8, i % 8]
    product = left @ right
    for g in range(8):
        for t in range(4):
            for i in range(4):
                out[:, :, g, t, i // 2, i % 2] = product[:, :, g + 8 * (i >= 2), 2 * t + i % 2]
    return out


def both_products(a0: Tensor, a1: Tensor, b: Tensor) -> Tensor:
    registers = b.flatten(-2)
    return mma(a0.flatten(-2), registers[..., :2]) + mma(a1.flatten(-2), registers[..., 2:])


def multiply_group(a0: Tensor, a1: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, total: Tensor) -> Tensor:
    return total + both_products(a0, a1, b).float() * (b_scale * a_scale)


def multiply_channel(a0: Tensor, a1: Tensor, b: Tensor, total: Tensor) -> Tensor:
    return (total + both_products(a0, a1, b)).to(torch.int32)


def as_tensors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *values: function(*map(torch.as_tensor, values))


def torch_gluon(program: int, programs: int, warps: int) -> dict[str, Any]:
    """Give the global names of the kernel's file, with torch behind them."""
    gl = types.SimpleNamespace(
        **{name: getattr(torch, name) for name in ("int32", "int64", "float32", "permute", "reshape")},
        BlockedLayout=lambda *_: None, SliceLayout=lambda *_: None, SwizzledSharedLayout=lambda *_: None,
        constexpr=object, arange=lambda low, high, layout: torch.arange(low, high, dtype=torch.int32),
        minimum=as_tensors(torch.minimum), where=torch.where, expand_dims=expand_dims, load=load, store=store,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), num_warps=lambda: warps,
        broadcast=lambda a, b: (a.expand_as(b), b), split=lambda a: a.unbind(-1),
        convert_layout=lambda a, *_, **__: a, static_range=range,
        program_id=lambda _: torch.tensor(program), num_programs=lambda _: programs,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(poison(torch.empty(shape, dtype=dtype))),
    )  # fmt: skip
    names: dict[str, Any] = {
        "gl": gl, "async_copy": Copies(), "multiply_group": multiply_group, "multiply_channel": multiply_channel,
        "accumulators": lambda *_: None, "halves": lambda *_: None,
        "act": lambda gate, up, *_: torch.nn.functional.silu(gate) * up, "__builtins__": __builtins__,
    }  # fmt: skip
    for name in ("_sources", "_copy_step", "_tile", "_store", "int4_kernel"):
        names[name] = types.FunctionType(getattr(kernels_int4, name).fn.__code__, names)
    return names


def run_in_torch(
    x: Tensor, x_scale: Tensor, weights: PackedInt4, bands: Int4Bands, out: Tensor,
    *, bias: Tensor | None = None, options: Int4Options = PLAIN, programs: int = 3,
) -> None:  # fmt: skip
    """`int4_group_gemm`, program after program."""
    views = (bands.row_of, bands.slot, bands.class_band, bands.band_expert, bands.band_row, bands.band_rows)
    tensors = (x, x_scale, weights.words, weights.scale, weights.scale if bias is None else bias, out, *views)
    is_grouped = weights.scheme.group_size is not None
    constants = int4.launch_constants(is_grouped, bands.classes, options, bias is not None)
    for program in range(programs):
        kernel = torch_gluon(program, programs, int4.launch_warps(bands.classes))["int4_kernel"]
        kernel(*map(Pointer, tensors), weights.n, weights.steps, bands.top_k, bands.tokens, **constants)
