"""Sequences that use all experts: chosen, and written."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2MoeForCausalLM

from mxmoe.calib import next_token_loss, observe, sample_balanced, select_balanced
from mxmoe.calib.usage import UsageMeter
from mxmoe.errors import BadOption
from mxmoe.frontend import lift

from .test_observer import EXPERTS, config, randomized
from .test_probe import MLP, Block, seeded


def model() -> Qwen2MoeForCausalLM:
    return randomized(Qwen2MoeForCausalLM(config()), seed=3)  # type: ignore[return-value]


def sequences(count: int, length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(64, (1, length), generator=generator) for _ in range(count)]


def usage(lifted: Any, sequence: Tensor) -> Tensor:  # noqa: ANN401  # what lift returned
    meter = UsageMeter(lifted)
    with meter.hooked(), torch.no_grad():
        lifted.root(sequence)
    return meter.take(1)[0]


def test_usage_is_what_observing_counts() -> None:
    lifted = lift(model())
    ids = torch.cat(sequences(3))
    meter = UsageMeter(lifted)
    with meter.hooked(), torch.no_grad():
        lifted.root(ids)
    counted = meter.take(3)
    stats = observe(lifted, ids, schemes=["w4a16_sym"], quiet=True)
    want = torch.cat([torch.from_numpy(stats.bank(block.name, "routed").tokens) for block in lifted.blocks])
    assert counted.sum(0).tolist() == want.tolist()
    for row, sequence in zip(counted, ids, strict=True):
        assert row.tolist() == usage(lifted, sequence[None]).tolist()
    assert meter.take(3).sum() == 0
    assert not any(m._forward_pre_hooks for m in lifted.root.modules())


@given(st.lists(st.integers(0, 50), min_size=2 * EXPERTS, max_size=2 * EXPERTS), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_imbalance_is_of_shares(counts: list[int], times: int) -> None:
    meter = UsageMeter(lift(model()))
    given_usage = torch.tensor(counts, dtype=torch.float64)
    found = meter.imbalance(given_usage)
    assert found >= 0
    torch.testing.assert_close(meter.imbalance(given_usage * times), found)
    assert meter.imbalance(torch.full((2 * EXPERTS,), float(times))) == 0


def test_the_choice_is_the_greedy_one_by_the_formula() -> None:
    lifted, given_sequences, tau = lift(model()), sequences(7), 0.7
    found = select_balanced(lifted, given_sequences, 3, tau=tau, quiet=True)
    meter, used = UsageMeter(lifted), [usage(lifted, s) for s in given_sequences]
    with torch.no_grad():
        unlikely = [float(next_token_loss(lifted.root(s), s)) / 11 for s in given_sequences]
    total, taken = torch.zeros_like(used[0]), list[int]()
    for _ in range(3):
        left = [i for i in range(7) if i not in taken]
        taken.append(min(left, key=lambda i: unlikely[i] + float(meter.imbalance(total + used[i])) / tau))
        total = total + used[taken[-1]]
    assert found.indices == tuple(taken)
    assert all(a is given_sequences[i] for a, i in zip(found.sequences, taken, strict=True))
    assert found.imbalance == pytest.approx(float(meter.imbalance(total)))
    assert found.imbalance_of_all == pytest.approx(float(meter.imbalance(torch.stack(used).sum(0))))


def test_a_small_tau_balances_and_a_large_one_asks_for_likelihood() -> None:
    lifted, given_sequences = lift(model()), sequences(10, length=6)
    balanced = select_balanced(lifted, given_sequences, 3, tau=1e-6, quiet=True)
    likely = select_balanced(lifted, given_sequences, 3, tau=1e6, quiet=True)
    assert balanced.imbalance < likely.imbalance
    with torch.no_grad():
        unlikely = [float(next_token_loss(lifted.root(s), s)) for s in given_sequences]
    assert set(likely.indices or ()) == set(sorted(range(10), key=unlikely.__getitem__)[:3])
    sets = itertools.combinations(range(10), 3)
    meter, used = UsageMeter(lifted), [usage(lifted, s) for s in given_sequences]
    every = sorted(float(meter.imbalance(used[a] + used[b] + used[c])) for a, b, c in sets)
    assert balanced.imbalance <= every[len(every) // 4]


def test_blocks_are_chosen_for_by_balance_alone() -> None:
    block = seeded(Block(torch.nn.ModuleList(MLP() for _ in range(4))))
    hidden = list(torch.randn((6, 5, 16), generator=torch.Generator().manual_seed(0)))
    found = select_balanced(lift(block), hidden, 6, quiet=True)
    assert sorted(found.indices or ()) == list(range(6))
    assert found.imbalance == pytest.approx(found.imbalance_of_all)


def test_written_sequences_are_the_beams_of_the_formula() -> None:
    """Against a search that keeps no cache and shares no code."""
    lifted, width, tau = lift(model()), 3, 0.9
    found = sample_balanced(lifted, 2, 5, width=width, tau=tau, seed=1, quiet=True)
    meter, root = UsageMeter(lifted), lifted.root
    firsts = torch.randint(64, (2,), generator=torch.Generator().manual_seed(1)).tolist()
    total = torch.zeros(sum(meter.sizes), dtype=torch.float64)

    def chances(tokens: list[int]) -> Tensor:
        with torch.no_grad():
            return root(torch.tensor([tokens])).logits[0].double().log_softmax(-1)

    def summed(tokens: list[int]) -> float:
        return float(sum(chances(tokens)[i, token] for i, token in enumerate(tokens[1:])))

    for first, sequence in zip(firsts, found.sequences, strict=True):
        beams = [[first]]
        for _ in range(4):
            scored = []
            for beam in beams:
                sigma = float(meter.imbalance(total + usage(lifted, torch.tensor([beam]))))
                ahead = chances(beam)[-1]
                scored += [
                    (-(summed(beam) + float(p)) / (len(beam) + 1) + sigma / tau, [*beam, t])
                    for t, p in enumerate(ahead)
                ]
            beams = [beam for _, beam in sorted(scored)[:width]]
        scores = [
            -summed(b) / len(b) + float(meter.imbalance(total + usage(lifted, torch.tensor([b])))) / tau for b in beams
        ]
        best = beams[min(range(width), key=scores.__getitem__)]
        assert sequence.tolist() == [best]
        total += usage(lifted, torch.tensor([best]))
    assert found.imbalance == pytest.approx(float(meter.imbalance(total)))


def test_written_sequences_are_the_seeds_and_more_even_with_a_small_tau() -> None:
    lifted = lift(model())
    one, same = (sample_balanced(lifted, 3, 6, seed=4, quiet=True) for _ in range(2))
    assert [s.tolist() for s in one.sequences] == [s.tolist() for s in same.sequences]
    assert all(s.shape == (1, 6) for s in one.sequences)
    even, likely = (sample_balanced(lifted, 3, 8, tau=tau, quiet=True).imbalance for tau in (1e-3, 1e3))
    assert even < likely


@pytest.mark.parametrize("option", [{"count": 0}, {"length": 0}, {"width": 0}, {"tau": 0.0}])
def test_numbers_that_cannot_be(option: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=next(iter(option))):
        sample_balanced(lift(model()), **{"count": 1, "length": 2, **option}, quiet=True)
    with pytest.raises(BadOption, match="only a model"):
        sample_balanced(lift(seeded(Block(torch.nn.ModuleList(MLP() for _ in range(4))))), 1, 2, quiet=True)
    with pytest.raises(BadOption, match="2 sequences to choose from"):
        select_balanced(lift(model()), sequences(2), 3, quiet=True)
    with pytest.raises(BadOption, match="tau"):
        select_balanced(lift(model()), sequences(2), 1, tau=-1.0, quiet=True)
