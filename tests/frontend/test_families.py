"""Every family of the installed transformers lifts, agrees with torch, and can be replaced by what was lifted."""

from __future__ import annotations

import inspect
import re
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from mxmoe.backends.eager import EagerBackend
from mxmoe.errors import RefusedFamily
from mxmoe.frontend import FAMILIES, REFUSED, Lifted, LiftedBank, LiftedBlock, lift, replace_banks
from mxmoe.ir import moe_ops, parse_ir, print_ir

from .reference import reference
from .zoo import MODELS, UNDECORATED, Family, families, randomized, tiny_model

CLOSE = 1e-5
"""Relative Frobenius difference of float32 sums in another order."""

AS_MODELS = {
    "qwen2_moe": ("layers.{}.mlp", (0, 1), {"routed", "shared"}),
    "qwen3_moe": ("layers.{}.mlp", (0, 1), {"routed"}),
    "mixtral": ("layers.{}.mlp", (0, 1), {"routed"}),
    "deepseek_v2": ("layers.{}.mlp", (1,), {"routed", "shared"}),
    "deepseek_v3": ("layers.{}.mlp", (1,), {"routed", "shared"}),
    "olmoe": ("layers.{}.mlp", (0, 1), {"routed"}),
    "gpt_oss": ("layers.{}.mlp", (0, 1), {"routed"}),
    "glm4_moe": ("layers.{}.mlp", (1,), {"routed", "shared"}),
    "granitemoe": ("layers.{}.block_sparse_moe", (0, 1), {"routed"}),
    "granitemoeshared": ("layers.{}.block_sparse_moe", (0, 1), {"routed", "shared"}),
    "jamba": ("layers.{}.feed_forward", (0, 1), {"routed"}),
}
"""Family -> path of a block, the layers that have one, the banks of each."""


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    if type(model).__name__ == "Qwen3OmniMoeTalkerModel":  # it has no embedding of its own
        return {"inputs_embeds": torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))}
    return {"input_ids": torch.arange(2, 16).reshape(2, 7)}


@cache
def takes_padding(cls: type[nn.Module]) -> bool:
    """Whether the family's own loop over experts counts one class more than it has experts, and skips it."""
    source = inspect.getsource(cls)
    return "num_experts + 1" in source and "== self.num_experts" in source


def routing_of(bank: LiftedBank, tokens: int = 9) -> tuple[Tensor, Tensor]:
    """Random experts; the last slot of some tokens is padding where the family's own loop allows it."""
    generator = torch.Generator().manual_seed(2)
    experts, top_k = bank.shape.experts, bank.shape.top_k
    index = torch.rand(tokens, experts, generator=generator).argsort(dim=-1)[:, :top_k]
    if takes_padding(type(bank.module)):
        index[::3, -1] = experts
    return index, torch.rand(tokens, top_k, generator=generator)


