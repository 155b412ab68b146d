"""Small modules and statistics for the tests of passes."""

from __future__ import annotations

import numpy as np

from mxmoe.calib import BankStats, Stats
from mxmoe.ir import (
    Bank,
    BankShape,
    BlockShape,
    ModuleOp,
    Scheme,
    Table,
    banks,
    build_module,
    moe_ops,
    parse_ir,
    print_ir,
)
from mxmoe.passes import Environment, Pass, run_passes

CANDIDATES = tuple(Scheme.parse(name) for name in ("w2a16_g32_asym", "w4a16_g32_asym", "w8a8_sym"))


def small_bank(name: str = "routed", experts: int = 3, *, gated: bool = True, bias: tuple[str, ...] = ()) -> BankShape:
    roles = ("gate", "up", "down") if gated else ("up", "down")
    weights = {role: f"mlp.{name}.{role}" for role in roles}
    top_k = min(2, experts)
    biases = {role: f"mlp.{name}.{role}.bias" for role in bias}
    return BankShape(name, experts, top_k, 32, "silu", gated, weights, biases)


def small(*banks: BankShape, candidates: tuple[Scheme, ...] = CANDIDATES, blocks: int = 1) -> ModuleOp:
    """Blocks of 64 channels with three routed experts and a shared one, lifted."""
    given = banks or (small_bank(), small_bank("shared", 1))
    return build_module([BlockShape(f"layers.{i}.mlp", 64, given) for i in range(blocks)], candidates)


def small_stats(module: ModuleOp, tokens: int = 100) -> Stats:
    """Round figures: expert e gets (e + 1) parts of the tokens; errors fall by 16 with every candidate."""
    found = {}
    for moe in moe_ops(module):
        for name, bank in banks(moe).items():
            part = np.arange(1, bank.experts + 1)
            counts = tokens * bank.top_k * part // part.sum()
            error = np.outer(part, 256.0 / 16.0 ** np.arange(len(moe.candidates)))
            roles = {role: error * (4.0 if role == "down" else 1.0) for role in bank.linears}
            fisher = {role: table * part[::-1, None] for role, table in roles.items()}
            found[moe.block, name] = BankStats(
                tokens, counts, counts / 2.0, part * 10.0, roles, "block", part * 5.0, fisher, small_facts(bank)
            )
    return Stats(moe_ops(module)[0].candidates, found, min_tokens=0)


def small_facts(bank: Bank) -> dict[str, dict[str, np.ndarray]]:
    """Every fact that there is, in round figures: norms 1, 2, 3, ..., and so on."""
    part = np.arange(1.0, bank.experts + 1)
    facts = {
        "norm": part, "trace": 1 / part, "variance": part / 100, "spread": part[::-1] / 50, "alpha": 2 + 1 / part
    }  # fmt: skip
    found = {fact: dict.fromkeys(bank.linears, values) for fact, values in facts.items()}
    if bank.name == "routed":
        found["norm"]["router"] = part[::-1] / 2
    return found


def annotated(module: ModuleOp | None = None, cost: float = 1.0) -> ModuleOp:
    """The same with sensitivities, and costs that halve with every candidate before the last."""
    done = small() if module is None else module
    stats = small_stats(done)
    for moe in moe_ops(done):
        for name, bank in banks(moe).items():
            for role, op in bank.linears.items():
                n = len(moe.candidates)
                op.set_table(
                    "sensitivity", Table(("expert", "scheme"), stats.sensitivity(moe.block, name, role, moe.candidates))
                )
                op.set_table("cost", Table(("expert", "scheme"), np.full((op.experts, n), cost) * 2.0 ** np.arange(n)))
        moe.stage = "annotated"
    done.verify()
    return done


def choose(module: ModuleOp, index: int = 0) -> ModuleOp:
    """Allocate by hand: one candidate for all."""
    for moe in moe_ops(module):
        for bank in banks(moe).values():
            for op in bank.linears.values():
                op.set_table("choice", Table(("expert",), np.full(op.experts, index, dtype=np.int8)))
        moe.stage = "allocated"
    module.verify()
    return module


def copy(module: ModuleOp) -> ModuleOp:
    return parse_ir(print_ir(module, elide=None))


def before_and_after(step: Pass, module: ModuleOp, environment: Environment | None = None) -> str:
    """Run a pass and give both texts, for a golden file."""
    before = print_ir(module, elide=None)
    after = print_ir(run_passes(module, (step,), environment or Environment()), elide=None)
    return f"// before\n{before}\n// after {step}\n{after}"
