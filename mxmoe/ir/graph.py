"""The op dependency graph of a block: order, what waits for what, and the longest way through it."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
from xdsl.ir import Operation

from mxmoe.ir.ops import MoeOp


def op_graph(moe: MoeOp) -> nx.DiGraph:
    """
    Build the graph of a block: one node per op, numbered in order, and an edge from each op to those that use it.

    Nodes carry `op` (the op itself) and `label` (what a drawing shows, e.g. "routed gate").
    """
    ops = list(moe.body.block.ops)
    number = {op: index for index, op in enumerate(ops)}
    graph: nx.DiGraph = nx.DiGraph(block=moe.block)
    for op, index in number.items():
        graph.add_node(index, op=op, label=_label(op))
        owners = (value.owner for value in op.operands)
        graph.add_edges_from((number[one], index) for one in owners if isinstance(one, Operation) and one in number)
    return graph


def critical_path(graph: nx.DiGraph, time_us: Callable[[Operation], float]) -> tuple[list[str], float]:
    """
    Find the chain of dependent ops that takes longest: its labels, and its microseconds.

    Banks that could run side by side count only as far as the slowest; their sum is what one queue takes.
    """
    finish: dict[int, float] = {}
    before: dict[int, int | None] = {}
    for node in nx.topological_sort(graph):
        last = max(graph.predecessors(node), key=finish.__getitem__, default=None)
        before[node] = last
        finish[node] = time_us(graph.nodes[node]["op"]) + (0.0 if last is None else finish[last])
    end = max(finish, key=finish.__getitem__)
    path: list[str] = []
    step: int | None = end
    while step is not None:
        path.append(graph.nodes[step]["label"])
        step = before[step]
    return path[::-1], finish[end]


def _label(op: Operation) -> str:
    words = [str(getattr(op, name, "")) for name in ("bank_name", "bank", "role", "kind")]
    spelled = " ".join(word for word in words if word and "<" not in word)
    return spelled or op.name.removeprefix("mxmoe.")
