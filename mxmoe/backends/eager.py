"""
The definition of every op: a module is run op by op in torch, at whatever stage it is. Others must agree with it.

One function per op type, in the table `RUN`. Dense weights at the stages `lifted` and `annotated`, the quantized ones
of the chosen schemes (`mxmoe.quant.matmul`) at `allocated` and `lowered`. Slow, and small enough to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from xdsl.ir import Operation

from mxmoe.backends.routing import Routing, check_call, sort_assignments
from mxmoe.errors import BadWeightShape, NoSuchBank
from mxmoe.ir import (
    ActOp,
    CombineOp,
    GroupGemmOp,
    LinearOp,
    ModuleOp,
    MoeOp,
    RouteOp,
    Scheme,
    Table,
    banks,
    moe_ops,
)
from mxmoe.quant import Packed, Quantized, apply_act, matmul, pack, rotate
from mxmoe.target import WeightSource


@dataclass(frozen=True)
class EagerBackend:
    """Runs the IR at every stage, in every scheme, on the device of the weights."""

    name = "eager"

    def ready(self) -> None:
        """See `mxmoe.target.Backend`: runs wherever torch does."""

    def supports(self, scheme: Scheme) -> bool:
        """Say whether a linear can run in this scheme: all can."""
        del scheme
        return True

    def compile(self, module: ModuleOp, weights: WeightSource) -> Mapping[str, EagerExecutable]:
        """
        Quantize every chosen weight: block name -> executable.

        Raises:
            BadWeightShape: a weight is not what the module says.
        """
        return {
            moe.block: EagerExecutable(moe, _chosen_weights(moe, weights), _dense(moe, weights))
            for moe in moe_ops(module)
        }


@dataclass(frozen=True, eq=False)
class EagerExecutable:
    """One block, run by walking over its ops."""

    moe: MoeOp
    quantized: Mapping[str, Sequence[Quantized]]
    """Weight name -> one per expert; empty before allocation."""
    weights: Mapping[str, Tensor]
    """What is read dense: biases, and before allocation the weights."""

    def packed(self, name: str, expert: int) -> Packed:
        """See `mxmoe.target.Executable`."""
        return pack(self.quantized[name][expert])

    def bias(self, name: str) -> Tensor:
        """See `mxmoe.target.Executable`."""
        return self.weights[name]

    @property
    def nbytes(self) -> int:
        """Bytes of codes (a byte each: not packed), scales, zero points and biases, or of the dense weights."""
        parts = [t for stack in self.quantized.values() for q in stack for t in (q.codes, q.scale, q.zero)]
        return sum(t.nbytes for t in (*parts, *self.weights.values()) if t is not None)

    @torch.no_grad()
    def __call__(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Run one bank; see `mxmoe.target.Executable`.

        Raises:
            NoSuchBank: the block has no such bank.
            BadHidden, BadRouting: arguments that do not fit the block.
        """
        return self.trace(bank, hidden, top_k_index, top_k_weights)["out"].to(hidden.dtype)

    @torch.no_grad()
    def trace(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> dict[str, Tensor]:
        """
        Run one bank and keep what every op made: role, `act` or `out` -> float32 [assignments or tokens, width].

        Assignments are ordered by expert, and within an expert by token. Raises what a call raises.
        """
        found = banks(self.moe)
        if bank not in found:
            raise NoSuchBank(block=self.moe.block, bank=bank, known=", ".join(found))
        route = found[bank].route
        check_call(self.moe.block, self.moe.hidden, route.experts, hidden, top_k_index, top_k_weights)
        routing = sort_assignments(top_k_index, top_k_weights, route.experts)
        state = _State(self, routing, len(hidden), {route.hidden_states: hidden.to(torch.float32)})
        for op in _chain(self.moe, route):
            RUN[type(op)](state, op)
        return state.trace


@dataclass(eq=False)
class _State:
    """What the ops of one bank have made so far."""

    executable: EagerExecutable
    routing: Routing
    tokens: int
    values: dict[Any, Tensor]
    """SSA value -> tensor; the routing of all ops is `routing`."""
    trace: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def set(self, value: Any, name: str, tensor: Tensor) -> None:  # noqa: ANN401  # xDSL: SSAValue of any type
        """Keep what an op made, for its users and for the trace."""
        self.values[value] = tensor
        self.trace[name] = tensor


def run_route(state: _State, op: RouteOp) -> None:
    """rows[i] = hidden[token of assignment i]."""
    state.values[op.rows] = state.values[op.hidden_states][state.routing.token]


def run_linear(state: _State, op: LinearOp) -> None:
    """out[i] = rows[i] @ weight[expert of i].T + bias[expert of i]."""
    state.set(op.out, op.role, _linear(state, state.values[op.rows], op.weight, op.bias, op.choice))


def run_group_gemm(state: _State, op: GroupGemmOp) -> None:
    """One linear per weight."""
    biases = op.biases or (None,) * len(op.weights)
    roles = op.role.split("_")
    for result, role, weight, bias in zip(op.outs, roles, op.weights, biases, strict=True):
        state.set(result, role, _linear(state, state.values[op.rows], weight, bias, op.choice))


def run_act(state: _State, op: ActOp) -> None:
    """act(gate, up), or act(up); rotated where the op says so."""
    inputs = [state.values[value] for value in op.inputs]
    gate, up = inputs if len(inputs) == 2 else (None, inputs[0])
    act = apply_act(op.kind, gate, up, op.params)
    state.set(op.out, "act", rotate(act, op.hadamard) if op.hadamard else act)


def run_combine(state: _State, op: CombineOp) -> None:
    """out[t] = ((0 + weight * row) + weight * row) + ... over the assignments of t, first slot first, in float32."""
    rows, routing = state.values[op.rows], state.routing
    out = torch.zeros((state.tokens, rows.shape[1]), dtype=torch.float32, device=rows.device)
    for slot in range(int(routing.slot.max()) + 1 if len(routing.slot) else 0):
        mine = routing.slot == slot
        out[routing.token[mine]] += routing.weight[mine, None] * rows[mine]
    state.set(op.out, "out", out)


RUN: Mapping[type, Callable[[_State, Any], None]] = {
    RouteOp: run_route,
    LinearOp: run_linear,
    GroupGemmOp: run_group_gemm,
    ActOp: run_act,
    CombineOp: run_combine,
}
"""Op type -> what it does; the banks' sum, `yield`, is the caller's, who runs banks one by one."""


def _chain(moe: MoeOp, route: RouteOp) -> Iterator[Operation]:
    """List the ops of one bank in order: its route and what is made from it, but for the yield."""
    chain: set[Operation] = set()
    for op in moe.body.block.ops:
        if op is route or (type(op) in RUN and any(value.owner in chain for value in op.operands)):
            chain.add(op)
            yield op


def _linear(state: _State, rows: Tensor, weight: str, bias: str | None, choice: Table | None) -> Tensor:
    """Each expert's rows times its weight: the chosen one (zeros of one that is dropped), or the dense in float32."""
    held = state.executable
    parts: list[Tensor] = []
    for expert, mine in enumerate(rows.split(state.routing.counts.tolist())):
        if choice is None:
            part = mine @ held.weights[weight][expert].to(torch.float32).T
        elif (q := held.quantized[weight][expert]).scheme.is_dropped:
            parts.append(mine.new_zeros((len(mine), q.n)))
            continue
        else:
            part = matmul(mine, q)
        parts.append(part if bias is None else part + held.weights[bias][expert].to(torch.float32))
    return torch.cat(parts)


def _chosen_weights(moe: MoeOp, weights: WeightSource) -> dict[str, tuple[Quantized, ...]]:
    """Weight name -> each expert's weight in its chosen scheme; nothing before allocation."""
    chosen: dict[str, tuple[Quantized, ...]] = {}
    for op in moe.body.block.ops:
        if not isinstance(op, LinearOp | GroupGemmOp):
            continue
        for name in (op.weight,) if isinstance(op, LinearOp) else op.weights:
            if op.choice is None:
                _check_shape(name, tuple(weights[name].shape), (op.experts, op.n, op.k))
                continue
            schemes = [moe.candidates[int(index)] for index in op.choice.array]
            none = torch.zeros((), dtype=torch.uint8).expand(op.n, op.k)
            chosen[name] = tuple(
                Quantized(scheme, none, None, None)
                if scheme.is_dropped
                else _own(weights.quantized(name, expert, scheme))
                for expert, scheme in enumerate(schemes)
            )
            for q in chosen[name]:
                _check_shape(name, (q.n, q.k), (op.n, op.k))
    return chosen


def _own(q: Quantized) -> Quantized:
    """16-bit codes may be a view of the weights: copied, they neither follow later changes nor keep the rest alive."""
    return replace(q, codes=q.codes.detach().clone()) if q.scheme.is_float else q


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise BadWeightShape(name=name, found=list(found), wanted=list(wanted))


def _dense(moe: MoeOp, weights: WeightSource) -> dict[str, Tensor]:
    """Take what is read dense, biases and before allocation the weights; nothing else of the source is kept."""
    dense: dict[str, Tensor] = {}
    for op in moe.body.block.ops:
        if isinstance(op, LinearOp) and op.choice is None:
            dense[op.weight] = weights[op.weight].detach()
        biases = op.biases if isinstance(op, GroupGemmOp) else (op.bias,) if isinstance(op, LinearOp) else ()
        dense |= {name: weights[name].detach().clone() for name in biases if name}
    return dense
