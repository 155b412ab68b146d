"""Banks that a block calls one after the other run together where the block lets them; nothing stale comes back."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from mxmoe.compiled import CompiledBank
from mxmoe.errors import SharedLeftOut
from mxmoe.frontend import JoinedCalls, join_calls, lift, replace_banks

from .reference import reference
from .test_families import inputs_of
from .zoo import Family, families, tiny_model

HIDDEN, EXPERTS = 16, 4
SHARED_FIRST = {
    *("afmoe", "ernie4_5_moe", "hunyuan_v1_moe", "laguna", "minimax_m3_vl", "qwen2_moe", "qwen3_5_moe"),
    *("qwen3_next", "qwen3_omni_moe", "qwen4_exp"),
}
"""Families whose blocks call the shared expert before the routed ones; others call it behind them."""
APART = {"granitemoe_swa", "granitemoehybrid", "granitemoeshared"}
"""Families whose shared expert is called by the layer, and not by the block of the routed ones."""

Way = Callable[["Block", Tensor], Tensor]
"""How a block runs tokens [tokens, hidden]."""


@dataclass(eq=False)
class Both:
    """The banks of a block by the definition, saying how often they ran together and alone."""

    nbytes = 0

    runs: Mapping[str, Callable[..., Tensor]]
    most: int = 100
    together: int = 0
    alone: list[str] = field(default_factory=list)

    def __call__(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.alone.append(bank)
        return self.runs[bank](hidden, top_k_index, top_k_weights)

    def packed(self, name: str, expert: int) -> NoReturn:
        raise NotImplementedError

    def bias(self, name: str) -> NoReturn:
        raise NotImplementedError

    def joins(self, tokens: int) -> bool:
        return 0 < tokens <= self.most

    def run_block(
        self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, shared: Tensor | None = None
    ) -> dict[str, Tensor]:
        self.together += 1
        index = torch.zeros((len(hidden), 1), dtype=torch.int64)
        made = self.runs["shared"](hidden, index, torch.ones((len(hidden), 1)))
        made = made if shared is None else shared.copy_(made)
        return {"routed": self.runs["routed"](hidden, top_k_index, top_k_weights), "shared": made}


def join(model: nn.Module) -> tuple[Any, dict[str, JoinedCalls], dict[str, Both]]:
    """Replace the banks of a module."""
    lifted = lift(model)
    made = {one.name: Both({name: reference(lifted, one, name) for name in one.banks}) for one in lifted.blocks}
    joined = join_calls(lifted, made)
    root = replace_banks(lifted, lambda one, bank: CompiledBank(made[one.name], bank, joined.get(one.name))).root
    return root, joined, made


class Experts(nn.Module):
    """Routed experts, as families hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.act_fn = EXPERTS, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * 8, HIDDEN) / 4)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 8) / 3)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, slot = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            made = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, made * top_k_weights[token, slot, None])
        return out


