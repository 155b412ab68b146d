"""The launches of a block: schedule, rows, gate and up, rows again, down, combine. None waits for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from mxmoe.backends.triton import kernels, prepare
from mxmoe.backends.triton.dispatch import Dispatch, Tables, power_of_two_from
from mxmoe.backends.triton.mode import interpreting, overlap, programs_at_once, ptx_of
from mxmoe.backends.triton.operands import Epilogue, Matrices, Rows
from mxmoe.backends.triton.rows import RowKind
from mxmoe.backends.triton.schedule import (
    FEW_ASSIGNMENTS,
    MANY_ROWS,
    allocate,
    build,
    few_arguments,
    few_programs,
)
from mxmoe.backends.triton.tiles import DIVIDED_WARPS, Config, classes_of
from mxmoe.quant import apply_act, rotate
from mxmoe.quant import hadamard as hadamard_matrix

# a launch takes options that are no arguments of the kernel
_KERNELS: Any = kernels
_PREPARE: Any = prepare

FUSED = frozenset(
    (
        *("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2", "sigmoid", "tanh", "identity"),
        *("swiglu_oai", "silu_clamped", "silu_capped", "swiglu_softcap"),
    )
)
"""Nonlinearities that the kernel computes itself."""
TURNS = (16, 32, 64, 128)
"""Hadamard blocks that the kernel multiplies by: as short and as long as its matrix products get."""


FUSED_TOKENS = 64
"""Tokens up to which one launch begins a call; more want the registers that building a schedule takes."""


@dataclass(frozen=True)
class _Room:
    """Where rows of the kinds that must be made will lie, and the rest of what their kernel is given."""

    kinds: tuple[RowKind, ...]
    codes: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]

    @classmethod
    def of(cls, x: Tensor, kinds: tuple[RowKind, ...], rows: int) -> _Room:
        """Make room for `rows` rows like those of x [*, k] in every kind."""
        k = x.shape[1]
        widths = [-(-k // kind.group) if kind.group else 1 for kind in kinds]
        return cls(
            kinds,
            tuple(torch.empty((rows, k), dtype=kind.dtype, device=x.device) for kind in kinds),
            tuple(torch.empty((rows, width), dtype=torch.float32, device=x.device) for width in widths),
        )

    @classmethod
    def beside(cls, x: Tensor, kinds: tuple[RowKind, ...], turn: int) -> _Room:
        """Make room for the kinds that rows [rows, k] are not of already."""
        return cls.of(x, to_make(kinds, x.dtype, turn), len(x))

    def rows(self, x: Tensor, kinds: tuple[RowKind, ...]) -> Rows:
        """Give every kind its rows; those that were there already are `x`."""
        none = torch.empty(0, dtype=torch.float32, device=x.device)
        codes, scales = dict(zip(self.kinds, self.codes, strict=True)), dict(zip(self.kinds, self.scales, strict=True))
        return Rows(tuple(codes.get(kind, x) for kind in kinds), tuple(scales.get(kind, none) for kind in kinds))

    @property
    def block(self) -> int:
        """Channels that a program reads: a power of two that holds a row, and a group of the longest."""
        widths = [codes.shape[1] for codes in self.codes] + [kind.group for kind in self.kinds]
        return power_of_two_from(max(widths))

    @property
    def specs(self) -> tuple[tuple[int, float, int], ...]:
        """What the kernel is compiled for."""
        return tuple(kind.spec for kind in self.kinds)


def to_make(kinds: Sequence[RowKind], dtype: torch.dtype, turn: int = 0) -> tuple[RowKind, ...]:
    """Name the kinds that rows of a type are not of as they are, turned by blocks of `turn` channels first, if any."""
    return tuple(kind for kind in kinds if turn or kind.format not in ("bf16", "fp16") or kind.dtype != dtype)


def _row_warps(block: int) -> int:
    """Warps of a program that makes one row, of `block` channels."""
    return 16 if block > 8192 else 8 if block > 2048 else 4


def make_rows(x: Tensor, kinds: tuple[RowKind, ...], turn: int = 0) -> Rows:
    """
    Bring rows [rows, k] into every kind; turned by blocks of `turn` channels first, if it is not 0.

    Rows that are already of a kind are used as they are.
    """
    if turn and turn not in TURNS:
        x, turn = rotate(x, turn), 0
    room = _Room.beside(x, kinds, turn)
    if room.kinds and len(x):
        block = max(room.block, 16 * turn)
        _PREPARE.prepare_rows[(len(x),)](
            x, room.codes, room.scales, hadamard(turn, x.dtype, x.device) if turn else x,
            x.shape[1], block, room.specs, turn, ptx_of(x.device),
            num_warps=_row_warps(block), **overlap(x.device, len(x)),
        )  # fmt: skip
    return room.rows(x, kinds)


def sort_rows(tables: Tables, x: Tensor, kinds: tuple[RowKind, ...]) -> Rows:
    """
    Bring tokens [tokens, k] into every kind, each written wherever a choice of it lies sorted by expert.

    Args:
        tables: a schedule that is built.
        x: the tokens.
        kinds: of the rows.

    Returns:
        Rows by sorted row, `tables.dispatch.rows` of them; those of padding are undefined.
    """
    room, dispatch = _Room.of(x, kinds, tables.dispatch.rows), tables.dispatch
    if len(x):
        _PREPARE.prepare_sorted[(len(x),)](
            x, room.codes, room.scales, tables.table("place_of"), dispatch.assignments, dispatch.tokens,
            dispatch.top_k, dispatch.always, _places(dispatch),
            x.shape[1], room.block, room.specs, ptx_of(x.device),
            num_warps=_row_warps(room.block), **overlap(x.device),
        )  # fmt: skip
    return room.rows(x, kinds)


def _places(dispatch: Dispatch) -> int:
    """Power of two that holds the rows of a token."""
    return power_of_two_from(dispatch.top_k + dispatch.always)


def reads_sorted(config: Config) -> bool:
    """Say whether the launch of a config wants its rows sorted by expert, and not by token."""
    return config.warps == DIVIDED_WARPS


def begin(tables: Tables, index: Tensor, x: Tensor, kinds: tuple[RowKind, ...], *, is_sorted: bool = False) -> Rows:
    """
    Fill the tables from a routing and bring the tokens into every kind: in one launch where rows are few.

    Args:
        tables: to fill.
        index: [tokens, top_k], the routing.
        x: [tokens, k].
        kinds: of the rows.
        is_sorted: give the rows sorted by expert (`sort_rows`), and not by token (`make_rows`).
    """
    dispatch = tables.dispatch
    if tables.scratch.numel() or not 0 < len(x) <= FUSED_TOKENS:
        build(tables, index)
        return sort_rows(tables, x, kinds) if is_sorted else make_rows(x, kinds)
    room = _Room.of(x, kinds, dispatch.rows) if is_sorted else _Room.beside(x, kinds, 0)
    if not room.kinds:
        build(tables, index)
        return room.rows(x, kinds)
    first, k = few_programs(dispatch), x.shape[1]
    _PREPARE.begin[(first + len(x),)](
        *few_arguments(tables, index), first, x, room.codes, room.scales,
        k, room.block, room.specs, ptx_of(x.device), is_sorted, dispatch.top_k, _places(dispatch), num_warps=8,
        **overlap(x.device),
    )  # fmt: skip
    return room.rows(x, kinds)


@lru_cache(maxsize=64)
def hadamard(turn: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[turn, turn] of +-1, in an element type that holds them."""
    return hadamard_matrix(turn).to(device=device, dtype=dtype)


