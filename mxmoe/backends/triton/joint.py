"""
A routed bank and a shared expert in the same launches.

The shared expert is one more lane of the schedule, which sees every token, and keeps its own width: classes of tiles
carry their sizes. Between the GEMMs its rows lie behind the routed ones, whole: what is quantized per token has one
scale for all of its channels, as when the expert runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mxmoe.backends.triton import kernels_joint
from mxmoe.backends.triton.bank import Bank
from mxmoe.backends.triton.choose_ada import config_for
from mxmoe.backends.triton.dispatch import Dispatch, Tables, power_of_two_from
from mxmoe.backends.triton.launch import (
    Epilogue,
    Matrices,
    Rows,
    begin,
    columns_of,
    hadamard,
    reads_sorted,
    room_for_tables,
    run_gemm,
    to_make,
)
from mxmoe.backends.triton.layout import Arena
from mxmoe.backends.triton.mode import overlap, ptx_of
from mxmoe.backends.triton.rows import RowKind
from mxmoe.backends.triton.tiles import Config, Gemm, classes_of

# a launch takes options that are no arguments of the kernel
_KERNELS: Any = kernels_joint

JOINED = ("routed", "shared")
"""Banks that one set of launches may run, in the order of their lanes."""
MOST_TOKENS = 16
"""
Tokens up to which banks run together whatever kernel multiplies them; beyond, where the divided one does both GEMMs.

