"""What may be given to `lift`, how things are called then, and what it says where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mxmoe.errors import BadExperts, MetaWeights, NoMoeBlock, NotAModule, UnknownTopK
from mxmoe.frontend import lift
from mxmoe.ir import Scheme, moe_ops

from .blocks import MIXTRAL, MLP, PROJ, ListBlock, Stack, StackBlock


def test_a_block_alone_is_called_moe() -> None:
    lifted = lift(StackBlock())
    (block,) = lifted.blocks
    assert (block.name, block.block, block.shape.hidden, block.shape.dtype) == ("moe", lifted.root, 16, "fp32")
    bank = block.banks["routed"]
    assert (bank.path, bank.kind, bank.module) == ("experts", "routed", lifted.root.experts)
    assert (bank.shape.experts, bank.shape.top_k, bank.shape.intermediate, bank.shape.act) == (4, 2, 24, "silu")
    assert set(lifted.weights) == {"moe.routed.gate", "moe.routed.up", "moe.routed.down"}
    assert torch.equal(lifted.weights["moe.routed.gate"], lifted.root.experts.gate_up_proj[:, :24])


def test_experts_alone_are_called_moe() -> None:
    stack = Stack(has_bias=True)
    lifted = lift(stack, top_k=3)
    (block,) = lifted.blocks
    assert (block.name, block.block, block.banks["routed"].path) == ("moe", stack, "")
    assert block.shape.banks[0].top_k == 3
    assert block.shape.banks[0].biases["down"] == "moe.routed.down.bias"
    assert torch.equal(lifted.weights["moe.routed.down.bias"], stack.down_proj_bias)
    assert lifted.report().skipped == ()


@pytest.mark.parametrize("names", [PROJ, MIXTRAL])
def test_a_list_of_experts(names: tuple[str, str, str]) -> None:
    block = ListBlock(names=names)
    bank = lift(block).blocks[0].banks["routed"]
    assert (bank.path, bank.kind, bank.module) == ("experts", "module_list", block.experts)
    assert bank.entries == tuple(block.experts)
    alone = lift(block.experts, top_k=2).blocks[0]
    assert (alone.name, alone.banks["routed"].path, alone.banks["routed"].kind) == ("moe", "", "module_list")


def test_a_model_of_several_kinds_of_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([ListBlock(), MLP(16, 8, PROJ, nn.SiLU()), StackBlock(top_k=1)])
    model.layers[2].shared_expert = MLP(16, 8, PROJ, nn.SiLU())
    model.layers[2].shared_expert_gate = nn.Linear(16, 1)
    lifted = lift(model)
    assert [op.block for op in moe_ops(lifted.module)] == ["layers.0", "layers.2"]
    assert [sorted(block.banks) for block in lifted.blocks] == [["routed"], ["routed", "shared"]]
    assert [block.banks["routed"].shape.top_k for block in lifted.blocks] == [2, 1]
    skipped = {skip.path: skip.kind for skip in lifted.skipped}
    assert skipped == {
        "layers.0.gate": "torch",
        "layers.1": "dense",
        "layers.2.gate": "torch",
        "layers.2.shared_expert_gate": "torch",
    }


def test_candidates_are_those_given_or_bf16() -> None:
    chosen = (Scheme.parse("w4a16_g128_asym"), Scheme.parse("w8a8_sym"))
    assert moe_ops(lift(StackBlock(), candidates=chosen).module)[0].candidates == chosen
    assert moe_ops(lift(StackBlock()).module)[0].candidates == (Scheme.parse("bf16"),)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")]
)
def test_element_types_are_kept(dtype: torch.dtype, name: str) -> None:
    lifted = lift(StackBlock().to(dtype))
    assert lifted.blocks[0].shape.dtype == name
    assert lifted.weights["moe.routed.up"].dtype == dtype


@pytest.mark.parametrize("where", ["block", "router", "config", "config of the root"])
def test_top_k_is_looked_for(where: str) -> None:
    class Config:
        num_experts_per_tok = 3

    block = StackBlock()
    del block.top_k
    root = nn.Sequential(block)
    holder = {"block": block, "router": block.gate, "config": block.experts, "config of the root": root}[where]
    if "config" in where:
        holder.config = Config()
    else:
        holder.num_experts_per_tok = 3
    assert lift(root).blocks[0].shape.banks[0].top_k == 3
    assert lift(root, top_k=1).blocks[0].shape.banks[0].top_k == 1


def test_an_unknown_top_k_says_how_to_give_it() -> None:
    with pytest.raises(UnknownTopK, match=r"attribute top_k on the module, or pass lift\(\.\.\., top_k="):
        lift(Stack())
    stack = Stack()
    stack.top_k = 2
    assert lift(stack).blocks[0].shape.banks[0].top_k == 2


def test_meta_weights_can_be_described_and_not_read() -> None:
    with torch.device("meta"):
        block = StackBlock()
    lifted = lift(block)
    assert lifted.blocks[0].shape.hidden == 16
    assert lifted.report().bytes_lifted == 4 * 3 * 16 * 24 * 4
    with pytest.raises(MetaWeights, match=r"moe\.routed\.down"):
        _ = lifted.weights["moe.routed.down"]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Linear(3, 3), "Linear holds no MoE block.*gate_up_proj.*expert.*no MLP that is known"),
        (MLP(3, 4, PROJ, nn.SiLU()), "1 dense MLPs, the first at the module itself"),
        (nn.Sequential(nn.ReLU(), MLP(3, 4, PROJ, nn.SiLU())), "the first at 1"),
    ],
)
def test_modules_without_experts_say_what_was_looked_for(module: nn.Module, said: str) -> None:
    with pytest.raises(NoMoeBlock, match=said):
        lift(module)


def test_experts_of_unknown_structure_are_named_where_nothing_else_is_there() -> None:
    block = nn.Module()
    block.experts = nn.ModuleList(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)) for _ in range(2))
    with pytest.raises(NoMoeBlock, match=r"structure that is not known: experts \(ModuleList\)"):
        lift(block)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(NotAModule, match="not str"):
        lift("mixtral")  # type: ignore[arg-type]  # the mistake under test


def test_bad_experts_name_the_class_and_the_path() -> None:
    model = nn.Sequential(StackBlock())
    model[0].experts.further = nn.Parameter(torch.ones(1))
    with pytest.raises(BadExperts, match=r"Stack at '0\.experts'.*further"):
        lift(model)


def test_two_stacks_in_one_block_are_two_blocks() -> None:
    block = StackBlock()
    block.vision_experts = Stack()
    assert [b.name for b in lift(block).blocks] == ["experts", "vision_experts"]


def test_a_shared_mlp_between_two_blocks_is_a_block_of_its_own() -> None:
    layer = nn.Module()
    layer.text, layer.vision = StackBlock(), StackBlock()
    layer.shared_experts = MLP(16, 8, PROJ, nn.SiLU())
    assert [(b.name, list(b.banks)) for b in lift(layer).blocks] == [
        ("text", ["routed"]),
        ("vision", ["routed"]),
        ("shared_experts", ["shared"]),
    ]


def test_a_shared_mlp_of_a_dense_layer_is_dense() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    for layer in model.layers:
        layer.shared_mlp = MLP(16, 8, PROJ, nn.SiLU())
    model.layers[1].moe = StackBlock()
    lifted = lift(model)
    assert [(b.name, list(b.banks)) for b in lifted.blocks] == [("layers.1.moe", ["routed", "shared"])]
    assert lifted.blocks[0].banks["shared"].path == "layers.1.shared_mlp"
    assert ("layers.0.shared_mlp", "dense") in {(skip.path, skip.kind) for skip in lifted.skipped}
