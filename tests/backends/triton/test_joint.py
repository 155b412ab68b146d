"""A routed bank and a shared expert in the same launches: what they make is what each makes by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

import mxmoe
from mxmoe.backends.eager import EagerBackend
from mxmoe.backends.triton import TritonBackend
from mxmoe.backends.triton.mode import choose_mode
from mxmoe.ir import ModuleOp, banks, moe_ops
from mxmoe.quant import Weights, pack

from .joined_blocks import EXPERTS, HIDDEN, TOP_K, apart, draw, far, make
from .small_blocks import DEVICE

pytest.importorskip("triton")
choose_mode()  # before a kernel is decorated

from mxmoe.backends.triton import choose_ada, joint  # noqa: E402  # as above
from mxmoe.backends.triton.backend import can_join  # noqa: E402
from mxmoe.backends.triton.executable import TritonExecutable  # noqa: E402
from mxmoe.backends.triton.joint import JOINED, MOST_TOKENS, Joint  # noqa: E402

# rows of padding hold anything, and numpy says so where kernels are interpreted
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SETS = (
    ("bf16",),
    ("w8a8_sym",),
    ("w8a8_e4m3",),
    ("w4a8_g128_sym",),
    ("w4a16_g128_asym",),
    ("w4a4_g128_sym",),
    ("w8a8_sym", "w4a4_g128_sym", "bf16"),
    ("w4a16_g128_asym", "w8a8_e4m3", "w4a8_g128_sym", "w3a16_g128_asym"),
)


def compiled(module: ModuleOp, weights: Weights) -> TritonExecutable:
    """Compile the one block."""
    made = TritonBackend("89").compile(module, weights)["mlp"]
    assert isinstance(made, TritonExecutable)
    return made


@pytest.mark.parametrize("schemes", SETS, ids="+".join)
def test_both_banks_as_each_alone_and_as_the_definition(schemes: tuple[str, ...]) -> None:
    module, weights = make(schemes)
    made = compiled(module, weights)
    defined = EagerBackend().compile(module, weights)["mlp"]
    for tokens in (1, MOST_TOKENS):
        assert made.joins(tokens)
        args = draw(tokens, seed=tokens)
        both, each = made.run_block(*args), apart(made, *args)
        meant = apart(defined, *(one.cpu() for one in args))
        for name in JOINED:
            assert both[name].shape == each[name].shape
            assert both[name].dtype == each[name].dtype
            assert far(both[name], each[name]) < 4e-3
            assert far(both[name].cpu(), meant[name]) < 1.1 * far(each[name].cpu(), meant[name]) + 4e-3


@pytest.mark.parametrize(
    ("schemes", "turns", "dtype"),
    [
        (("w4a16_g128_asym", "w8a8_sym"), (32, 0), "bf16"),
        (("bf16", "w4a4_g128_sym"), (0, 128), "fp16"),
        (("w8a8_e4m3", "bf16"), (64, 64), "fp32"),
        (("w4a8_g128_sym",), (0, 0), "fp32"),
    ],
)
def test_banks_that_turn_and_other_types(schemes: tuple[str, ...], turns: tuple[int, int], dtype: str) -> None:
    module, weights = make(schemes, turns=turns, dtype=dtype, wide=256, seed=1)
    made = compiled(module, weights)
    assert made.joins(5)
    args = draw(5, dtype, seed=1)
    both, each = made.run_block(*args), apart(made, *args)
    for name in JOINED:
        assert far(both[name], each[name]) < 4e-3


def test_numbers_of_tokens_and_padding() -> None:
    module, weights = make(("w8a8_sym", "w4a16_g128_asym"))
    made = compiled(module, weights)
    hidden, index, chosen = draw(3)
    nobody = torch.full_like(index, EXPERTS)
    both = made.run_block(hidden, nobody, chosen)
    assert torch.equal(both["routed"], torch.zeros_like(hidden))
    assert far(both["shared"], apart(made, hidden, index, chosen)["shared"]) < 4e-3
    room = torch.empty_like(hidden)
    assert made.run_block(hidden, index, chosen, room)["shared"] is room
    none = made.run_block(hidden[:0], index[:0], chosen[:0])
    assert none["routed"].shape == none["shared"].shape == (0, HIDDEN)
    # equal calls give equal bits, and tokens that do not lie one behind the other are read as they are
    wide = torch.zeros((3, 2 * HIDDEN), dtype=hidden.dtype, device=DEVICE)
    wide[:, :HIDDEN] = hidden
    again = made.run_block(wide[:, :HIDDEN], index, chosen)
    assert torch.equal(again["shared"], room)
    assert not made.joins(0)
    assert not made.joins(MOST_TOKENS + 1)


def test_many_tokens_run_one_bank_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    module, weights = make(("bf16",))
    made = compiled(module, weights)
    args = draw(9)
    monkeypatch.setattr(joint, "MOST_TOKENS", 8)
    monkeypatch.setattr(choose_ada, "_divides", lambda _device: False)
    both, each = made.run_block(*args), apart(made, *args)
    for name in JOINED:
        assert torch.equal(both[name], each[name])


def test_there_is_one_copy_of_the_weights_and_all_come_back() -> None:
    schemes = ("w4a16_g128_asym", "w8a8_sym", "w4a8_g128_sym")
    module, weights = make(schemes)
    made = compiled(module, weights)
    assert made.joint is not None
    rooms = [one.arena.data for one in (made.joint.entry, made.joint.down)]
    held = {one.arena.data.untyped_storage().data_ptr() for bank in made.banks.values() for one in bank.gemms}
    assert held == {room.untyped_storage().data_ptr() for room in rooms}
    assert made.nbytes == sum(room.nbytes for room in rooms)
    for moe in moe_ops(module):
        for gemm in (gemm for bank in banks(moe).values() for gemm in bank.gemms):
            assert gemm.choice is not None
            for name in gemm.weights:
                for expert, index in enumerate(gemm.choice.array.tolist()):
                    meant = pack(weights.quantized(name, expert, moe.candidates[index]))
                    found = made.packed(name, expert)
                    assert (found.scheme, found.n, found.k) == (meant.scheme, meant.n, meant.k)
                    for one in ("payload", "scale", "zero"):
                        first, second = getattr(found, one), getattr(meant, one)
                        assert second is None if first is None else torch.equal(first.cpu(), second)


@pytest.mark.parametrize(
    "further",
    [
        {"act": ("silu", "gelu")},
        {"has_bias": True},
        {"wide": 320},
        {"turns": (8, 0)},
    ],
    ids=str,
)
def test_what_cannot_be_joined_stays_apart(further: dict[str, Any]) -> None:
    module, weights = make(("w8a8_sym",), **further)
    made = compiled(module, weights)
    assert made.joint is None
    assert not made.joins(1)
    args = draw(2)
    both, each = made.run_block(*args), apart(made, *args)
    for name in JOINED:
        assert torch.equal(both[name], each[name])


def test_gate_and_up_of_unlike_schemes_stay_apart() -> None:
    module, _ = make(("w8a8_sym",))
    for moe in moe_ops(module):
        assert can_join(banks(moe))
        assert not can_join({"routed": banks(moe)["routed"]})
        assert not can_join({"routed": banks(moe)["routed"], "shared": banks(moe)["routed"]})
    module, weights = make(("w8a8_sym", "bf16"), is_tied=False)
    assert compiled(module, weights).joint is None


def qwen() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 256}
    return Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**sizes, num_experts=EXPERTS, num_experts_per_tok=TOP_K))


def deepseek() -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": 64,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
    }
    return DeepseekV3MoE(DeepseekV3Config(**sizes, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Fill a block's parameters with normal numbers."""
    block, random = build().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.08, generator=random)
    return block.to(torch.bfloat16).to(DEVICE)


