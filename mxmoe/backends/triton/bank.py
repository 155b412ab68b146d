"""A bank of experts on the GPU: GEMMs in, the nonlinearity between, the GEMM out, and the launches that run them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mxmoe.backends.triton.choose_ada import config_for
from mxmoe.backends.triton.dispatch import Dispatch, Tables
from mxmoe.backends.triton.launch import (
    FUSED,
    Epilogue,
    Matrices,
    act_in_torch,
    begin,
    make_rows,
    reads_sorted,
    room_for_tables,
    run_combine,
    sort_rows,
    to_make,
)
from mxmoe.backends.triton.native import multiply
from mxmoe.backends.triton.schedule import allocate, build
from mxmoe.backends.triton.tiles import Config, classes_of


@dataclass(frozen=True, eq=False)
class Bank:
    """One compiled bank: the GEMMs in, the nonlinearity between, the GEMM out."""

    experts: int
    entries: tuple[Matrices, ...]
    """Gate and up as one; or gate and up, or up alone, each for itself."""
    names: tuple[tuple[str, ...], ...]
    """Names of the weights of each entry, gate first, then of `down`."""
    bias_names: tuple[tuple[str, ...], ...]
    act: str
    act_params: Mapping[str, float]
    down: Matrices
    fuses: bool = True
    turn: int = 0
    """Channels of the Hadamard blocks that the input of down is turned by; 0 for none."""
    constants: dict[tuple[int, int, tuple[Config, ...]], Tensor] = field(default_factory=dict)
    """What the schedule's kernels read, by tokens, top_k and configs: uploaded once."""

    @property
    def gemms(self) -> tuple[Matrices, ...]:
        """All GEMMs, down last."""
        return (*self.entries, self.down)

    @property
    def is_fused(self) -> bool:
        """Whether the nonlinearity runs at the end of the first GEMM."""
        return self.fuses and len(self.entries) == 1 and self.act in FUSED

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales, zero points and biases."""
        return sum(one.nbytes for one in self.gemms)

    def between(self, hidden: torch.dtype) -> torch.dtype:
        """Type in which down's input waits: the tokens', or float32 where that is coarser than what down multiplies."""
        is_finer = any(kind.format == "fp16" for kind in self.down.gemm.row_kinds)
        return torch.float32 if is_finer and hidden == torch.bfloat16 else hidden

    @property
    def is_apart(self) -> bool:
        """Whether every matrix has a launch of its own."""
        return all(one.arena.matrices == 1 for one in self.entries)

    def apart(self) -> Bank:
        """Give the same bank with gate and up made one by one and the nonlinearity in torch, to look at each."""
        entries = self.entries if self.is_apart else tuple(one.alone(i) for one in self.entries for i in range(2))
        return replace(self, entries=entries, fuses=False)

    def configs(self, tokens: int, top_k: int) -> tuple[Config, ...]:
        """Tiles of every GEMM for a call of so many tokens."""
        device = self.down.arena.data.device
        plain = not (self.is_fused and self.entries[0].gemm.gated)
        entries = (config_for(one.gemm, tokens, top_k, device, is_plain=plain).whole() for one in self.entries)
        down = config_for(self.down.gemm, tokens, top_k, device)
        # a launch on INT4 units has no parts
        return (*entries, down.whole() if self.down.int4 else down)

    def tables(self, tokens: int, top_k: int, configs: tuple[Config, ...]) -> Tables:
        """Make room for the schedule of entry and down."""
        pair = ((self.entries[0], configs[0]), (self.down, configs[-1]))
        tilings = tuple(classes_of(one.gemm, config)[0] for one, config in pair)
        dispatch = Dispatch(self.experts, top_k, tokens, tilings)
        key = (tokens, top_k, configs)
        tables = room_for_tables(dispatch, self.constants.get(key), self.down.arena.data.device)
        self.constants[key] = tables.constants
        return tables

    def run(self, hidden: Tensor, index: Tensor, weights: Tensor, configs: tuple[Config, ...]) -> dict[str, Tensor]:
        """
        Run checked tokens [tokens, hidden] through their experts.

        Returns:
            What the steps made: `act` by sorted row, `down` [parts of k, sorted rows, hidden], `out` [tokens, hidden];
            `gate` and `up` where they were made apart.
        """
        tables = self.tables(len(index), index.shape[1], configs)
        rows = tables.dispatch.rows
        made: dict[str, Tensor] = {}
        if self.is_fused:
            kinds = self.entries[0].gemm.row_kinds
            act = hidden.new_empty((1, rows, self.entries[0].gemm.n), dtype=self.between(hidden.dtype))
            epilogue = Epilogue(self.act, tuple(self.act_params.values()))
            is_sorted = reads_sorted(configs[0])
            read = begin(tables, index, hidden, kinds, is_sorted=is_sorted)
            multiply(
                self.entries[0], configs[0], read, tables, 0, act, epilogue, gather=not is_sorted, x=hidden,
                few_next=bool(to_make(self.down.gemm.row_kinds, act.dtype, self.turn)),
            )  # fmt: skip
            made["act"] = act[0]
        else:
            build(tables, index)
            made |= self._apart(hidden, index, configs, tables)
        down = self._down(made["act"], tables, configs[-1])
        made |= {"down": down, "out": torch.empty_like(hidden)}
        run_combine(down, tables.table("place_of"), weights, made["out"], index.shape[1])
        return made

    def _apart(self, hidden: Tensor, index: Tensor, configs: tuple[Config, ...], tables: Tables) -> dict[str, Tensor]:
        """Run entries one by one, and the nonlinearity in torch: for gate and up of different schemes."""
        sums: list[Tensor] = []
        for one, config in zip(self.entries, configs, strict=False):
            mine = tables if one is self.entries[0] else self._own_schedule(one, config, index)
            y = torch.empty((1, tables.dispatch.rows, one.gemm.n), dtype=torch.float32, device=hidden.device)
            is_sorted, kinds = reads_sorted(config), one.gemm.row_kinds
            read = sort_rows(mine, hidden, kinds) if is_sorted else make_rows(hidden, kinds)
            multiply(one, config, read, mine, 0, y, Epilogue(), gather=not is_sorted, x=hidden)
            sums.append(y[0])
        gate, up = (sums[0], sums[1]) if len(sums) == 2 else (None, sums[0])
        act = act_in_torch(self.act, self.act_params, gate, up).to(self.between(hidden.dtype))
        return {**({} if gate is None else {"gate": gate}), "up": up, "act": act}

    def _own_schedule(self, one: Matrices, config: Config, index: Tensor) -> Tables:
        tokens, top_k = index.shape
        tables = allocate(Dispatch(self.experts, top_k, tokens, (classes_of(one.gemm, config)[0],)), index.device)
        build(tables, index)
        return tables

    def _down(self, act: Tensor, tables: Tables, config: Config) -> Tensor:
        gemm = self.down.gemm
        parts = max(config.shape(scheme).parts for scheme in gemm.distinct)
        dtype = torch.float32 if parts > 1 else act.dtype
        y = torch.empty((parts, tables.dispatch.rows, gemm.n), dtype=dtype, device=act.device)
        read = make_rows(act, gemm.row_kinds, self.turn)
        multiply(self.down, config, read, tables, 1, y, Epilogue(), gather=False, x=act, turn=self.turn, few_next=True)
        return y