class Mlp(nn.Module):
    """A shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(HIDDEN, 8, bias=False),
            nn.Linear(HIDDEN, 8, bias=False),
            nn.Linear(8, HIDDEN, bias=False),
        )
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A block whose forward is written by the test."""

    counts: Tensor

    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.shared_expert, self.router = Experts(), Mlp(), nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.register_buffer("counts", torch.zeros(EXPERTS))
        self.way, self.top_k = way, 2

    def routed(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(dim=-1).topk(2, dim=-1)
        self.counts += torch.bincount(index.flatten(), minlength=EXPERTS)
        return self.experts(x, index, weights)

    def forward(self, hidden: Tensor, seen: object = None) -> Tensor:
        return self.way(self, hidden.reshape(-1, HIDDEN)).reshape(hidden.shape)


def shared_first(block: Block, x: Tensor) -> Tensor:
    shared = block.shared_expert(x)
    return block.routed(x) + shared


def routed_first(block: Block, x: Tensor) -> Tensor:
    return block.routed(x) + block.shared_expert(x)


def read_early(block: Block, x: Tensor) -> Tensor:
    shared = block.shared_expert(x) * 2
    return block.routed(x) + shared


def clipped_early(block: Block, x: Tensor) -> Tensor:
    shared = block.shared_expert(x).clamp(max=1.0)
    return block.routed(x) + shared


def other_tokens(block: Block, x: Tensor) -> Tensor:
    shared = block.shared_expert(2 * x)
    return block.routed(x) + shared


def changed_between(block: Block, x: Tensor) -> Tensor:
    x = x.clone()
    routed = block.routed(x)
    x += 1
    return routed + block.shared_expert(x)


def changed_before(block: Block, x: Tensor) -> Tensor:
    x = x.clone()
    shared = block.shared_expert(x)
    x += 1
    return block.routed(x) + shared


def twice(block: Block, x: Tensor) -> Tensor:
    return block.shared_expert(x) + block.routed(x) + block.shared_expert(x)


WAYS: Mapping[str, tuple[Way, str]] = {
    "shared first": (shared_first, "shared"),
    "routed first": (routed_first, "routed"),
    "read early": (read_early, "apart"),
    "clipped early": (clipped_early, "apart"),
    "other tokens": (other_tokens, "apart"),
    "changed between": (changed_between, "apart"),
    "changed before": (changed_before, "apart"),
    "twice": (twice, "apart"),
}


@pytest.fixture(params=[False, True], ids=["no_grad", "inference"], autouse=True)
def _without_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.inference_mode() if request.param else torch.no_grad():
        yield


@pytest.mark.parametrize("name", WAYS)
def test_a_block_is_joined_where_it_lets_us(name: str) -> None:
    way, order = WAYS[name]
    block = Block(way)
    xs = [torch.randn(1, tokens, HIDDEN) for tokens in (5, 3, 1, 5)]
    wanted = [block(x) for x in xs]
    counts = block.counts.clone()
    block.counts.zero_()
    root, joined, made = join(block)
    got = [root(x) for x in xs]
    assert joined["moe"].order == order
    assert made["moe"].together == (0 if order == "apart" else len(xs))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    # what is rehearsed leaves the block's state as it was
    assert torch.equal(block.counts, counts)


@pytest.mark.parametrize("way", [shared_first, routed_first])
def test_every_call_gets_its_own_results(way: Way) -> None:
    root, _, made = join(Block(way))
    plain = Block(way)
    x = torch.randn(4, HIDDEN)
    for step in range(4):
        torch.testing.assert_close(root(x), plain(x))
        x.mul_(-1 if step % 2 else 2)  # the same memory, other tokens
    assert made["moe"].together == 4
    before = len(made["moe"].alone)
    # no part of a block's call: nobody would fill what is given
    torch.testing.assert_close(root.shared_expert(x), plain.shared_expert(x))
    torch.testing.assert_close(root.routed(x), plain.routed(x))
    assert made["moe"].alone[before:] == ["shared", "routed"]


def test_no_tokens_and_many_run_alone() -> None:
    root, joined, made = join(Block(shared_first))
    plain = Block(shared_first)
    for tokens in (0, 101, 0, 3, 0, 101, 3):
        x = torch.randn(tokens, HIDDEN)
        torch.testing.assert_close(root(x), plain(x))
    assert joined["moe"].order == "shared"
    assert made["moe"].together == 2


def test_nan_in_tokens_decides_nothing() -> None:
    root, joined, _ = join(Block(shared_first))
    root(torch.full((3, HIDDEN), float("nan")))
    assert joined["moe"].order == "unknown"
    root(torch.randn(3, HIDDEN))
    assert joined["moe"].order == "shared"


def test_what_might_remember_a_call_is_not_called_again() -> None:
    root, joined, _ = join(Block(shared_first))
    root(torch.randn(3, HIDDEN), seen=object())
    assert joined["moe"].order == "apart"


@pytest.mark.parametrize("way", [shared_first, routed_first])
def test_a_call_that_fails_leaves_nothing(way: Way) -> None:
    root, joined, _ = join(Block(way))
    plain, x = Block(way), torch.randn(3, HIDDEN)
    root(x)
    router, root.router = root.router, None
    with pytest.raises(TypeError):
        root(x)
    root.router = router
    torch.testing.assert_close(root(x), plain(x))
    torch.testing.assert_close(root.shared_expert(x), plain.shared_expert(x))
    assert joined["moe"].order != "apart"


def test_who_watches_the_shared_expert_sees_its_values() -> None:
    root, _, made = join(Block(shared_first))
    x = torch.randn(3, HIDDEN)
    root(x)
    seen: list[Tensor] = []
    handle = root.shared_expert.register_forward_hook(lambda part, args, out: seen.append(out.clone()))
    root(x)
    handle.remove()
    torch.testing.assert_close(seen[0], Block(shared_first).shared_expert(x))
    assert made["moe"].together == 1
    root(x)
    assert made["moe"].together == 2


def test_a_block_that_changes_its_mind_is_told() -> None:
    block = Block(shared_first)
    root, _, _ = join(block)
    x = torch.randn(3, HIDDEN)
    root(x)
    block.way = lambda block, x: block.shared_expert(x)
    with pytest.raises(SharedLeftOut, match=r"moe.*were not called after it"):
        root(x)
    # other tokens are seen, and cost the join only
    block.way, plain = other_tokens, Block(other_tokens)
    torch.testing.assert_close(root(x), plain(x))
    if not torch.is_inference_mode_enabled():  # there, no tensor says how often it was written
        block.way = changed_before
        with pytest.raises(SharedLeftOut, match="changed before the routed experts ran"):
            root(x)


def test_copies_and_threads_do_not_meet() -> None:
    root, _, made = join(Block(shared_first))
    plain, twin = Block(shared_first), copy.deepcopy(root)
    root(torch.randn(2, HIDDEN))
    xs = [torch.randn(3, HIDDEN) for _ in range(16)]
    wanted, got = [plain(x) for x in xs], dict[int, Tensor]()

    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def work(first: int) -> None:
        with mode():
            for at in range(first, len(xs), 2):
                got[at] = (twin if at % 4 else root)(xs[at])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, one in enumerate(wanted):
        torch.testing.assert_close(got[at], one)
    assert made["moe"].together == len(xs) + 1


@pytest.mark.parametrize("family", families(), ids=str)
def test_a_model_of_every_family_computes_the_same(family: Family) -> None:
    model = tiny_model(family)
    root, joined, made = join(model)
    inputs = inputs_of(model)
    outs: list[Tensor] = []
    for _ in range(2):
        torch.manual_seed(0)  # some families draw a noise
        outs.append(root(**inputs)[0])
    # the first call ran every bank by itself
    torch.testing.assert_close(outs[1], outs[0])
    order = "apart" if family.name in APART else "shared" if family.name in SHARED_FIRST else "routed"
    assert {one.order for one in joined.values()} <= {order}
    assert all(made[name].together == 2 * (one.order != "apart") for name, one in joined.items())