def run_gemm(
    matrices: Matrices, config: Config, rows: Rows, tables: Tables, which: int, out: Tensor, epilogue: Epilogue,
    *, gather: bool, few_next: bool = False, compile_only: bool = False,
) -> None:  # fmt: skip
    """
    Multiply every scheduled row by its expert's weights.

    Args:
        matrices: weights; two with a gate.
        config: tiles and warps.
        rows: activations, by token (`gather`) or by sorted row: always so where the config `reads_sorted`.
        tables: the schedule; `which` of its tilings was made from `config`.
        out: [parts, sorted rows, n] to write.
        epilogue: the nonlinearity, or none.
        gather: whether a sorted row reads its token's activations, or its own.
        few_next: whether the next launch is no GEMM, and may begin while this one ends (`kernels_chain`).
        compile_only: only compile what would be launched; tensors may then lie anywhere and hold anything.
    """
    if reads_sorted(config):
        from mxmoe.backends.triton import hopper  # its kernels are no Python that the interpreter runs

        assert not gather, f"rows of a launch with {config.warps} warps are sorted by expert"
        options = {"few_next": few_next, "compile_only": compile_only}
        hopper.run_hopper(matrices, config, rows, tables, which, out, epilogue, **options)
        return
    gemm, dispatch = matrices.gemm, tables.dispatch
    _, classes = classes_of(gemm, config)
    place = dispatch.places
    first_band = place[f"band_expert{which}"][0]
    most = dispatch.most_tiles(which)
    programs = most if not config.per_sm else min(most, config.per_sm * programs_at_once(out.device))
    if not most:
        return
    p, q = epilogue.pair
    bias = matrices.bias
    options = {} if config.registers is None or interpreting() else {"maxnreg": config.registers}
    kernel = _KERNELS.group_gemm
    start = partial(kernel.warmup, grid=(programs,)) if compile_only else kernel[(programs,)]
    start(
        rows.codes, rows.scales, matrices.arena.data, matrices.arena.base, rows.scales[0] if bias is None else bias,
        tables.words[place["row_of"][0] :], tables.words[place[f"class_band{which}"][0] :],
        tables.words[first_band:], dispatch.bands(which), out,
        dispatch.assignments, dispatch.tokens, out.stride(0),
        classes, dispatch.class_width, config.grouping, len(gemm.schemes), dispatch.top_k,
        gather, gemm.gated, bias is not None, epilogue.act, p, q, gemm.n, out.shape[-1], ptx_of(out.device),
        config.per_sm > 0, num_warps=config.warps, **options, **overlap(out.device),
    )  # fmt: skip


