"""The op graph: order, no cycles, the longest chain."""

from __future__ import annotations

import hypothesis.strategies as st
import networkx as nx
from hypothesis import given, settings

from mxmoe.ir import (
    BankShape,
    BlockShape,
    ModuleOp,
    RouteOp,
    Scheme,
    build_module,
    critical_path,
    moe_ops,
    op_graph,
)
from mxmoe.testing import modules


@given(modules())
@settings(max_examples=20, deadline=None)
def test_every_op_once_in_an_order_that_respects_its_uses(module: ModuleOp) -> None:
    for moe in moe_ops(module):
        graph = op_graph(moe)
        ops = [graph.nodes[node]["op"] for node in graph]
        assert ops == list(moe.body.block.ops)
        assert nx.is_directed_acyclic_graph(graph)
        assert all(earlier < later for earlier, later in graph.edges)
        sources = [graph.nodes[node]["op"] for node in graph if graph.in_degree(node) == 0]
        assert all(isinstance(op, RouteOp) for op in sources)


@given(modules(), st.data())
@settings(max_examples=20, deadline=None)
def test_the_critical_path_is_the_longest_of_all_paths(module: ModuleOp, data: st.DataObject) -> None:
    graph = op_graph(moe_ops(module)[0])
    us = {graph.nodes[node]["op"]: data.draw(st.integers(0, 9)) for node in graph}
    starts = [node for node in graph if graph.in_degree(node) == 0]
    ends = [node for node in graph if graph.out_degree(node) == 0]
    paths = [path for one in starts for end in ends for path in nx.all_simple_paths(graph, one, end)]
    longest = max(sum(us[graph.nodes[node]["op"]] for node in path) for path in paths)
    labels, total = critical_path(graph, lambda op: float(us[op]))
    assert total == longest
    assert labels


def test_labels_name_bank_and_role() -> None:
    bank = BankShape("routed", 4, 2, 64, "silu", True, {role: role for role in ("gate", "up", "down")})
    module = build_module([BlockShape("mlp", 128, (bank,))], [Scheme.parse("bf16")])
    labels = [data["label"] for _, data in op_graph(moe_ops(module)[0]).nodes(data=True)]
    assert labels == ["routed", "routed gate", "routed up", "silu", "routed down", "combine", "yield"]