On an H200 that saves 20 to 30 us of a block of Qwen1.5-MoE with 1 to 300 tokens (`benchmarks/joined_banks.py`). With
many rows either bank has tiles of its own, and where loading is not divided from multiplying, the compiler would give
every class of the shared expert's tiles memory for itself.
"""
MOST_ROWS = 1 << 18
"""Assignments up to which banks run together: more tokens are run in turns (`executable.MAX_ROWS`)."""


@dataclass(frozen=True, eq=False)
class Joint:
    """A routed bank and a shared expert, as one GEMM in and one out; the last lane is the shared expert's."""

    entry: Matrices
    down: Matrices
    epilogue: Epilogue
    kinds: tuple[tuple[RowKind, ...], tuple[RowKind, ...]]
    """Rows that the input of down is held in, of the routed bank and of the shared one."""
    turns: tuple[int, int]
    """Channels of the Hadamard blocks that it is turned by."""
    between: Callable[[torch.dtype], torch.dtype]
    """Type of the tokens -> type in which it waits."""
    top_k: int
    """Of the router."""
    chosen: dict[tuple[int, int], tuple[Config, Config]] = field(default_factory=dict)
    """Tiles of both GEMMs, by tokens and top_k."""
    constants: dict[tuple[int, int, tuple[Config, ...]], Tensor] = field(default_factory=dict)
    """What the schedule's kernels read, by tokens, top_k and configs: uploaded once."""

    @classmethod
    def of(cls, routed: Bank, shared: Bank, rooms: Sequence[Tensor], top_k: int) -> Joint:
        """Join two banks whose matrices lie one behind the other in `rooms`, of the GEMM in and of the GEMM out."""
        pairs = zip(routed.gemms, shared.gemms, rooms, strict=True)
        entry, down = (_joined(one, other, room) for one, other, room in pairs)
        kinds = (routed.down.gemm.row_kinds, shared.down.gemm.row_kinds)
        epilogue = Epilogue(routed.act, tuple(routed.act_params.values()))
        finer = shared if any(kind.format == "fp16" for kind in kinds[1]) else routed
        return cls(entry, down, epilogue, kinds, (routed.turn, shared.turn), finer.between, top_k)

    @property
    def widths(self) -> tuple[int, int]:
        """Channels between the GEMMs, of a routed expert and of the shared one."""
        always = self.down.gemm.always
        assert always is not None, "joined"
        return self.down.gemm.k, always[1]

    def takes(self, tokens: int, top_k: int) -> bool:
        """Say whether both banks of so many tokens run in the same launches."""
        if not 0 < tokens * top_k <= MOST_ROWS:
            return False
        return tokens <= MOST_TOKENS or all(map(reads_sorted, self.configs(tokens, top_k)))

    def configs(self, tokens: int, top_k: int) -> tuple[Config, Config]:
        """Choose the tiles of both GEMMs; the shared expert's are its own where the kernel is divided."""
        key = (tokens, top_k)
        if key not in self.chosen:
            self.chosen[key] = (self._config(self.entry.gemm, *key), self._config(self.down.gemm, *key))
        return self.chosen[key]

    def _config(self, gemm: Gemm, tokens: int, top_k: int) -> Config:
        config = config_for(gemm, tokens, top_k, self.down.arena.data.device)
        if not reads_sorted(config):
            return config
        from mxmoe.backends.triton import hopper  # its kernels are no Python that the interpreter runs

        return hopper.with_always(gemm, config, tokens)

    def run(self, hidden: Tensor, index: Tensor, weights: Tensor, routed: Tensor, shared: Tensor) -> None:
        """
        Run checked tokens [tokens, hidden], at least one, through their experts and the shared one.

        Args:
            hidden: contiguous, as all others.
            index: [tokens, top_k]; what is no expert is padding.
            weights: [tokens, top_k].
            routed: [tokens, hidden] to write, the weighted sum.
            shared: [tokens, hidden] to write.
        """
        tokens, top_k = index.shape
        configs = self.configs(tokens, top_k)
        tables = self.tables(tokens, top_k, configs)
        narrow, wide = self.widths
        dtype = self.between(hidden.dtype)
        act = hidden.new_empty((1, tables.dispatch.beyond + tokens * (wide // narrow), narrow), dtype=dtype)
        is_sorted = reads_sorted(configs[0])
        read = begin(tables, index, hidden, self.entry.gemm.row_kinds, is_sorted=is_sorted)
        gemm = self.down.gemm
        few_next = bool(to_make(gemm.row_kinds, dtype, max(self.turns)))
        run_gemm(
            self.entry, configs[0], read, tables, 0, act, self.epilogue, gather=not is_sorted, few_next=few_next
        )  # fmt: skip
        parts = max(configs[1].shape(scheme).parts for scheme in gemm.distinct)
        dtype = torch.float32 if parts > 1 else dtype
        y = torch.empty((parts, tables.dispatch.rows, gemm.n), dtype=dtype, device=act.device)
        read = self._down_rows(act.view(-1), tables.dispatch)
        run_gemm(self.down, configs[1], read, tables, 1, y, Epilogue(), gather=False, few_next=True)
        block, blocks = columns_of(gemm.n)
        _KERNELS.combine_both[(tokens, blocks)](
            y, tables.table("place_of"), weights, routed, shared, tokens * top_k, y.stride(0),
            top_k, parts, gemm.n, block, ptx_of(act.device),
            num_warps=4, **overlap(act.device, tokens * blocks),
        )  # fmt: skip

    def tables(self, tokens: int, top_k: int, configs: tuple[Config, ...]) -> Tables:
        """Make room for the schedule of both GEMMs."""
        pair = zip((self.entry, self.down), configs, strict=True)
        tilings = tuple(classes_of(one.gemm, config)[0] for one, config in pair)
        dispatch = Dispatch(len(self.down.gemm.schemes) - 1, top_k, tokens, tilings, always=1)
        key = (tokens, top_k, configs)
        tables = room_for_tables(dispatch, self.constants.get(key), self.down.arena.data.device)
        self.constants[key] = tables.constants
        return tables

    def _down_rows(self, act: Tensor, dispatch: Dispatch) -> Rows:
        """Bring what lies between the GEMMs into the kinds of rows that down multiplies: routed rows, then shared."""
        counts = (dispatch.assignments, dispatch.tokens)
        beyond = dispatch.beyond
        none = torch.empty(0, dtype=torch.float32, device=act.device)
        codes, scales = dict[RowKind, Tensor](), dict[RowKind, Tensor]()
        parts: tuple[list[tuple[RowKind, Tensor, Tensor]], ...] = ([], [])
        made = to_make(self.down.gemm.row_kinds, act.dtype, max(self.turns))
        for kind in self.down.gemm.row_kinds:
            if kind not in made:
                codes[kind], scales[kind] = act, none
                continue
            groups = [-(-width // kind.group) if kind.group else 1 for width in self.widths]
            codes[kind] = torch.empty(len(act), dtype=kind.dtype, device=act.device)
            held = beyond * groups[0] + counts[1] * groups[1]
            scales[kind] = torch.empty(held, dtype=torch.float32, device=act.device)
            for which, part in enumerate(parts):
                if kind in self.kinds[which]:
                    at = (beyond * self.widths[0], beyond * groups[0]) if which else (0, 0)
                    part.append((kind, codes[kind][at[0] :], scales[kind][at[1] :]))
        self._prepare(act, beyond, (counts[0] if parts[0] else 0, counts[1] if parts[1] else 0), parts)
        kinds = self.down.gemm.row_kinds
        return Rows(tuple(codes[kind] for kind in kinds), tuple(scales[kind] for kind in kinds))

    def _prepare(
        self, act: Tensor, beyond: int, counts: tuple[int, int], parts: Sequence[list[tuple[RowKind, Tensor, Tensor]]]
    ) -> None:
        """Launch a program for each row of either bank that is wanted in other kinds than `act` is."""
        if not sum(counts):
            return
        longest = max(kind.group for kind in self.down.gemm.row_kinds)
        held = zip(self.widths, self.turns, strict=True)
        blocks = [power_of_two_from(max(width, 16 * turn, longest)) for width, turn in held]
        sources = (act, act[beyond * self.widths[0] :])
        pointers, constants = list[object](), list[object]()
        for which, (part, turn) in enumerate(zip(parts, self.turns, strict=True)):
            made = [tuple(one[field] for one in part) for field in (1, 2)]
            matrix = hadamard(turn, act.dtype, act.device) if turn else act
            pointers += [sources[which], *made, matrix, *([] if which else [counts[0]])]
            constants += [self.widths[which], blocks[which], tuple(kind.spec for kind, _, _ in part), turn]
        warps = 16 if max(blocks) > 8192 else 8 if max(blocks) > 2048 else 4
        _KERNELS.prepare_both[(sum(counts),)](
            *pointers, *constants, ptx_of(act.device), num_warps=warps, **overlap(act.device, sum(counts))
        )  # fmt: skip


def _joined(one: Matrices, other: Matrices, room: Tensor) -> Matrices:
    """Give the matrices of two GEMMs, the second with one expert, as lanes of one."""
    first, second = one.arena, other.arena
    schemes = (*first.schemes, *second.schemes)
    base = torch.cat((first.base, second.base + first.data.numel()), dim=1)
    starts = tuple(tuple(int(at) for at in lane) for lane in base.flatten(0, 1).tolist())
    arena = Arena(first.n, first.k, schemes, first.matrices, room, base, starts)  # pyright: ignore[reportArgumentType]
    gemm = replace(one.gemm, schemes=schemes, always=(other.gemm.n, other.gemm.k))
    return Matrices(gemm, arena, None)
