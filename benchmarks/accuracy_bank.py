"""
The experts of a whole model in every scheme at once, and a model that runs any mix of them without being rebuilt.

A `Shelf` holds the codes of all experts of all blocks, quantized in stacks; a `Mixed` model is a copy whose banks read
one stack of decoded weights, so that another plan costs one gather. What is computed is the definition's: activations
quantized per token, weights decoded to float32; on a GPU the products run in TF32, whose 11 bits hold every decoded
weight of up to 3 bits and 16-bit floats, and are off by 2^-12 of themselves at most elsewhere.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mxmoe.calib import Hessians
from mxmoe.frontend import Lifted
from mxmoe.ir import BankShape, Row, Scheme, rows_of
from mxmoe.quant import (
    Quantized,
    Quantizer,
    apply_act,
    dequantize,
    fake_quantize_activation,
    find_quantizer,
    quantize_each,
    rotate,
)

Place = tuple[str, str]
"""(bank, role): what is held in one stack over all blocks."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the linears of a lifted model are in the stacks; all blocks have banks of one shape."""

    lifted: Lifted
    rows: tuple[Row, ...]
    """Every decision, in the order of plans."""
    shapes: Mapping[str, BankShape]
    """Bank -> the shape that its blocks share."""
    at: Mapping[Place, NDArray[np.int64]]
    """(bank, role) -> for every matrix of the stack [blocks * experts] its place in `rows`."""

    @classmethod
    def of(cls, lifted: Lifted) -> Layout:
        """Order the linears of a model."""
        rows = tuple(rows_of(lifted.module))
        shapes = {name: bank.shape for name, bank in lifted.blocks[0].banks.items()}
        for block in lifted.blocks:
            for name, bank in block.banks.items():
                is_like = (bank.shape.experts, bank.shape.intermediate) == (
                    shapes[name].experts,
                    shapes[name].intermediate,
                )
                assert is_like, f"{block.name} {name} is unlike the first block's"
                assert not bank.shape.biases, f"{block.name} {name} has biases"
        at: dict[Place, list[int]] = {}
        for number, row in enumerate(rows):
            at.setdefault((row.bank, row.role), []).append(number)
        return cls(lifted, rows, shapes, {place: np.array(found) for place, found in at.items()})

    def dense(self, place: Place) -> Tensor:
        """Stack the weights of a role over all blocks, float32 [blocks * experts, n, k]."""
        bank, role = place
        names = [block.banks[bank].shape.weights[role] for block in self.lifted.blocks]
        return torch.cat([self.lifted.weights[name].detach().float() for name in names])

    def hessians(self, place: Place, hessians: Hessians) -> Tensor:
        """Stack the Hessians of a role over all blocks, float32 [blocks * experts, k, k]."""
        bank, role = place
        return torch.cat([hessians.stack(block.banks[bank].shape.weights[role]) for block in self.lifted.blocks])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[rows], weights of each."""
        sizes = np.zeros(len(self.rows), np.int64)
        for (bank, role), places in self.at.items():
            weight = self.lifted.weights[self.lifted.blocks[0].banks[bank].shape.weights[role]]
            sizes[places] = weight.shape[1] * weight.shape[2]
        return sizes

    def bits(self, schemes: Sequence[Scheme]) -> NDArray[np.float64]:
        """[rows, schemes], effective bits per weight."""
        bits = np.zeros((len(self.rows), len(schemes)))
        for (bank, role), places in self.at.items():
            weight = self.lifted.weights[self.lifted.blocks[0].banks[bank].shape.weights[role]]
            bits[places] = [scheme.effective_bits(weight.shape[2]) for scheme in schemes]
        return bits


@dataclass(frozen=True, eq=False)
class Shelf:
    """Every expert in every scheme, under one quantizer."""

    layout: Layout
    schemes: tuple[Scheme, ...]
    held: Mapping[tuple[str, str, Scheme], Quantized]
    """(bank, role, scheme) -> stack [blocks * experts, n, k]."""
    rotation: int | None
    """Channels that are rotated together on their way to down."""
    _names: dict[str, tuple[str, str, int]] = field(default_factory=dict[str, tuple[str, str, int]])

    def one(self, label: str, scheme: Scheme) -> Quantized:
        """Give one matrix by the label under which the observation asks for it, `block.bank[expert].role`."""
        if not self._names:
            for (bank, role), places in self.layout.at.items():
                for number, place in enumerate(places.tolist()):
                    row = self.layout.rows[place]
                    self._names[f"{row.block}.{bank}[{row.expert}].{role}"] = (bank, role, number)
        bank, role, number = self._names[label]
        return self.held[bank, role, scheme][number]

    def quantizer(self) -> Quantizer:
        """Give a quantizer that looks up what is held, so that sensitivities are those of these very codes."""

        def look_up(
            weight: Tensor, scheme: Scheme, *, name: str = "weight", hessian: Tensor | None = None
        ) -> Quantized:
            del weight, hessian
            return self.one(name, scheme)

        return look_up


def fill_shelf(
    layout: Layout,
    schemes: Sequence[Scheme],
    quantizer: Mapping[str, str] | str,
    hessians: Hessians | None = None,
    rotation: int | None = None,
    like: Shelf | None = None,
) -> Shelf:
    """
    Quantize all experts, one stack of all blocks at a time.

    Gate and up share their input and its Hessian, so they are quantized as one matrix: rows do not see each other.

    Args:
        layout: of the model.
        schemes: to quantize to; schemes with equal weights share their codes.
        quantizer: name, or one for weight-only schemes ("a16") and one for the others ("").
        hessians: what the quantizer may use, of inputs that are not rotated.
        rotation: channels that are rotated together on their way to down.
        like: a shelf that differs in the rotation only: its gate and up are taken.
    """
    named = {"a16": quantizer, "": quantizer} if isinstance(quantizer, str) else quantizer
    held: dict[tuple[str, str, Scheme], Quantized] = {}
    for bank, shape in layout.shapes.items():
        entry = tuple(role for role in shape.weights if role != "down")
        for roles in (entry, ("down",)):
            if like is not None and roles == entry:
                held |= {key: q for key, q in like.held.items() if key[0] == bank and key[1] != "down"}
                continue
            stacks = [layout.dense((bank, role)) for role in roles]
            hessian = None if hessians is None else layout.hessians((bank, roles[0]), hessians)
            weight = torch.cat(stacks, dim=1)
            if roles == ("down",) and rotation is not None:
                weight = rotate(weight, rotation)
                hessian = None if hessian is None else rotate(rotate(hessian, rotation).mT, rotation).mT.contiguous()
            label = f"{bank} {'+'.join(roles)}"
            done: dict[tuple[object, ...], Quantized] = {}
            for acts, text in named.items():
                wanted = {_weights_of(s): s for s in schemes if ("a16" if s.act_bits == 16 else "") == acts}
                wanted = {key: scheme for key, scheme in wanted.items() if key not in done}
                found = quantize_each(find_quantizer(text), weight, [*wanted.values()], name=label, hessian=hessian)
                done |= zip(wanted, found, strict=True)
            for scheme in schemes:
                parts = _split(done[_weights_of(scheme)], scheme, [stack.shape[1] for stack in stacks])
                held |= {(bank, role, scheme): part for role, part in zip(roles, parts, strict=True)}
    return Shelf(layout, tuple(schemes), held, rotation)


def _weights_of(scheme: Scheme) -> tuple[object, ...]:
    """Tell schemes apart by what they do to weights alone."""
    return scheme.weight_bits, scheme.group_size, scheme.symmetric, scheme.weight_format


def _split(q: Quantized, scheme: Scheme, sizes: Sequence[int]) -> list[Quantized]:
    """Cut a stack along its output channels."""
    parts = ([None] * len(sizes) if t is None else t.split(list(sizes), dim=1) for t in (q.codes, q.scale, q.zero))
    return [Quantized(scheme, codes, scale, zero) for codes, scale, zero in zip(*parts, strict=True)]


class Mixed:
    """A copy of a model whose banks run any plan over a shelf's schemes."""

    def __init__(self, layout: Layout) -> None:
        """Copy the model and put our banks in place of its own; they hold the weights as they were."""
        self.layout = layout
        self.model = copy.deepcopy(layout.lifted.root)
        self.stacks = {place: layout.dense(place) for place in layout.at}
        self.banks: list[MixedBank] = []
        for number, block in enumerate(layout.lifted.blocks):
            for name, bank in block.banks.items():
                places = slice(number * bank.shape.experts, (number + 1) * bank.shape.experts)
                weights = {role: self.stacks[name, role][places] for role in bank.shape.weights}
                self.banks.append(MixedBank(block.name, bank.shape, weights))
                self.model.set_submodule(bank.path, self.banks[-1])

    def take(self, shelf: Shelf, choice: Sequence[Scheme]) -> None:
        """Decode the weights of a plan, one scheme per row of the layout, into the banks."""
        wanted = np.array([shelf.schemes.index(scheme) for scheme in choice])
        for place, at in self.layout.at.items():
            stack, chosen = self.stacks[place], wanted[at]
            for column in np.unique(chosen).tolist():
                index = torch.from_numpy(np.flatnonzero(chosen == column)).to(stack.device)
                q = shelf.held[(*place, shelf.schemes[column])]
                picked = (None if part is None else part[index] for part in (q.codes, q.scale, q.zero))
                stack[index] = dequantize(Quantized(q.scheme, *picked))  # pyright: ignore[reportArgumentType]
        rows = {row: scheme for row, scheme in zip(self.layout.rows, choice, strict=True)}
        for bank in self.banks:
            bank.rotation = shelf.rotation
            bank.casts = {
                role: [_cast_of(rows[Row(bank.block, bank.shape.name, role, e)]) for e in range(bank.shape.experts)]
                for role in bank.shape.weights
            }


