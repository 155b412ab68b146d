"""Comparisons against their formulas, written out slowly."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from mxmoe.errors import BadTokens, NonFiniteLogits
from mxmoe.evaluate import compare, perplexity, remember
from mxmoe.evaluate.compare import percentile
from mxmoe.evaluate.windows import rows_at_once

VOCABULARY = 7
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))
texts = st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=60)


def bigram(input_ids: Tensor) -> Tensor:
    return TABLE[input_ids]


def running_sum(input_ids: Tensor) -> Tensor:
    return TABLE[input_ids.cumsum(-1) % VOCABULARY].flip(-1)


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(1, 70), st.integers(1, 5))
def test_equals_the_formulas(text: list[int], window: int, batch: int) -> None:
    ids = torch.tensor(text)
    found = compare(running_sum, bigram, ids, window, batch)
    divergences, agreed = [], 0
    for i in range(len(text) - 1):
        p = TABLE[text[i]].double().softmax(-1)
        q = TABLE[sum(text[i - i % window : i + 1]) % VOCABULARY].flip(-1).double().softmax(-1)
        divergences.append((p * (p / q).log()).sum().item())
        agreed += int(p.argmax() == q.argmax())
    assert found.tokens == len(text) - 1
    assert found.kl_mean == pytest.approx(np.mean(divergences), abs=1e-6)
    assert found.kl_p99 == pytest.approx(np.quantile(divergences, 0.99), abs=1e-6)
    assert found.top1 == pytest.approx(agreed / found.tokens)
    own = [perplexity(model, ids, window=window, batch=batch).perplexity for model in (running_sum, bigram)]
    assert [found.perplexity, found.reference_perplexity] == pytest.approx(own, rel=1e-9)
    assert found.nats_added == pytest.approx(math.log(own[0] / own[1]), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(texts, st.integers(1, 20), st.integers(1, 5))
def test_a_model_is_no_distance_from_itself_and_none_is_below(text: list[int], window: int, batch: int) -> None:
    ids = torch.tensor(text)
    same = compare(bigram, bigram, ids, window, batch)
    assert (same.kl_mean, same.kl_p99, same.top1, same.nats_added) == (0, 0, 1, 0)
    assert compare(running_sum, bigram, ids, window, batch).kl_mean >= 0


@settings(max_examples=30, deadline=None)
@given(texts, st.integers(1, 20), st.integers(1, 5))
def test_what_was_remembered_is_what_the_model_says(text: list[int], window: int, batch: int) -> None:
    ids = torch.tensor(text)
    kept = remember(bigram, ids, window, batch)
    assert compare(running_sum, kept, ids, window, batch) == compare(running_sum, bigram, ids, window, batch)
    assert kept.nbytes <= 4 * VOCABULARY * (len(text) - 1)


def test_another_text_was_not_remembered() -> None:
    kept = remember(bigram, torch.arange(7), 3, 1)
    with pytest.raises(BadTokens, match="no batch of the text"):
        compare(bigram, kept, torch.arange(7), 2, 1)


def test_logits_are_taken_apart_and_the_parts_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(50) % VOCABULARY
    whole = compare(running_sum, bigram, ids, 20, 2)
    monkeypatch.setattr("mxmoe.evaluate.windows._LOGITS_AT_ONCE", 3 * VOCABULARY)
    assert len(list(rows_at_once(torch.zeros(40, VOCABULARY)))) == 14
    assert compare(running_sum, bigram, ids, 20, 2) == whole


def test_models_go_back_to_the_mode_they_were_in() -> None:
    class Model(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            assert not self.training
            return TABLE[input_ids]

    trained, fixed = Model().train(), Model().eval()
    compare(trained, fixed, torch.arange(7))
    assert trained.training
    assert not fixed.training


def test_a_ruled_out_token_counts_nothing_where_the_reference_rules_it_out_too() -> None:
    def never_six(input_ids: Tensor) -> Tensor:
        logits = TABLE[input_ids].clone()
        logits[..., 6] = -torch.inf
        return logits

    ids = torch.arange(6)
    assert compare(never_six, never_six, ids).kl_mean == 0
    assert compare(never_six, bigram, ids).kl_mean == math.inf
    assert math.isfinite(compare(bigram, never_six, ids).kl_mean)
    with pytest.raises(NonFiniteLogits, match="token 6"):
        compare(never_six, bigram, torch.arange(7))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], share: float) -> None:
    found = percentile(torch.tensor(values, dtype=torch.float64), share)
    assert found == pytest.approx(np.quantile(values, share), rel=1e-9, abs=1e-9)