def own(bank: LiftedBank, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What the bank's module computes, for assignments."""
    match bank.kind:
        case "routed" | "routed_norm":
            return bank.module(hidden, index, weights)
        case "shared":
            return bank.module(hidden)
        case _:
            return bank.module(hidden, gammas=weights)


@pytest.fixture(scope="module", params=families(), ids=str)
def lifted(request: pytest.FixtureRequest) -> Lifted:
    family: Family = request.param
    result = lift(tiny_model(family))
    routed = [bank for block in result.blocks for bank in block.banks.values() if isinstance(bank.module, family.cls)]
    assert len(routed) == sum(isinstance(module, family.cls) for module in result.root.modules())
    return result


def test_every_byte_of_experts_is_in_the_module(lifted: Lifted) -> None:
    report = lifted.report()
    assert report.bytes_found == report.bytes_lifted > 0
    assert [op.block for op in moe_ops(lifted.module)] == [block.name for block in lifted.blocks]
    assert report.bytes_lifted == sum(lifted.weights[name].nbytes for name in lifted.weights)
    lifted.module.verify()
    assert print_ir(parse_ir(print_ir(lifted.module))) == print_ir(lifted.module)


@pytest.mark.parametrize("by", ["reference", "eager"])
@torch.no_grad()
def test_every_bank_agrees_with_its_module(lifted: Lifted, by: str) -> None:
    executables = EagerBackend().compile(lifted.module, lifted.weights)

    def make(block: LiftedBlock, bank: str):  # noqa: ANN202  # a BankRun
        return reference(lifted, block, bank) if by == "reference" else partial(executables[block.name], bank)

    generator, cases = torch.Generator().manual_seed(4), []
    for block in lifted.blocks:
        for name, bank in block.banks.items():
            index, weights = routing_of(bank)
            # up to 20 in size: beyond every clamp that these families have
            hidden = torch.linspace(0.1, 6, 9)[:, None] * torch.randn(9, block.shape.hidden, generator=generator)
            cases.append((bank, hidden, index, weights, own(bank, hidden, index, weights), f"{block.name} {name}"))
    replaced = replace_banks(lifted, make)
    for bank, hidden, index, weights, expected, what in cases:
        module = replaced.root.get_submodule(bank.path)
        assert module is not bank.module
        found = own(LiftedBank(bank.path, module, bank.kind, bank.shape), hidden, index, weights)
        assert (found - expected).norm() <= CLOSE * expected.norm(), what
    replaced.undo()
    assert all(lifted.root.get_submodule(b.path) is b.module for block in lifted.blocks for b in block.banks.values())


@torch.no_grad()
def test_the_model_computes_the_same_with_every_bank_replaced(lifted: Lifted) -> None:
    model = lifted.root
    inputs = inputs_of(model)
    expected = model(**inputs)[0]
    executables = EagerBackend().compile(lifted.module, lifted.weights)
    replaced = replace_banks(lifted, lambda block, bank: partial(executables[block.name], bank))
    assert replaced.root is model
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-3, atol=1e-4)
    replaced.undo()
    torch.testing.assert_close(model(**inputs)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_another_function(lifted: Lifted, dtype: torch.dtype) -> None:
    again = lift(deepcopy(lifted.root).to(dtype))
    assert [block.shape.banks for block in again.blocks] == [block.shape.banks for block in lifted.blocks]


@pytest.mark.parametrize("name", AS_MODELS)
def test_one_op_per_block_of_a_model(name: str) -> None:
    family = next(family for family in families() if family.name == name)
    path, layers, banks = AS_MODELS[name]
    result = lift(tiny_model(family))
    assert [block.name for block in result.blocks] == [path.format(layer) for layer in layers]
    assert all(set(block.banks) == banks for block in result.blocks)
    assert all(block.banks["routed"].shape.top_k == 2 for block in result.blocks)
    assert [op.block for op in moe_ops(result.module)] == [block.name for block in result.blocks]


def test_latent_experts_leave_the_shared_mlp_a_block_of_its_own() -> None:
    family = next(family for family in families() if family.name == "nemotron_h")
    result = lift(tiny_model(family, moe_latent_size=16))
    found = {block.name: (block.shape.hidden, set(block.banks)) for block in result.blocks}
    assert found == {
        "layers.0.mixer": (16, {"routed"}),
        "layers.0.mixer.shared_experts": (32, {"shared"}),
    }
    kept = {skip.path for skip in result.skipped if skip.kind == "torch"}
    assert kept == {"layers.0.mixer.gate", "layers.0.mixer.fc1_latent_proj", "layers.0.mixer.fc2_latent_proj"}


# every installed version is lifted above; what is listed by name is listed for this one and later ones
PINNED = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="the lists of names are those of transformers 5.24"
)


@PINNED
def test_padding_is_tested_almost_everywhere() -> None:
    without = {family.experts for family in families() if not takes_padding(family.cls)}
    assert without == {"GptOssExperts", "NemotronHExperts", "OpenAIPrivacyFilterExperts"}


@PINNED
def test_the_scan_finds_what_it_is_for() -> None:
    assert len(families()) >= 60
    assert {"mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe"} <= {family.name for family in families()}


@pytest.mark.parametrize("family", UNDECORATED, ids=str)
@torch.no_grad()
def test_families_that_are_not_decorated(family: Family) -> None:
    model = tiny_model(family)
    result = lift(model, top_k=2)
    report = result.report()
    assert report.bytes_found == report.bytes_lifted > 0
    inputs = inputs_of(model)
    if family.name != "step3p7":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    expected = model(**inputs)[0]
    executables = EagerBackend().compile(result.module, result.weights)
    replaced = replace_banks(result, lambda block, bank: partial(executables[block.name], bank))
    assert {block.banks["routed"].shape.act for block in result.blocks} <= {"relu", "silu_capped"}
    torch.testing.assert_close(replaced.root(**inputs)[0], expected, rtol=1e-3, atol=1e-4)


@PINNED
def test_refused_and_listed_classes_are_there() -> None:
    text = "\n".join(file.read_text() for file in MODELS.glob("*/modeling_*.py"))
    assert not [name for name in (*FAMILIES, *REFUSED) if f"class {name}(" not in text]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_family_says_so(name: str) -> None:
    cls = type(name, (nn.Module,), {})
    block = nn.Module()
    block.experts = cls()
    with pytest.raises(RefusedFamily, match=re.escape(REFUSED[name])) as error:
        lift(block)
    assert name in str(error.value)
    assert "docs/families.md" in str(error.value)


def test_no_tested_family_is_refused() -> None:
    assert not {family.experts for family in families()} & set(REFUSED)


def test_the_docs_name_every_row() -> None:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    assert all(f"`{name}`" in text for name in (*FAMILIES, *REFUSED))
    assert all(reason in text for reason in REFUSED.values())


def test_weights_are_those_of_the_model(lifted: Lifted) -> None:
    block = lifted.blocks[0]
    name = block.shape.banks[0].weights["down"]
    before = lifted.weights[name].clone()
    randomized(lifted.root, seed=3)
    assert not torch.equal(lifted.weights[name], before)
    randomized(lifted.root, seed=0)
    assert torch.equal(lifted.weights[name], before)