class MixedBank(nn.Module):
    """One bank of experts, each linear with activations of its own format."""

    def __init__(self, block: str, shape: BankShape, weights: Mapping[str, Tensor]) -> None:
        """Read `weights`, role -> float32 [experts, n, k], wherever they are written."""
        super().__init__()
        self.block, self.shape, self.weights = block, shape, weights
        self.rotation: int | None = None
        self.casts: dict[str, list[Scheme | None]] = {role: [None] * shape.experts for role in weights}

    @torch.no_grad()
    def forward(self, hidden: Tensor, *routing: Tensor) -> Tensor:
        """Run as the module in whose place it is: (hidden, index, weights), or (hidden) of a shared expert."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        with _fast_products(rows):
            if routing:
                return self._routed(rows, *routing).view_as(hidden).to(hidden.dtype)
            everyone = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            out = self._experts(rows, torch.arange(len(rows), device=rows.device), everyone)
            return out.view_as(hidden).to(hidden.dtype)

    def _routed(self, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Run every expert on its own rows, and add up in one order of summation, whatever the machine does."""
        ranked, order = index.flatten().sort(stable=True)
        token = torch.div(order, index.shape[1], rounding_mode="floor")
        out = self._experts(rows, token, ranked) * weight.flatten()[order, None].float()
        back = torch.empty_like(out)
        back[order] = out
        return back.view(len(rows), index.shape[1], -1).sum(1)

    def _experts(self, rows: Tensor, token: Tensor, expert: Tensor) -> Tensor:
        """Run assignment i, token[i] through expert[i], experts ascending: rows [tokens, k] -> [assignments, n]."""
        tiles = Tiles.of(expert, self.shape.experts)
        source = tiles.spread(token)
        entry = self._read("up", rows, tiles, source)
        first: Tensor | None = None
        if self.shape.gated:
            alike = self.casts["gate"] == self.casts["up"]
            first = self._product("gate", entry if alike else self._read("gate", rows, tiles, source), tiles)
        inner = apply_act(self.shape.act, first, self._product("up", entry, tiles), self.shape.act_params)
        if self.rotation is not None:
            inner = rotate(inner, self.rotation)
        in_place = torch.arange(len(source), device=rows.device)
        out = self._product("down", self._read("down", inner.flatten(0, 1), tiles, in_place), tiles)
        return out.flatten(0, 1)[tiles.slot]

    def _product(self, role: str, rows: Tensor, tiles: Tiles) -> Tensor:
        """Multiply each tile [tiles, size, k] by the weights of its expert."""
        weight = self.weights[role]
        return torch.bmm(rows, (weight if len(weight) == 1 else weight[tiles.expert]).mT)

    def _read(self, role: str, rows: Tensor, tiles: Tiles, source: Tensor) -> Tensor:
        """Cast rows [rows, k] as their experts read them, and lay row source[slot] into each slot: [tiles, size, k]."""
        distinct = list(dict.fromkeys(self.casts[role]))
        cast = torch.cat([_cast(rows, one) for one in distinct])
        if len(distinct) > 1:  # casts lie behind each other
            number = torch.tensor([distinct.index(one) for one in self.casts[role]], device=rows.device)
            source = source + number[tiles.expert].repeat_interleave(tiles.size) * len(rows)
        return cast[source].view(-1, tiles.size, rows.shape[-1])