def columns_of(h: int) -> tuple[int, int]:
    """Channels of a program that sums a token's choices, and how many programs take all `h`."""
    block = min(power_of_two_from(h), 1024)
    return block, -(-h // block)


def run_combine(y: Tensor, place_of: Tensor, weights: Tensor | None, out: Tensor, top_k: int) -> None:
    """Sum a token's choices: y [parts, rows, h], places int32 [tokens * top_k], weights [tokens, top_k] or None."""
    tokens, h = out.shape
    block, blocks = columns_of(h)
    _KERNELS.combine[(tokens, blocks)](
        y, place_of, y if weights is None else weights, out, y.stride(0),
        top_k, weights is not None, len(y), h, block, ptx_of(out.device),
        num_warps=4, **overlap(out.device, tokens * blocks),
    )  # fmt: skip


def act_in_torch(kind: str, params: Mapping[str, float], gate: Tensor | None, up: Tensor) -> Tensor:
    """Apply the nonlinearity to float32 sums, where the kernel could not."""
    return apply_act(kind, gate, up, params)


def room_for_tables(dispatch: Dispatch, constants: Tensor | None, device: torch.device) -> Tables:
    """Make room for the tables of one call; a captured graph keeps its memory. `constants` of an earlier call."""
    if constants is None:
        return allocate(dispatch, device)
    blocks = 0 if dispatch.assignments <= FEW_ASSIGNMENTS else -(-dispatch.assignments // MANY_ROWS)
    words = torch.empty(dispatch.words, dtype=torch.int32, device=device)
    scratch = torch.empty(blocks * dispatch.expert_width, dtype=torch.int32, device=device)
    return Tables(dispatch, words, constants, scratch)