@dataclass
class Counted:
    """How often banks ran together."""

    together: int = 0

    def __call__(self, joint: Joint, *args: Tensor) -> None:
        self.together += 1
        RUN(joint, *args)


RUN = Joint.run


@pytest.mark.parametrize("build", [qwen, deepseek])
@torch.no_grad()
def test_a_block_of_a_family_runs_its_banks_together(
    build: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted()
    monkeypatch.setattr(Joint, "run", lambda *args: counted(*args))
    block = seeded(build)
    made: Any = mxmoe.compile(block, "triton-sm90", schemes=("w8a8_sym", "w4a8_g128_sym"), weight_bits=6, quiet=True)
    xs = [torch.randn((1, tokens, HIDDEN), generator=torch.Generator().manual_seed(tokens)) for tokens in (4, 4, 1)]
    outs = [made(x.to(DEVICE, torch.bfloat16)) for x in xs]
    assert counted.together == 3  # the first by itself, to be ready for a graph
    assert far(outs[1], outs[0]) < 4e-3
    assert far(outs[1], block(xs[1].to(DEVICE, torch.bfloat16))) < 0.3
    made.save(tmp_path / "saved")
    back: Any = mxmoe.load(tmp_path / "saved", seeded(build))
    again = [back(x.to(DEVICE, torch.bfloat16)) for x in xs]
    assert counted.together == 6
    for one, other in zip(again, outs, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_traced_block_keeps_an_operator_for_each_bank() -> None:
    made: Any = mxmoe.compile(seeded(qwen), "triton-sm90", schemes="w8a8_sym", quiet=True)
    x = torch.randn((1, 3, HIDDEN), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    wanted = made(x)
    traced = torch.compile(made, backend="eager", fullgraph=True)
    assert far(traced(x), wanted) < 4e-3
    assert far(made(x), wanted) < 4e-3
