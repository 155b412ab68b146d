"""A compiled block: packed banks, and the call that routes, quantizes, multiplies and combines."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mxmoe.backends.numba import kernels
from mxmoe.backends.numba.layout import Arena, read_back
from mxmoe.backends.numba.tiles import tile_list
from mxmoe.backends.routing import Routing, check_call, sort_assignments
from mxmoe.errors import NoSuchBank, WrongDevice
from mxmoe.ir import Scheme, Tile
from mxmoe.quant import Packed, apply_act, quantize_activation, rotate

MAX_ROWS = 16384
"""Assignments that are run at once; more tokens are run in turns, which bounds the memory between the GEMMs."""

ALONE = 2**20
"""Multiply-adds below which one thread is done before a second one has woken up."""

_LAUNCH = threading.Lock()


@dataclass(frozen=True, eq=False)
class GroupGemm:
    """One group GEMM: its packed matrices and the tile of each expert."""

    arena: Arena
    n: int
    """Output channels of one weight."""
    tiles: tuple[Tile, ...]
    """[expert]."""
    weights: tuple[str, ...]
    """Names of the weights that share the rows."""
    biases: tuple[str, ...]
    """Names of their biases, or empty."""

    @property
    def n_weights(self) -> int:
        """Weights that share the rows: 2 for a fused gate_up."""
        return len(self.weights)

    def packed(self, name: str, expert: int) -> Packed:
        """Give one matrix back as it was packed."""
        return read_back(self.arena, self.weights.index(name) * len(self.tiles) + expert)

    def bias(self, name: str) -> Tensor:
        """Give a bias back, float32 [experts, n]."""
        stacked = torch.from_numpy(self.arena.bias).reshape(len(self.weights), len(self.tiles), self.n)
        return stacked[self.biases.index(name)]

    @cached_property
    def _tile_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of each expert's tile, int64 [expert]."""
        return np.array([tile.m for tile in self.tiles]), np.array([tile.n for tile in self.tiles])

    def __call__(self, x: Tensor, source: Tensor, routing: Routing) -> Tensor:
        """
        Multiply rows of `x` by their experts' weights.

        Args:
            x: float [rows, k].
            source: int64 [assignments], which row of `x` each assignment reads.
            routing: the assignments, by expert.

        Returns:
            float32 [weights, assignments, n].
        """
        inputs = _quantize_rows(x, source, routing, self.arena.schemes)
        y = torch.empty((self.n_weights, len(source), self.n), dtype=torch.float32)
        items = tile_list(routing.counts.numpy(), *self._tile_sizes, self.n)
        if self.n_weights > 1:
            again = [items + np.array([weight * len(self.tiles), 0, 0, 0, 0]) for weight in range(self.n_weights)]
            items = np.stack(again, axis=1).reshape(-1, 5)
        arena = self.arena
        with _launching(y.numel() * x.shape[1]):
            kernels.group_gemm(items, arena.matrices, arena.payload, arena.meta, arena.bias, *inputs, y.numpy())
        return y