@dataclass(frozen=True, eq=False)
class Tiles:
    """
    Assignments cut in tiles of one expert each, so that a product of all experts is one launch without a question.

    3 assignments to expert 0 and 1 to expert 1 in tiles of 2: slots 0, 1, 2 and 4 of tiles of experts 0, 0, 1. Tiles
    are as many as the worst routing needs, whatever the routing is: nothing waits for the device.
    """

    slot: Tensor
    """int64 [assignments], where each lies."""
    expert: Tensor
    """int64 [tiles], whose rows they hold; those behind the last that is used hold nothing of anybody."""
    size: int
    """Slots of a tile."""

    @classmethod
    def of(cls, expert: Tensor, experts: int) -> Tiles:
        """Lay out assignments to expert[i], ascending."""
        count, device = len(expert), expert.device
        if experts == 1:
            return cls(torch.arange(count, device=device), torch.zeros(1, dtype=torch.int64, device=device), count)
        # half of a tile of each expert is lost on average
        size = min(256, max(8, 1 << (max(1, count // (2 * experts)).bit_length() - 1)))
        starts = torch.searchsorted(expert, torch.arange(experts + 1, device=device))
        ends = torch.div(starts.diff() + size - 1, size, rounding_mode="floor").cumsum(0)
        first = torch.cat([ends.new_zeros(1), ends[:-1]])
        slot = first[expert] * size + torch.arange(count, device=device) - starts[expert]
        tiles = torch.arange(count // size + experts, device=device)
        return cls(slot, torch.searchsorted(ends, tiles, right=True).clamp(max=experts - 1), size)

    def spread(self, values: Tensor) -> Tensor:
        """Lay int64 values [assignments] into their slots, 0 into the others."""
        laid = values.new_zeros(len(self.expert) * self.size)
        laid[self.slot] = values
        return laid


def _cast_of(scheme: Scheme) -> Scheme | None:
    """Give one scheme for all that read activations alike."""
    if scheme.act_bits == 16:
        return Scheme.parse("bf16")
    return dataclasses.replace(
        scheme, weight_bits=8, group_size=scheme.act_group_size, symmetric=True, integer_scales=False
    )


def _cast(rows: Tensor, cast: Scheme | None) -> Tensor:
    return rows.float() if cast is None else fake_quantize_activation(rows, cast)


@contextmanager
def _fast_products(rows: Tensor) -> Generator[None]:
    """Let float32 products run in TF32 on a GPU."""
    if rows.device.type != "cuda":
        yield
        return
    before: Any = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