@dataclass(frozen=True, eq=False)
class Bank:
    """One compiled bank: the GEMMs in, the nonlinearity between, the GEMM out."""

    experts: int
    entries: tuple[GroupGemm, ...]
    """A fused gate_up, or gate and up, or up alone."""
    act_inputs: tuple[tuple[int, int], ...]
    """For each input of the nonlinearity, gate first: which of `entries`, and which of its weights."""
    act: str
    act_params: Mapping[str, float]
    hadamard: int
    """Channels that are rotated together behind the nonlinearity; 0: none are."""
    down: GroupGemm

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and biases."""
        return sum(gemm.arena.nbytes for gemm in (*self.entries, self.down))

    def run(self, hidden: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """
        Run checked tokens [tokens, hidden] through their experts.

        Returns:
            What every step made, in float32: `gate`, `up`, `act` and `down` [assignments, width], by expert and within
            an expert by token, and `out` [tokens, hidden].
        """
        routing = sort_assignments(index, weights, self.experts)
        outs = [gemm(hidden, routing.token, routing) for gemm in self.entries]
        inputs = [outs[gemm][weight] for gemm, weight in self.act_inputs]
        gate, up = inputs if len(inputs) == 2 else (None, inputs[0])
        act = apply_act(self.act, gate, up, self.act_params)
        act = rotate(act, self.hadamard) if self.hadamard else act
        rows = torch.arange(len(routing.token))
        down = self.down(act, rows, routing)[0]
        slots = torch.full(index.shape, -1, dtype=torch.int64)
        slots[routing.token, routing.slot] = rows
        out = torch.empty((len(hidden), down.shape[1]), dtype=torch.float32)
        with _launching(down.numel()):
            kernels.combine(down.numpy(), slots.numpy(), weights.to(torch.float32).contiguous().numpy(), out.numpy())
        return {**({} if gate is None else {"gate": gate}), "up": up, "act": act, "down": down, "out": out}


@dataclass(frozen=True, eq=False)
class NumbaExecutable:
    """A block that runs on the CPU from packed weights. Deterministic: equal calls give equal bits."""

    block: str
    hidden: int
    banks: Mapping[str, Bank]

    def packed(self, name: str, expert: int) -> Packed:
        """See `mxmoe.target.Executable`."""
        return next(gemm for gemm in self._gemms() if name in gemm.weights).packed(name, expert)

    def bias(self, name: str) -> Tensor:
        """See `mxmoe.target.Executable`."""
        return next(gemm for gemm in self._gemms() if name in gemm.biases).bias(name)

    def _gemms(self) -> Iterator[GroupGemm]:
        for bank in self.banks.values():
            yield from (*bank.entries, bank.down)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and biases held; there is no other copy of the weights."""
        return sum(bank.nbytes for bank in self.banks.values())

    @torch.no_grad()
    def __call__(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Run one bank; see `mxmoe.target.Executable`.

        Raises:
            NoSuchBank: the block has no such bank.
            BadHidden, BadRouting, WrongDevice: arguments that do not fit the block.
        """
        compiled = self._checked(bank, hidden, top_k_index, top_k_weights)
        out = torch.empty_like(hidden)
        step = max(1, MAX_ROWS // max(1, top_k_index.shape[1]))
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            out[part] = compiled.run(hidden[part], top_k_index[part], top_k_weights[part])["out"]
        return out

    @torch.no_grad()
    def trace(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> dict[str, Tensor]:
        """Run one bank and keep what every step made, as `EagerExecutable.trace` does. Raises what a call raises."""
        return self._checked(bank, hidden, top_k_index, top_k_weights).run(hidden, top_k_index, top_k_weights)

    def _checked(self, bank: str, hidden: Tensor, index: Tensor, weights: Tensor) -> Bank:
        """Check a call, and give the bank that it asks for."""
        if bank not in self.banks:
            raise NoSuchBank(block=self.block, bank=bank, known=", ".join(self.banks))
        compiled = self.banks[bank]
        for tensor in (hidden, index, weights):  # first: checking a call reads the index
            if tensor.device.type != "cpu":
                raise WrongDevice(backend="numba", block=self.block, home="cpu", device=tensor.device)
        check_call(self.block, self.hidden, compiled.experts, hidden, index, weights)
        return compiled


@contextmanager
def _launching(multiply_adds: int) -> Generator[None]:
    """
    Hold numba's threads: as many as the work needs, one tile at a time each, so that the longest tiles start first.

    One launch at a time in the process: numba's fallback threading layer must not be entered from two threads.
    """
    with _LAUNCH, numba.parallel_chunksize(1):
        threads = numba.get_num_threads()
        numba.set_num_threads(1 if multiply_adds < ALONE else threads)
        try:
            yield
        finally:
            numba.set_num_threads(threads)


def _quantize_rows(x: Tensor, source: Tensor, routing: Routing, schemes: Sequence[Scheme]) -> tuple[np.ndarray, ...]:
    """
    Prepare activations as each expert's scheme wants them: x_float, x_int, x_scale, source of `kernels.group_gemm`.

    Experts that treat activations alike share the result; rows that no such expert reads are not prepared.
    """
    used = [expert for expert, count in enumerate(routing.counts.tolist()) if count]
    kinds = {expert: _activation_kind(schemes[expert]) for expert in used}
    floats: list[Tensor] = []
    codes: list[Tensor] = []
    scales: list[Tensor] = []
    where = torch.empty(len(source), dtype=torch.int64)
    for kind in dict.fromkeys(kinds.values()):
        members = [expert for expert in used if kinds[expert] == kind]
        mine = slice(None) if len(members) == len(used) else torch.isin(routing.expert, torch.tensor(members))
        picked = source[mine]
        whole = len(x) <= len(picked)
        rows = x if whole else x[picked]
        position = picked if whole else torch.arange(len(picked))
        scheme = schemes[members[0]]
        code, scale = quantize_activation(rows, scheme)
        if scheme.act_format == "int":
            where[mine] = position + sum(map(len, codes))
            codes.append(code)
            scales.append(scale)
        else:  # one scale per token, and 1 for 16 bits
            where[mine] = position + sum(map(len, floats))
            floats.append(code.to(torch.float32).mul_(scale))
    return (
        _rows_of(floats, -(-x.shape[1] // 8) * 8, torch.float32),
        _rows_of(codes, x.shape[1], torch.int8),
        _rows_of(scales, max((scale.shape[1] for scale in scales), default=1), torch.float32),
        where.numpy().view(np.uint64),
    )


def _activation_kind(scheme: Scheme) -> tuple[object, ...]:
    return scheme.act_bits, scheme.act_format, scheme.act_group_size


def _rows_of(parts: Sequence[Tensor], width: int, dtype: torch.dtype) -> np.ndarray:
    """Stack parts [rows, at most width], filled up with zeros to `width`."""
    wide = [functional.pad(part, (0, width - part.shape[1])) if part.shape[1] < width else part for part in parts]
    if not wide:
        return np.empty((0, width), torch.empty(0, dtype=dtype).numpy().dtype)
    return (wide[0] if len(wide) == 1 else torch.cat(wide)).contiguous().numpy()
